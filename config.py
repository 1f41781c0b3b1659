"""The arguments that commands share, one dataclass per group. A YAML file sets them, and the command line wins over it.

data_prep.py, score.py and train_dpo.py accept every argument of GROUPS, so that one YAML file and one list of flags
serve the whole run. --help shows the arguments that a command uses. The commands that sample (generate.py,
make_prefs.py, evaluate.py) accept SampleArguments and arguments of their own.
"""

import math
import shlex
import sys
from argparse import SUPPRESS
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, Optional

import losses
from cli.parser import Parser, arg, names, number_or_auto
from cli.yaml_file import yaml_as_flags
from files import InputError

COLUMNS = (
    "names of the columns, such as prompt=question,chosen=response_j,rejected=response_k, or with --task sft "
    "prompt=question,response=solution; system, history, context and input name what comes before the prompt; default: "
    "the usual names are recognised"
)
IGNORE_COLUMNS = "columns, or fields of messages, to leave unread; others that hold text stop the job"
REASONING = (
    "reasoning_content or thinking in messages: drop it, or write it inline as <think> before the answer; auto: refuse "
    "it where the chat template does not render it"
)


@dataclass
class DataArguments:
    task: Literal["preferences", "sft", "kto"] = arg(
        "preferences",
        "what a row is: a preference, a prompt with one response (for --loss_type sft), or that with a label that says "
        "whether the response is desirable (for --loss_type kto)",
        heading="Data",
    )
    preference_data_path: Optional[list[str]] = arg(
        None,
        "the rows: .jsonl, .json, .parquet or .arrow files (several, or data-*.parquet, are one data set), or a data "
        "set of the Hub, org/name; default: the arrays in --data are used as they are",
        "--in",
        metavar="FILE",
    )
    split: str = arg("train", "split of a data set of the Hub", metavar="NAME")
    data: str = arg(
        "packed",
        "folder of the packed arrays; data_prep.py writes it, the other commands read it",
        "--out",
        metavar="FOLDER",
    )
    columns: Optional[str] = arg(None, COLUMNS, metavar="NAME=COLUMN,...")
    ignore_columns: Optional[str] = arg(None, IGNORE_COLUMNS, metavar="COLUMN,...")
    reasoning: Literal["auto", "drop", "inline"] = arg("auto", REASONING)
    max_length: int = arg(
        1024, "longest prompt and response together, in tokens; longer rows are dropped and listed in rejects.jsonl"
    )
    template: Literal["auto", "chat", "none"] = arg(
        "auto", "apply the tokenizer's chat template to prompts; auto: if it has one"
    )
    on_bad_row: Literal["stop", "skip"] = arg(
        "stop", "what to do with malformed rows: stop, or skip them and list them in rejects.jsonl"
    )
    num_proc: int = arg(0, "number of processes that tokenize; 0: one per core")


REMOTE = "run the code that comes with the model; not needed for the families in the README"
MASK = "id of the mask token; default: from config.json or the tokenizer"
FITTING = "Precision, memory and speed"
BLOCK_SIZE = (
    "tokens in a block of a block-causal model, 0 for a bidirectional model; auto: from config.json or the model family"
)
SHIFT = "whether logits at position i - 1 predict token i; auto: from config.json or the model family"


@dataclass
class ModelArguments:
    model_name_or_path: Optional[str] = arg(
        None,
        "folder or Hub name of the model to train, which is also the reference; default: examples/tiny in "
        "data_prep.py, later the model that packed the data",
        metavar="MODEL",
        heading="Model",
    )
    trust_remote_code: bool = arg(False, REMOTE)
    mask_token_id: Optional[int] = arg(None, MASK)
    end_token_id: Optional[int] = arg(
        None, "id of the token that ends a response; default: end of turn of the chat template, else eos"
    )
    shift_logits: Literal["auto", "yes", "no"] = arg("auto", SHIFT)
    block_size: number_or_auto = arg("auto", BLOCK_SIZE)
    use_mixed_precision: Literal["bf16", "no"] = arg(
        "bf16", "bf16: bfloat16 weights and float32 scores; no: float32", heading=FITTING
    )
    lora_r: int = arg(0, "rank of the adapters; 0: no adapters, all weights are trained", heading="LoRA")
    lora_alpha: float = arg(32, "scale of the adapters; their output is multiplied by alpha / r")
    lora_targets: str = arg(
        "auto", "linear layers with adapters, such as q_proj,v_proj; auto: all of the blocks", metavar="NAME,..."
    )
    load_in_4bit: bool = arg(
        False,
        "QLoRA: keep the blocks' weights on the GPU in 4 bits (NF4, bitsandbytes); not with ZeRO-3",
        heading=FITTING,
    )
    gradient_checkpointing: bool = arg(
        True, "recompute activations in the backward pass: less memory, a third more compute"
    )
    tokens_per_forward: number_or_auto = arg(
        "auto",
        "tokens in one forward pass: masked states of any responses and pairs of a step, end to end; auto: as many as "
        "fit, tried on the longest response",
    )
    deepspeed: Optional[str] = arg(
        None, "ds_config that says where parameters and optimizer live; default: on the GPU", metavar="FILE"
    )
    local_rank: int = arg(-1, SUPPRESS)  # set by the launcher


@dataclass
class NoiseArguments:
    estimator: Literal["auto", "stepwise", "spread", "radau", "elbo", "elbo_stratified"] = arg(
        "auto",
        "how masks are drawn and weighted (docs/method.md); auto: radau, stepwise with --order blocks, "
        "elbo_stratified for block-causal models",
        heading="Noise: the masked states in which a response is scored",
    )
    diffusion_steps: number_or_auto = arg(
        None,
        "T, denoising steps of a trajectory; auto: T and R that calibrate.py recommends; default: 2 (spread and "
        "stepwise 3, elbo 8, elbo_stratified and block-causal models 4)",
    )
    trajectories: Optional[int] = arg(
        None,
        "R, rotated trajectories per response: 1 + R(T-1) states, a row each (elbo: R masks at T levels, RT states); "
        "default: 3 (elbo, elbo_stratified and block-causal models 1)",
    )
    order: Literal["random", "blocks"] = arg(
        "random", "order in which tokens are revealed: random, or block by block from left to right"
    )
    block_length: int = arg(32, "tokens in a block of --order blocks; use the sampler's --block_length")
    noise_sets: int = arg(1, "K, draws of masks per pair; epoch e uses draw e mod K")
    noise_seed: int = arg(0, "seed of the noise (not the run's --seed)")
    ld_alpha: float = arg(
        1.0,
        "weight in a score of the tokens beyond the length of the pair's shorter response, from 0 to 1 (LD-DPO); "
        "1: that of the others",
    )


@dataclass
class TrainArguments:
    output_dir: str = arg(
        "runs/default", "folder of the run: log.jsonl, checkpoints/, final/", metavar="FOLDER", heading="Run"
    )
    loss_type: losses.loss_names = arg(
        "sigmoid",
        f"one of {', '.join(losses.LOSSES)}, or a sum of several with commas; sigmoid: DPO; sft: masked-diffusion NLL "
        "of the chosen responses, or of rows of --task sft",
        metavar="NAME,...",
        heading="Loss",
    )
    loss_weights: Optional[losses.loss_weights] = arg(
        None, "weight of each loss of --loss_type, such as 1,0.1; default: 1 for each", metavar="X,..."
    )
    beta: float = arg(0.1, "DPO's beta: a larger value keeps the policy nearer to the reference")
    desirable_weight: float = arg(1.0, "kto: weight of desirable responses, to balance unequal numbers")
    undesirable_weight: float = arg(1.0, "kto: weight of undesirable ones; change one of the two")
    label_smoothing: float = arg(0.0, "probability that a preference is wrong (conservative DPO), from 0 to below 0.5")
    simpo_gamma: float = arg(0.5, "simpo: margin that beta times the scores per token should have")
    cpo_alpha: float = arg(1.0, "cpo: weight of the chosen response's masked-diffusion NLL per token")
    discopop_tau: float = arg(0.05, "discopop: temperature of the mixture of its two losses")
    backprop_steps: int = arg(
        0,
        "k, states of a response that carry the gradient (unbiased); the others only add to the score, at a third "
        "of the cost; 0: all",
    )
    sft_weight: float = arg(0.0, "weight of the chosen response's masked-diffusion NLL per token, added to the loss")
    sft_pad_to: int = arg(
        0, "sft: pad responses to at least this many tokens with eos, which counts in the loss; 0: to the longest"
    )
    learning_rate: float = arg(5e-7, "peak learning rate", heading="Optimizer")
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = arg(
        "cosine", "learning rate after warm-up: down to 0, or constant"
    )
    warmup_ratio: float = arg(0.03, "fraction of the steps used for warm-up, from 0 to below 1")
    weight_decay: float = arg(0.0, "AdamW's decoupled weight decay")
    adam_beta1: float = arg(0.9, "AdamW's beta1")
    adam_beta2: float = arg(0.999, "AdamW's beta2")
    max_grad_norm: float = arg(1.0, "clip the gradient to this norm; 0: never")
    num_train_epochs: float = arg(1.0, "passes over the training pairs", heading="Batch and length of the run")
    max_steps: int = arg(-1, "number of optimizer steps; -1: as many as --num_train_epochs has")
    per_device_train_batch_size: int = arg(
        1, "pairs per rank and micro-step, one after the other (sft: rows in one forward pass)"
    )
    gradient_accumulation_steps: int = arg(
        8, "micro-steps per optimizer step; a step has batch size x this x ranks pairs"
    )
    eval_fraction: float = arg(
        0.05, "fraction of the prompts that is held out", heading="Evaluation, logging, checkpoints"
    )
    eval_steps: int = arg(0, "evaluate the held-out pairs every N steps and at the end; 0: only at the end")
    logging_steps: int = arg(1, "print every N steps (log.jsonl has every step)")
    report_to: str = arg("tensorboard", "trackers: tensorboard, wandb, both with a comma, or none", metavar="NAME,...")
    run_name: Optional[str] = arg(None, "name of the run in W&B; default: --output_dir", metavar="NAME")
    save_steps: int = arg(0, "save a checkpoint every N steps; 0: only when the run is stopped")
    save_total_limit: int = arg(2, "number of checkpoints to keep; 0: all")
    seed: int = arg(42, "seed of the order of the data and of the held-out split", heading="Run")
    resume_from_checkpoint: Optional[str] = arg(
        None, "folder of a checkpoint, or latest; default: the latest if there is one", metavar="FOLDER"
    )


@dataclass
class SampleArguments:
    model_name_or_path: Optional[str] = arg(
        None, "folder or Hub name; needed to sample", "--model", metavar="MODEL", heading="Model"
    )
    trust_remote_code: bool = arg(False, REMOTE)
    mask_token_id: Optional[int] = arg(None, MASK)
    end_token_id: Optional[int] = arg(
        None, "id of a token that ends a response, besides eos; default: end of turn of the chat template"
    )
    shift_logits: Literal["auto", "yes", "no"] = arg("auto", SHIFT)
    block_size: number_or_auto = arg("auto", BLOCK_SIZE)
    use_mixed_precision: Literal["bf16", "no"] = arg("bf16", "bf16: bfloat16 weights; no: float32", heading=FITTING)
    load_in_4bit: bool = arg(False, "keep the blocks' weights on the GPU in 4 bits (NF4, bitsandbytes)")
    deepspeed: Optional[str] = arg(
        None, "ds_config of ZeRO-3, to stream weights from the host; default: all weights on the GPU", metavar="FILE"
    )
    device: str = arg("auto", "auto, cpu, cuda or cuda:N; auto: the GPU if there is one", metavar="NAME")
    template: Literal["auto", "chat", "none"] = arg(
        "auto", "apply the tokenizer's chat template to prompts; auto: if it has one", heading="Sampling"
    )
    gen_length: int = arg(64, "maximum number of tokens of a response")
    steps: Optional[int] = arg(None, "forward passes per response, at most; default: --gen_length, one per token")
    block_length: Optional[int] = arg(
        None,
        "tokens in a block, filled before the next block; default: --gen_length, one block, or the blocks of a "
        "block-causal model",
    )
    temperature: float = arg(0.0, "temperature of the softmax that tokens are drawn from; 0: the most likely token")
    cfg_scale: float = arg(
        0.0, "scale of classifier-free guidance, at twice the cost; 0: none (not for block-causal models)"
    )
    remasking: Literal["low_confidence", "random", "sequential"] = arg(
        "low_confidence", "which predictions are masked again after a pass; sequential: all but the leftmost"
    )
    logits_eos_inf: bool = arg(False, "never predict eos")
    confidence_eos_eot_inf: bool = arg(False, "commit eos and end-of-turn last")
    threshold: Optional[float] = arg(
        None,
        "confidence-parallel decoding (an approximation): a pass commits every prediction of at least this "
        "probability, above 0 and up to 1, and never fewer than without it; default: off",
    )
    cache: Literal["none", "prefix", "dual"] = arg(
        "none",
        "keep keys and values between passes of a bidirectional model (an approximation): prefix reads from the "
        "block's start on, dual the block alone; block-causal models always keep them, exactly",
    )
    refresh: Optional[int] = arg(
        None, "--cache: read the whole row in every Nth pass of a block; default: in its first pass alone", metavar="N"
    )
    batch_size: number_or_auto = arg(
        "auto", "responses that share forward passes, of any lengths; auto: as memory has room", heading=FITTING
    )
    seed: int = arg(0, "seed of the sampler's noise", heading="Sampling")


@dataclass
class LikelihoodArguments:
    diffusion_steps: int = arg(
        4, "T, denoising steps of a trajectory", heading="Likelihoods, for tasks of lm_eval that ask for them"
    )
    trajectories: int = arg(5, "R, rotated trajectories per continuation; 1 + R(T-1) forward passes")
    noise_seed: int = arg(0, "seed of the noise")
    tokens_per_forward: int = arg(4096, "tokens in one forward pass, of all masked states in it")
    check_greedy: bool = arg(
        False,
        "also sample each continuation greedily and report whether it is the same, for tasks that count this, "
        "such as lambada",
    )


@dataclass
class AdapterArguments:
    base_model: Optional[str] = arg(
        None,
        "folder or Hub name of an adapter's base; default: base_model_name_or_path of its adapter_config.json",
        metavar="MODEL",
        heading="Model",
    )


adapters = AdapterArguments()  # of this command: parse() fills it in, and models/folders.py reads it
GROUPS = (DataArguments, ModelArguments, NoiseArguments, TrainArguments)


class Arguments(NamedTuple):
    """One instance of each of GROUPS, as parse() returns them."""

    data: DataArguments
    model: ModelArguments
    noise: NoiseArguments
    train: TrainArguments


def parse(argv, doc, *used, hide=(), below=()):
    """Parse argv (None: the command line) into one instance of each dataclass in `used`: GROUPS in order, others last.

    doc: the command's docstring, for --help. hide: names that --help leaves out, because the command does not use them.
    below: flags that stand in for the defaults: the file and the command line win over them.
    A command that uses one of GROUPS accepts the arguments of all of them, so that one YAML file serves a whole run.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    accepted = (*used, AdapterArguments)
    if set(used) & set(GROUPS):
        accepted = (*GROUPS, *(group for group in accepted if group not in GROUPS))
    parser = Parser(accepted, doc)
    parser.add_argument(
        "--config_file",
        heading="options",
        metavar="FILE",
        help="YAML file of these arguments, lines of 'name: value'; the command line wins over it",
    )
    shown = {*used, AdapterArguments} if SampleArguments in used else {*used}
    parser.hide(names(*set(accepted) - shown) | {*hide})
    paths = [argv[i + 1] for i, word in enumerate(argv[:-1]) if word == "--config_file"]
    paths += [word.split("=", 1)[1] for word in argv if word.startswith("--config_file=")]
    if len(paths) > 1:
        raise InputError(f"--config_file is given {len(paths)} times, expected one file")
    from_file = yaml_as_flags(paths[0], names(*accepted) - {"local_rank"}, names(*GROUPS)) if paths else []
    try:
        # By itself first, so that an error in the file names the file
        found = parser.parse_args(from_file, parser.parse_args([*below]))
    except InputError as error:
        raise InputError(f"{paths[0]}: {error}") from None
    groups = parser.read(argv, found)
    adapters.base_model = next(group.base_model for group in groups if isinstance(group, AdapterArguments))
    return [group for group in groups if isinstance(group, used)]


def check_scoring(model_args, noise_args):
    """Refuse numbers of the score that have no meaning."""
    for group, numbers in (
        (noise_args, ("diffusion_steps", "trajectories", "noise_sets", "block_length")),
        (model_args, ("tokens_per_forward",)),
    ):
        for name in numbers:
            value = getattr(group, name)
            if value not in ("auto", None) and value < 1:
                raise InputError(f"--{name} is {value}, expected at least 1")
    if not 0 <= noise_args.ld_alpha <= 1:
        raise InputError(f"--ld_alpha is {noise_args.ld_alpha}, expected 0 to 1")
    if model_args.lora_r < 0:
        raise InputError(f"--lora_r is {model_args.lora_r}, expected 0 (every weight is trained) or more")


def check(args):
    """Refuse training arguments that have no meaning, such as not-a-number."""
    more_than_0 = ("learning_rate", "beta", "discopop_tau", "desirable_weight", "undesirable_weight")
    for name in (*more_than_0, "per_device_train_batch_size", "gradient_accumulation_steps"):
        if not 0 < getattr(args, name) < math.inf:
            raise InputError(f"--{name} is {getattr(args, name)}, expected more than 0")
    for name in ("sft_weight", "simpo_gamma", "cpo_alpha", "sft_pad_to", "max_grad_norm", "weight_decay"):
        if not 0 <= getattr(args, name) < math.inf:
            raise InputError(f"--{name} is {getattr(args, name)}, expected 0 or more")
    for name, most in (
        ("eval_fraction", 1),
        ("label_smoothing", 0.5),
        ("warmup_ratio", 1),
        ("adam_beta1", 1),
        ("adam_beta2", 1),
    ):
        if not 0 <= getattr(args, name) < most:
            raise InputError(f"--{name} is {getattr(args, name)}, expected 0 or more and less than {most}")
    if args.max_steps <= 0 and not 0 < args.num_train_epochs < math.inf:
        raise InputError(
            f"--num_train_epochs is {args.num_train_epochs} and --max_steps is {args.max_steps}, "
            "expected one of them more than 0"
        )
    check_losses(args, args.loss_type.split(","))


def check_losses(args, chosen):
    """Refuse arguments of a loss that is not `chosen`, a list of names."""
    for item in fields(args):
        value, readers = getattr(args, item.name), losses.readers(item.name)
        if value != item.default and readers and not set(readers) & set(chosen):
            raise InputError(f"--{item.name} {value} belongs to --loss_type {', '.join(readers)}, not {args.loss_type}")
    if "exo_pair" in chosen and not args.label_smoothing:
        raise InputError("--loss_type exo_pair needs --label_smoothing above 0, such as its paper's 0.001")
    if args.sft_weight and {"sft", "kto"} & set(chosen):
        raise InputError(
            f"--sft_weight {args.sft_weight} adds SFT to a preference loss; leave it out with --loss_type "
            f"{args.loss_type}"
        )
    if len(chosen) == 1 and args.loss_weights:
        raise InputError(
            f"--loss_weights {args.loss_weights} belongs to a sum, and --loss_type {args.loss_type} is one loss"
        )
    if len(chosen) > 1 and args.sft_pad_to:
        raise InputError(f"--sft_pad_to {args.sft_pad_to} pads rows of --loss_type sft alone, not of {args.loss_type}")
    count = len(args.loss_weights.split(",")) if args.loss_weights else len(chosen)
    if count != len(chosen):
        raise InputError(
            f"--loss_weights {args.loss_weights}: {count} weights, --loss_type {args.loss_type} has {len(chosen)}"
        )


def flags(names, *groups):
    """The flags for the arguments `names`, as `groups` have them. Arguments at their default are left out."""
    given = []
    for group in groups:
        for item in fields(group):
            value = getattr(group, item.name)
            if item.name in names and str(value) != str(item.default) and value is not None:
                given.append(f"--{item.name} {shlex.quote(str(value))}")
    return " ".join(given)

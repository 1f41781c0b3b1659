"""The arguments that the scripts share: one dataclass a group, a YAML file for defaults, the command line over it.

data_prep.py, score.py and train_dpo.py accept every argument of GROUPS, so that one configs/*.yaml and one list of flags
serve the whole run; --help shows the groups that a script uses. The sampling scripts (generate.py, make_prefs.py,
evaluate.py) accept SampleArguments and their own.
"""

import math
import shlex
import sys
from dataclasses import dataclass, fields
from typing import Literal, Optional

from cli.parser import Parser, arg, names, number_or_auto
from cli.yaml_file import yaml_as_flags
from files import InputError


@dataclass
class DataArguments:
    task: Literal["preferences", "sft"] = arg(
        "preferences",
        "what the rows are: preferences, or prompts with one response each, for --loss_type sft",
        heading="Data",
    )
    preference_data_path: Optional[str] = arg(
        None,
        "the rows, preferences or those of --task sft: a .jsonl, .json or .parquet file, or a data set of the hub, org/name; "
        "without it the arrays that --data holds are used",
        "--in",
        metavar="FILE",
    )
    split: str = arg("train", "split of a hub data set", metavar="NAME")
    data: str = arg(
        "packed", "folder of the packed arrays: data_prep.py writes it, the others read it", "--out", metavar="FOLDER"
    )
    columns: Optional[str] = arg(
        None,
        "names of the columns, such as prompt=question,chosen=response_j,rejected=response_k, or with --task sft "
        "prompt=question,response=solution; without it they are recognised by the usual names",
        metavar="NAME=COLUMN,...",
    )
    max_length: int = arg(1024, "longest prompt + response, in tokens; longer pairs are left out and listed")
    template: Literal["auto", "chat", "none"] = arg(
        "auto", "whether prompts get the tokenizer's chat template; auto: if it has one"
    )
    on_bad_row: Literal["stop", "skip"] = arg(
        "stop", "what a malformed row does: stop the job, or be listed and skipped"
    )
    num_proc: int = arg(0, "processes that tokenize; 0: one per core")


REMOTE = "run code that comes with the model (needed for none of the families that README names)"
MASK = "id of the mask token; without it as config.json or the tokenizer says"
FITTING = "Precision, memory and speed"
SHIFT = "whether logits at i - 1 predict token i; auto: as config.json or the family says"


@dataclass
class ModelArguments:
    model_name_or_path: Optional[str] = arg(
        None,
        "the model that training starts from, which is also the reference: a folder or a hub name; without it data_prep.py takes "
        "examples/tiny, score.py and train_dpo.py take the model that packed the data",
        metavar="MODEL",
        heading="Model",
    )
    trust_remote_code: bool = arg(False, REMOTE)
    mask_token_id: Optional[int] = arg(None, MASK)
    end_token_id: Optional[int] = arg(
        None, "id of the token that ends a response; without it the chat template's end of turn, else eos"
    )
    shift_logits: Literal["auto", "yes", "no"] = arg("auto", SHIFT)
    use_mixed_precision: Literal["bf16", "no"] = arg(
        "bf16", "bf16: bfloat16 weights, float32 scores; no: float32", heading=FITTING
    )
    lora_r: int = arg(0, "rank of the adapters; 0: no adapters, every weight is trained", heading="LoRA")
    lora_alpha: float = arg(32, "the adapters' product counts alpha / r")
    lora_targets: str = arg(
        "auto", "linear layers that get adapters: auto, all of the blocks; or q_proj,v_proj", metavar="NAME,..."
    )
    load_in_4bit: bool = arg(
        False, "LoRA: the blocks' weights in 4 bits on the card (QLoRA's NF4, bitsandbytes), no ZeRO-3", heading=FITTING
    )
    gradient_checkpointing: bool = arg(
        True, "recompute activations in the backward pass: less memory, a third more work"
    )
    states_per_forward: number_or_auto = arg(
        "auto", "states of a response in one forward pass; auto: as many as fit, tried on the longest pair"
    )
    deepspeed: Optional[str] = arg(
        None, "ds_configs/*.json: where parameters and optimizer live; without it on the card", metavar="FILE"
    )
    local_rank: int = arg(-1, "set by the launcher")


@dataclass
class NoiseArguments:
    estimator: Literal["auto", "stepwise", "spread", "elbo", "elbo_stratified"] = arg(
        "auto",
        "how masks are drawn and weighted; auto: spread, and stepwise with --order blocks; diffusion.py says what each is",
        heading="Noise: the masked states in which a response is scored",
    )
    diffusion_steps: number_or_auto = arg(
        3, "T, denoising steps of a trajectory; auto: as score.py --calibrate recommends, R too", metavar="N|auto"
    )
    trajectories: int = arg(
        3,
        "R, rotated trajectories per response; 1 + R(T-1) states each cost a forward pass (elbo: R masks at T levels)",
    )
    order: Literal["random", "blocks"] = arg(
        "random", "order of revealing: random, or blocks from left to right and random inside"
    )
    block_length: int = arg(32, "tokens of a block of --order blocks; the sampler's --block_length")
    noise_sets: int = arg(1, "K, draws of noise per pair; epoch e uses draw e mod K")
    noise_seed: int = arg(0, "seed of the noise (not the run's --seed)")


@dataclass
class TrainArguments:
    output_dir: str = arg(
        "runs/default", "folder of the run: log.jsonl, checkpoints/, final/", metavar="FOLDER", heading="Run"
    )
    loss_type: Literal["sigmoid", "ipo", "hinge", "sft"] = arg(
        "sigmoid",
        "sigmoid: DPO's; ipo; hinge; sft: masked-diffusion NLL of the chosen alone, or of --task sft's responses",
        heading="Loss",
    )
    beta: float = arg(0.1, "DPO's temperature: the larger, the nearer the policy stays to the reference")
    label_smoothing: float = arg(
        0.0, "probability that a preference is wrong (conservative DPO), at least 0 and less than 0.5"
    )
    backprop_steps: int = arg(
        0,
        "k, states of a response that carry the gradient, unbiased; the others give the score alone, at a third "
        "of the cost; 0: all",
    )
    sft_weight: float = arg(0.0, "weight of the chosen response's masked-diffusion NLL per token, added to DPO's loss")
    sft_pad_to: int = arg(
        0, "sft: pad responses to so many tokens with end tokens that count in the loss; 0: to the longest"
    )
    learning_rate: float = arg(5e-7, "peak learning rate", heading="Optimizer")
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = arg("cosine", "after warm-up: down to 0, or constant")
    warmup_ratio: float = arg(0.03, "share of the steps spent warming up, at least 0 and less than 1")
    weight_decay: float = arg(0.0, "AdamW's decoupled weight decay")
    adam_beta1: float = arg(0.9, "AdamW's beta1")
    adam_beta2: float = arg(0.999, "AdamW's beta2")
    max_grad_norm: float = arg(1.0, "clip the gradient's norm here; 0: never")
    num_train_epochs: float = arg(1.0, "passes over the training pairs", heading="Batch and length of the run")
    max_steps: int = arg(-1, "optimizer steps, instead of --num_train_epochs; -1: as many as the epochs have")
    per_device_train_batch_size: int = arg(
        1, "pairs per rank and micro-step, one after the other (sft: rows, in one forward)"
    )
    gradient_accumulation_steps: int = arg(
        8, "micro-steps per optimizer step, whose pairs are batch size x this x ranks"
    )
    eval_fraction: float = arg(0.05, "share of the prompts held out", heading="Evaluation, logging, checkpoints")
    eval_steps: int = arg(0, "score the held-out pairs every so many steps, and at the end; 0: only at the end")
    logging_steps: int = arg(1, "print every so many steps (log.jsonl gets every one)")
    report_to: str = arg(
        "tensorboard", "where else the log goes: tensorboard, wandb, both with a comma, or none", metavar="NAME,..."
    )
    run_name: Optional[str] = arg(None, "the run's name in W&B; without it --output_dir", metavar="NAME")
    save_steps: int = arg(0, "write a checkpoint every so many steps; 0: only when told to stop")
    save_total_limit: int = arg(2, "checkpoints kept, the newest; 0: all")
    seed: int = arg(42, "seed of the order of the data and of the held-out split", heading="Run")
    resume_from_checkpoint: Optional[str] = arg(
        None, "a checkpoint folder, or latest; without it the latest if there is one", metavar="FOLDER"
    )


@dataclass
class SampleArguments:
    model_name_or_path: Optional[str] = arg(
        None, "folder or hub name; needed to sample", "--model", metavar="MODEL", heading="Model"
    )
    trust_remote_code: bool = arg(False, REMOTE)
    mask_token_id: Optional[int] = arg(None, MASK)
    end_token_id: Optional[int] = arg(
        None, "id of a token that ends a response, besides eos; without it the chat template's end of turn"
    )
    shift_logits: Literal["auto", "yes", "no"] = arg("auto", SHIFT)
    use_mixed_precision: Literal["bf16", "no"] = arg("bf16", "bf16: bfloat16 weights; no: float32", heading=FITTING)
    load_in_4bit: bool = arg(
        False, "keep the blocks' weights in 4 bits on the card (NF4, bitsandbytes), instead of streaming them"
    )
    deepspeed: Optional[str] = arg(
        None, "ds_config of ZeRO-3, to stream weights from the host; without it all are on the card", metavar="FILE"
    )
    device: str = arg("auto", "auto, cpu, cuda or cuda:N; auto: a GPU if there is one", metavar="NAME")
    template: Literal["auto", "chat", "none"] = arg(
        "auto", "whether prompts get the tokenizer's chat template; auto: if it has one", heading="Sampling"
    )
    gen_length: int = arg(64, "most tokens of a response")
    steps: Optional[int] = arg(None, "forward passes per response; without it --gen_length, one for each token")
    block_length: Optional[int] = arg(None, "tokens filled before the next block; without it --gen_length, one block")
    temperature: float = arg(0.0, "temperature of the Gumbel noise; 0: the most likely token")
    cfg_scale: float = arg(
        0.0, "classifier-free guidance against the response without its prompt; 0: none, twice the cost otherwise"
    )
    remasking: Literal["low_confidence", "random"] = arg("low_confidence", "which predictions stay masked in a pass")
    logits_eos_inf: bool = arg(False, "never predict eos")
    confidence_eos_eot_inf: bool = arg(False, "commit eos and end-of-turn last")
    threshold: Optional[float] = arg(
        None,
        "confidence-parallel decoding (an approximation): commit every prediction at least this sure, more "
        "than 0 and at most 1; without it --steps says how many",
    )
    batch_size: int = arg(8, "most prompts of one length per forward pass", heading=FITTING)
    seed: int = arg(0, "seed of the sampler's noise", heading="Sampling")


@dataclass
class LikelihoodArguments:
    diffusion_steps: int = arg(
        4, "T, denoising steps of a trajectory", heading="Likelihoods, for tasks of lm_eval that ask for them"
    )
    trajectories: int = arg(5, "R, rotated trajectories per continuation; 1 + R(T-1) forward passes")
    noise_seed: int = arg(0, "seed of the noise")
    states_per_forward: int = arg(4, "states of one continuation that share a forward pass")
    check_greedy: bool = arg(
        False,
        "sample each continuation's length greedily, too, and say whether it is the "
        "same: for tasks that count this, such as lambada; else that is never said",
    )


GROUPS = (DataArguments, ModelArguments, NoiseArguments, TrainArguments)


def parse(argv, doc, *used, hide=()):
    """Parse argv (None: the command line): one instance of each dataclass in `used`, in the order of GROUPS, others last.

    doc: the command's docstring, for --help. hide: names that --help leaves out, because the command does not use them.
    A command that uses one of GROUPS accepts the arguments of all of them, so that one YAML file serves a whole run.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    accepted = used
    if set(used) & set(GROUPS):
        accepted = (*GROUPS, *(group for group in used if group not in GROUPS))
    parser = Parser(accepted, doc)
    parser.add_argument(
        "--config_file",
        heading="options",
        metavar="FILE",
        help="YAML file of these arguments, lines of 'name: value'; the command line wins over it",
    )
    parser.hide(names(*set(accepted) - set(used)) | {*hide, "local_rank"})
    paths = [argv[i + 1] for i, word in enumerate(argv[:-1]) if word == "--config_file"]
    paths += [word.split("=", 1)[1] for word in argv if word.startswith("--config_file=")]
    if len(paths) > 1:
        raise InputError(f"--config_file is given {len(paths)} times, expected one file")
    from_file = yaml_as_flags(paths[0], names(*accepted)) if paths else []
    try:
        parser.read(from_file)  # by itself first, so that an error in the file names the file
    except InputError as error:
        raise InputError(f"{paths[0]}: {error}") from None
    return [group for group in parser.read(from_file + argv) if isinstance(group, used)]


def check_scoring(model_args, noise_args):
    """Refuse numbers of the score that have no meaning."""
    for group, names in (
        (noise_args, ("diffusion_steps", "trajectories", "noise_sets", "block_length")),
        (model_args, ("states_per_forward",)),
    ):
        for name in names:
            if (value := getattr(group, name)) != "auto" and value < 1:
                raise InputError(f"--{name} is {value}, expected at least 1")
    if model_args.lora_r < 0:
        raise InputError(f"--lora_r is {model_args.lora_r}, expected 0 (every weight is trained) or more")


def check(args):
    """Refuse training arguments without a meaning; not-a-number has none."""
    for name in ("learning_rate", "beta", "per_device_train_batch_size", "gradient_accumulation_steps"):
        if not 0 < getattr(args, name) < math.inf:
            raise InputError(f"--{name} is {getattr(args, name)}, expected more than 0")
    for name in ("sft_weight", "sft_pad_to", "max_grad_norm", "weight_decay"):
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
            f"--num_train_epochs is {args.num_train_epochs} and --max_steps {args.max_steps}; expected one of them more than 0"
        )
    if args.label_smoothing and args.loss_type != "sigmoid":
        raise InputError(
            f"--label_smoothing {args.label_smoothing} belongs to --loss_type sigmoid, not {args.loss_type}"
        )
    if args.sft_weight and args.loss_type == "sft":
        raise InputError(
            f"--sft_weight {args.sft_weight} adds SFT to a preference loss; leave it out with --loss_type sft"
        )


def flags(names, *groups):
    """The command line that says `names` as `groups` have them; what is as by default is left out."""
    said = []
    for group in groups:
        for item in fields(group):
            value = getattr(group, item.name)
            if item.name in names and str(value) != str(item.default) and value is not None:
                said.append(f"--{item.name} {shlex.quote(str(value))}")
    return " ".join(said)

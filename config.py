"""The arguments that the scripts share: one dataclass a group, a YAML file for defaults, the command line over it.

data_prep.py, score.py and train_dpo.py accept every argument of GROUPS, so that one configs/*.yaml and one list of flags
serve the whole run; --help shows the groups that a script uses. The sampling scripts (generate.py, make_prefs.py,
evaluate.py) accept SampleArguments and their own.
"""
import difflib
import math
import os
import shlex
import shutil
import sys
import textwrap
from argparse import SUPPRESS, RawDescriptionHelpFormatter
from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Literal, Optional

import yaml
from transformers.hf_argparser import HfArgumentParser, string_to_bool

from packed import InputError, no_room, why


def arg(default, help, *aliases, metavar=None, heading=None):
    """A field of a group. metavar: what --help calls its value; heading: under which it stands there, and the fields after it."""
    shown = {"aliases": list(aliases) or None, "metavar": metavar, "heading": heading}
    return field(default=default, metadata={"help": help} | {name: value for name, value in shown.items() if value})


@dataclass
class DataArguments:
    task: Literal["preferences", "sft"] = arg(
        "preferences", "what the rows are: preferences, or prompts with one response each, for --loss_type sft", heading="Data")
    preference_data_path: Optional[str] = arg(
        None, "the rows, preferences or those of --task sft: a .jsonl, .json or .parquet file, or a data set of the hub, org/name; "
        "without it the arrays that --data holds are used", "--in", metavar="FILE")
    split: str = arg("train", "split of a hub data set", metavar="NAME")
    data: str = arg("packed", "folder of the packed arrays: data_prep.py writes it, the others read it", "--out", metavar="FOLDER")
    columns: Optional[str] = arg(
        None, "names of the columns, such as prompt=question,chosen=response_j,rejected=response_k, or with --task sft "
        "prompt=question,response=solution; without it they are recognised by the usual names", metavar="NAME=COLUMN,...")
    max_length: int = arg(1024, "longest prompt + response, in tokens; longer pairs are left out and listed")
    template: Literal["auto", "chat", "none"] = arg("auto", "whether prompts get the tokenizer's chat template; auto: if it has one")
    on_bad_row: Literal["stop", "skip"] = arg("stop", "what a malformed row does: stop the job, or be listed and skipped")
    num_proc: int = arg(0, "processes that tokenize; 0: one per core")


REMOTE = "run code that comes with the model (needed for none of the families that README names)"
MASK = "id of the mask token; without it as config.json or the tokenizer says"
FITTING = "Precision, memory and speed"
SHIFT = "whether logits at i - 1 predict token i; auto: as config.json or the family says"


@dataclass
class ModelArguments:
    model_name_or_path: Optional[str] = arg(
        None, "the model that training starts from, which is also the reference: a folder or a hub name; without it data_prep.py takes "
        "examples/tiny, score.py and train_dpo.py take the model that packed the data", metavar="MODEL", heading="Model")
    trust_remote_code: bool = arg(False, REMOTE)
    mask_token_id: Optional[int] = arg(None, MASK)
    end_token_id: Optional[int] = arg(None, "id of the token that ends a response; without it the chat template's end of turn, else eos")
    shift_logits: Literal["auto", "yes", "no"] = arg("auto", SHIFT)
    use_mixed_precision: Literal["bf16", "no"] = arg("bf16", "bf16: bfloat16 weights, float32 scores; no: float32", heading=FITTING)
    lora_r: int = arg(0, "rank of the adapters; 0: no adapters, every weight is trained", heading="LoRA")
    lora_alpha: float = arg(32, "the adapters' product counts alpha / r")
    lora_targets: str = arg("auto", "linear layers that get adapters: auto, all of the blocks; or q_proj,v_proj", metavar="NAME,...")
    load_in_4bit: bool = arg(False, "LoRA: the blocks' weights in 4 bits on the card (QLoRA's NF4, bitsandbytes), no ZeRO-3", heading=FITTING)
    gradient_checkpointing: bool = arg(True, "recompute activations in the backward pass: less memory, a third more work")
    states_per_forward: str = arg("auto", "states of a response in one forward pass; auto: as many as fit, tried on the longest pair", metavar="N|auto")
    deepspeed: Optional[str] = arg(None, "ds_configs/*.json: where parameters and optimizer live; without it on the card", metavar="FILE")
    local_rank: int = arg(-1, "set by the launcher")


@dataclass
class NoiseArguments:
    estimator: Literal["auto", "stepwise", "spread", "elbo", "elbo_stratified"] = arg(
        "auto", "how masks are drawn and weighted; auto: spread, and stepwise with --order blocks; diffusion.py says what each is",
        heading="Noise: the masked states in which a response is scored")
    diffusion_steps: str = arg(3, "T, denoising steps of a trajectory; auto: as score.py --calibrate recommends, R too", metavar="N|auto")
    trajectories: int = arg(3, "R, rotated trajectories per response; 1 + R(T-1) states each cost a forward pass (elbo: R masks at T levels)")
    order: Literal["random", "blocks"] = arg("random", "order of revealing: random, or blocks from left to right and random inside")
    block_length: int = arg(32, "tokens of a block of --order blocks; the sampler's --block_length")
    noise_sets: int = arg(1, "K, draws of noise per pair; epoch e uses draw e mod K")
    noise_seed: int = arg(0, "seed of the noise (not the run's --seed)")


@dataclass
class TrainArguments:
    output_dir: str = arg("runs/default", "folder of the run: log.jsonl, checkpoints/, final/", metavar="FOLDER", heading="Run")
    loss_type: Literal["sigmoid", "ipo", "hinge", "sft"] = arg(
        "sigmoid", "sigmoid: DPO's; ipo; hinge; sft: masked-diffusion NLL of the chosen alone, or of --task sft's responses", heading="Loss")
    beta: float = arg(0.1, "DPO's temperature: the larger, the nearer the policy stays to the reference")
    label_smoothing: float = arg(0.0, "probability that a preference is wrong (conservative DPO), at least 0 and less than 0.5")
    backprop_steps: int = arg(0, "k, states of a response that carry the gradient, unbiased; the others give the score alone, at a third "
                              "of the cost; 0: all")
    sft_weight: float = arg(0.0, "weight of the chosen response's masked-diffusion NLL per token, added to DPO's loss")
    sft_pad_to: int = arg(0, "sft: pad responses to so many tokens with end tokens that count in the loss; 0: to the longest")
    learning_rate: float = arg(5e-7, "peak learning rate", heading="Optimizer")
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = arg("cosine", "after warm-up: down to 0, or constant")
    warmup_ratio: float = arg(0.03, "share of the steps spent warming up, at least 0 and less than 1")
    weight_decay: float = arg(0.0, "AdamW's decoupled weight decay")
    adam_beta1: float = arg(0.9, "AdamW's beta1")
    adam_beta2: float = arg(0.999, "AdamW's beta2")
    max_grad_norm: float = arg(1.0, "clip the gradient's norm here; 0: never")
    num_train_epochs: float = arg(1.0, "passes over the training pairs", heading="Batch and length of the run")
    max_steps: int = arg(-1, "optimizer steps, instead of --num_train_epochs; -1: as many as the epochs have")
    per_device_train_batch_size: int = arg(1, "pairs per rank and micro-step, one after the other (sft: rows, in one forward)")
    gradient_accumulation_steps: int = arg(8, "micro-steps per optimizer step, whose pairs are batch size x this x ranks")
    eval_fraction: float = arg(0.05, "share of the prompts held out", heading="Evaluation, logging, checkpoints")
    eval_steps: int = arg(0, "score the held-out pairs every so many steps, and at the end; 0: only at the end")
    logging_steps: int = arg(1, "print every so many steps (log.jsonl gets every one)")
    report_to: str = arg("tensorboard", "where else the log goes: tensorboard, wandb, both with a comma, or none", metavar="NAME,...")
    run_name: Optional[str] = arg(None, "the run's name in W&B; without it --output_dir", metavar="NAME")
    save_steps: int = arg(0, "write a checkpoint every so many steps; 0: only when told to stop")
    save_total_limit: int = arg(2, "checkpoints kept, the newest; 0: all")
    seed: int = arg(42, "seed of the order of the data and of the held-out split", heading="Run")
    resume_from_checkpoint: Optional[str] = arg(None, "a checkpoint folder, or latest; without it the latest if there is one", metavar="FOLDER")


@dataclass
class CalibrateArguments:
    calibrate: bool = arg(False, "measure the estimators' noise and bias on these pairs and this model, and stop", heading="Calibration")
    calibrate_policy: Optional[str] = arg(None, "trained model to measure margins with; without it weights are moved a little", metavar="MODEL")
    calibrate_pairs: int = arg(8, "pairs to measure on")
    calibrate_draws: int = arg(6, "draws of each estimator for each pair")


@dataclass
class SampleArguments:
    model_name_or_path: Optional[str] = arg(None, "folder or hub name; needed to sample", "--model", metavar="MODEL", heading="Model")
    trust_remote_code: bool = arg(False, REMOTE)
    mask_token_id: Optional[int] = arg(None, MASK)
    end_token_id: Optional[int] = arg(None, "id of a token that ends a response, besides eos; without it the chat template's end of turn")
    shift_logits: Literal["auto", "yes", "no"] = arg("auto", SHIFT)
    use_mixed_precision: Literal["bf16", "no"] = arg("bf16", "bf16: bfloat16 weights; no: float32", heading=FITTING)
    load_in_4bit: bool = arg(False, "keep the blocks' weights in 4 bits on the card (NF4, bitsandbytes), instead of streaming them")
    deepspeed: Optional[str] = arg(None, "ds_config of ZeRO-3, to stream weights from the host; without it all are on the card", metavar="FILE")
    device: str = arg("auto", "auto, cpu, cuda or cuda:N; auto: a GPU if there is one", metavar="NAME")
    template: Literal["auto", "chat", "none"] = arg("auto", "whether prompts get the tokenizer's chat template; auto: if it has one",
                                                    heading="Sampling")
    gen_length: int = arg(64, "most tokens of a response")
    steps: Optional[int] = arg(None, "forward passes per response; without it --gen_length, one for each token")
    block_length: Optional[int] = arg(None, "tokens filled before the next block; without it --gen_length, one block")
    temperature: float = arg(0.0, "temperature of the Gumbel noise; 0: the most likely token")
    cfg_scale: float = arg(0.0, "classifier-free guidance against the response without its prompt; 0: none, twice the cost otherwise")
    remasking: Literal["low_confidence", "random"] = arg("low_confidence", "which predictions stay masked in a pass")
    logits_eos_inf: bool = arg(False, "never predict eos")
    confidence_eos_eot_inf: bool = arg(False, "commit eos and end-of-turn last")
    threshold: Optional[float] = arg(None, "confidence-parallel decoding (an approximation): commit every prediction at least this sure, more "
                                     "than 0 and at most 1; without it --steps says how many")
    batch_size: int = arg(8, "most prompts of one length per forward pass", heading=FITTING)
    seed: int = arg(0, "seed of the sampler's noise", heading="Sampling")


@dataclass
class LikelihoodArguments:
    diffusion_steps: int = arg(4, "T, denoising steps of a trajectory", heading="Likelihoods, for tasks of lm_eval that ask for them")
    trajectories: int = arg(5, "R, rotated trajectories per continuation; 1 + R(T-1) forward passes")
    noise_seed: int = arg(0, "seed of the noise")
    states_per_forward: int = arg(4, "states of one continuation that share a forward pass")
    check_greedy: bool = arg(False, "sample each continuation's length greedily, too, and say whether it is the "
                                    "same: for tasks that count this, such as lambada; else that is never said")


class Parser(HfArgumentParser):
    """argparse, whose complaints become one sentence like every other, and whose --help has headings and is short."""

    place = None  # the heading's group, to which arguments are added

    def add_argument(self, *names, heading=None, **settings):
        """argparse's. Other spellings of a name (--a-b, and --no_a for a truth value) are accepted and not shown."""
        if heading:
            self.place = {group.title: group for group in self._action_groups}.get(heading) or self.add_argument_group(heading)
        action = (self.place or super()).add_argument(*names, **settings)
        action.option_strings = [name for name in names if "-" not in name[2:]]
        if names[0].startswith("--no_"):
            action.help = SUPPRESS
        elif action.default not in (None, SUPPRESS):
            value = action.default
            action.help += f" (default: {str(value).lower() if isinstance(value, bool) else value})"
        if not action.choices and not action.metavar:
            action.metavar = METAVARS.get(action.type)
        return action

    def error(self, message):
        raise InputError(f"{message}; --help lists the arguments")


OR_AUTO = {"diffusion_steps", "states_per_forward"}  # a number, or the word
METAVARS = {int: "N", float: "X", string_to_bool: "true|false"}  # what a value is called
GROUPS = (DataArguments, ModelArguments, NoiseArguments, TrainArguments)


def names(*groups):
    return {item.name for group in groups for item in fields(group)}


def described(doc):
    """What --help makes of a script's docstring: its first line before the arguments; after them its commands, broken before flags."""
    width = shutil.get_terminal_size().columns - 2
    commands = [line.strip() for line in doc.splitlines() if line.startswith(("    python ", "    pip "))]
    folded = [textwrap.wrap(line.replace(" ", "\0").replace("\0--", " --"), width - 6, break_long_words=False, break_on_hyphens=False)
              for line in commands]
    title = "try it in this folder (python is .venv/bin/python; bash launch.sh --setup makes it):"
    return {"description": textwrap.fill(doc.partition("\n")[0], width), "formatter_class": RawDescriptionHelpFormatter,
            "epilog": "\n  ".join([textwrap.fill(title, width), *(" \\\n      ".join(parts).replace("\0", " ") for parts in folded)])}


def parse(argv, doc, *used, hide=()):
    """Parse argv (None: the command line) into one instance per dataclass of `used`, in the order of GROUPS, the script's own last.

    doc: the script's docstring. hide: names that --help leaves out, as the script makes nothing of them. Where one of GROUPS is used,
    the others' arguments are accepted, too.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    accepted = (*GROUPS, *(group for group in used if group not in GROUPS)) if set(used) & set(GROUPS) else used
    parser = Parser(accepted, allow_abbrev=False, usage=SUPPRESS, **described(doc))
    parser.add_argument("--config_file", heading="options", metavar="FILE",
                        help="YAML file of these arguments, lines of 'name: value'; the command line wins over it")
    hidden = names(*set(accepted) - set(used)) | {*hide, "local_rank"}
    for action in parser._actions:
        if action.dest in hidden:
            action.help = SUPPRESS
    paths = [argv[i + 1] for i, word in enumerate(argv[:-1]) if word == "--config_file"]
    paths += [word.split("=", 1)[1] for word in argv if word.startswith("--config_file=")]
    if len(paths) > 1:
        raise InputError(f"--config_file is given {len(paths)} times, expected one file")
    flags = yaml_as_flags(paths[0], accepted) if paths else []
    try:
        read(parser, flags)  # by itself first: what is wrong in the file is said of the file
    except InputError as error:
        raise InputError(f"{paths[0]}: {error}") from None
    return [group for group in read(parser, flags + argv) if isinstance(group, used)]


def read(parser, flags):
    """One instance per dataclass of the parser."""
    *groups, _, unknown = parser.parse_args_into_dataclasses(args=flags, return_remaining_strings=True)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        raise InputError(f"unknown argument {unknown[0]}{nearest(unknown[0], known)}")
    for group in groups:
        for name in OR_AUTO & vars(group).keys():
            setattr(group, name, number_or_auto(name, getattr(group, name)))
    return groups


def check(args):
    """Refuse training arguments without a meaning; not-a-number has none."""
    for name in ("learning_rate", "beta", "per_device_train_batch_size", "gradient_accumulation_steps"):
        if not 0 < getattr(args, name) < math.inf:
            raise InputError(f"--{name} is {getattr(args, name)}, expected more than 0")
    for name in ("sft_weight", "sft_pad_to", "max_grad_norm", "weight_decay"):
        if not 0 <= getattr(args, name) < math.inf:
            raise InputError(f"--{name} is {getattr(args, name)}, expected 0 or more")
    for name, most in (("eval_fraction", 1), ("label_smoothing", 0.5), ("warmup_ratio", 1), ("adam_beta1", 1), ("adam_beta2", 1)):
        if not 0 <= getattr(args, name) < most:
            raise InputError(f"--{name} is {getattr(args, name)}, expected 0 or more and less than {most}")
    if args.max_steps <= 0 and not 0 < args.num_train_epochs < math.inf:
        raise InputError(f"--num_train_epochs is {args.num_train_epochs} and --max_steps {args.max_steps}; expected one of them more than 0")
    if args.label_smoothing and args.loss_type != "sigmoid":
        raise InputError(f"--label_smoothing {args.label_smoothing} belongs to --loss_type sigmoid, not {args.loss_type}")
    if args.sft_weight and args.loss_type == "sft":
        raise InputError(f"--sft_weight {args.sft_weight} adds SFT to a preference loss; leave it out with --loss_type sft")


def flags(names, *groups):
    """The command line that says `names` as `groups` have them; what is as by default is left out."""
    said = []
    for group in groups:
        for item in fields(group):
            value = getattr(group, item.name)
            if item.name in names and str(value) != str(item.default) and value is not None:
                said.append(f"--{item.name} {shlex.quote(str(value))}")
    return " ".join(said)


def number_or_auto(name, value):
    """An argument that is a number or the word auto."""
    if str(value) == "auto":
        return "auto"
    try:
        return int(value)
    except ValueError:
        raise InputError(f"--{name} is {value}, expected a number or auto") from None


def nearest(word, known, otherwise="--help lists them, docs/migrating.md has TRL's names", cutoff=0.72):
    found = difflib.get_close_matches(word, known, 1, cutoff)
    return f"; did you mean {found[0]}?" if found else f"; {otherwise}"


class Loader(yaml.BaseLoader):
    """Every value a string, and no name twice: YAML would take the last without a word."""

    def construct_mapping(self, node, deep=False):
        for name, times in Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)).most_common(1):
            if times > 1:
                raise yaml.constructor.ConstructorError(problem=f"{shown(name)} stands twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def shown(name):
    """A name out of a file, on one line."""
    return name[:80] if name.isprintable() else repr(name[:80])


def yaml_as_flags(path, accepted):
    """The YAML file's entries as flags, word for word: argparse knows their types (YAML would read 5e-6 as a string, no as false)."""
    try:
        with open(path, encoding="utf-8") as file:
            entries = yaml.load(file, Loader)
    except (OSError, yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from None
    if entries in (None, ""):
        return []
    if not isinstance(entries, dict):
        raise InputError(f"{path}: expected lines of 'name: value'")
    known = sorted(names(*accepted))
    flags = []
    for name, value in entries.items():
        if name not in known:
            raise InputError(f"{path}: unknown argument {shown(name)}{nearest(name, known)}")
        if not isinstance(value, str):  # not shown: a few aliases of aliases would fill the screen, and memory
            raise InputError(f"{path}: {name} holds a {'list' if isinstance(value, list) else 'mapping'}, expected one value")
        if any(letter < " " or "\ud800" <= letter < "\ue000" for letter in value):
            raise InputError(f"{path}: {name} is {shown(value)}, expected one line of text")
        if value not in ("", "null", "~"):
            flags.append(f"--{name}={value}")
    return flags


def run(main):
    """Call a script's main() and exit: 2 and one sentence for a user's error, 130 when Ctrl-C stopped it."""
    try:
        code = main()
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # all is written: torch's threads now and then abort in their destructors,
            sys.stdout.flush()                        # ("terminate called without an active exception"), which looks like a failure
            sys.stderr.flush()
            os._exit(code or 0)
        sys.exit(code)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr, flush=True)
        sys.exit(130)
    except Exception as error:
        if no_room(error):
            error = without_room(error)
        elif not isinstance(error, InputError):
            raise
        rank = os.environ.get("RANK", "0")
        if rank == "0" or error.local:
            print(f"error: {error}" if rank == "0" else f"error (rank {rank}): {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def without_room(error):
    """The sentence of a write that failed for want of room."""
    name = getattr(error, "filename", None) or "a file"  # of a writer that is not within naming()
    return InputError(f"{name}: cannot be written ({why(error)}); what was finished before is whole; make room, and go on with: {command()}",
                      local=True)


def command():
    """The command line that started this process, or the launch.sh that did."""
    return os.environ.get("LAUNCH_COMMAND", "").strip() or shlex.join(["python", *sys.argv])

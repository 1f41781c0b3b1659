"""Does the run fit, and how long does it take? Memory of card and host, and seconds per pair. No weights are read.

    the arguments of train_dpo.py + config.json -> a table and a verdict; exit code 0 if it fits, 1 if not
    python plan.py --model_name_or_path examples/tiny --deepspeed ds_configs/zero3_offload_4080.json
    python plan.py --config_file configs/llada_8b_lora_4080.yaml --gpu_gib 16 --host_gib 64 --pairs 800
    python plan.py --for evaluate --model examples/tiny --tasks arithmetic --limit 200 --gen_length 40 --block_length 8

The formulas are in training/: memory in footprint.py and activations.py, operations and transfers in costs.py, what to
change in advice.py. bench/activations.py compares the memory with torch's on fake tensors, bench/planned.py with a run.
Here all is added up and judged. The host's memory is for all ranks. For a model on the Hub only config.json is
downloaded. train_dpo.py prints the verdict when it starts.
"""

import bisect
import math
import os
import sys
from dataclasses import replace
from typing import NamedTuple

import config
from cli import exits
from cli.parser import names
from files import InputError
from reasoning import arguments, protocols, tasks
from training.plan_arguments import (
    PURPOSES,
    MachineArguments,
    PlanArguments,
    SamplingPlanArguments,
    check_machine,
    check_sampled,
    items,
)

USED_DATA = {"max_length"}
USED_TRAINING = {
    "loss_type",
    "loss_weights",
    "backprop_steps",
    "sft_weight",
    "sft_pad_to",
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "eval_fraction",
    "eval_steps",
}
UNUSED = {"mask_token_id", "end_token_id", "lora_alpha", "block_length", "noise_seed", "ld_alpha"}
UNUSED |= names(config.DataArguments) - USED_DATA
UNUSED |= names(config.TrainArguments) - USED_TRAINING  # they change no memory and no time


def purpose_of(argv):
    """The value of --for, before anything else of a command line is read."""
    words = sys.argv[1:] if argv is None else argv
    values = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "--for"]
    values += [word.removeprefix("--for=") for word in words if word.startswith("--for=")]
    return values[0] if values else "train"


def read_arguments(argv=None):
    """One instance of each of config.GROUPS, MachineArguments and PlanArguments, checked.

    With --for evaluate or make_prefs: of that command's own arguments, config.SampleArguments, MachineArguments and
    SamplingPlanArguments.
    """
    if (purpose := purpose_of(argv)) in PURPOSES[1:]:
        return read_sampling(argv, purpose)
    groups = config.parse(argv, __doc__, *config.GROUPS, MachineArguments, PlanArguments, hide=UNUSED)
    data_args, model_args, noise_args, train_args, machine_args, own = groups
    check_machine(machine_args)
    for name in ("pairs", "prompt_tokens", "response_tokens"):
        if getattr(own, name) < 0:
            raise InputError(f"--{name} is {getattr(own, name)}, expected 0 or more")
    if data_args.max_length < 1:
        raise InputError(f"--max_length is {data_args.max_length}, expected at least 1")
    if own.prompt_tokens + max(1, own.response_tokens) > data_args.max_length:
        raise InputError(
            f"--prompt_tokens {own.prompt_tokens} and --response_tokens {own.response_tokens}: longer than "
            f"--max_length {data_args.max_length}, above which rows are left out"
        )
    config.check_scoring(model_args, noise_args)
    config.check(train_args)
    return groups


def read_sampling(argv, purpose):
    """(the command's own arguments, SampleArguments, MachineArguments, SamplingPlanArguments), checked as it would."""
    read = read_evaluation if purpose == "evaluate" else read_preferences
    groups, count, example_tokens = read(argv, (config.SampleArguments, MachineArguments, SamplingPlanArguments))
    _, sample, machine_args, own = groups
    arguments.check_values(sample)
    check_machine(machine_args)
    own.problems = own.problems if own.problems is not None else count
    check_sampled(own, sample.gen_length, example_tokens)
    return groups


def read_evaluation(argv, used):
    """(groups of read_sampling(), number of problems if it is known, tokens of a protocol's examples)."""
    import evaluate

    used = evaluate.EvaluateArguments, *used, config.LikelihoodArguments
    args, sample, machine_args, own, _ = config.parse(argv, __doc__, *used)
    evaluate.check_tasks(args)
    evaluate.check_samples(args, sample)
    files = evaluate.own_files(args)
    names = [*evaluate.task_names(args), *files]
    known = {name: len(evaluate.read_own(path, args)) for name, path in files.items()}
    if args.limit is None:  # d1's files have numbers of their own
        known |= dict.fromkeys(tasks.EMBEDDED if args.data_dir else tasks.FAMILIES, evaluate.EMBEDDED)
    example_tokens = 0
    if setting := protocols.setting(args.protocol, names[0]):
        if len(names) > 1:
            raise InputError(
                f"--protocol {args.protocol} has settings for each task; plan one at a time: --tasks {names[0]}"
            )
        _, sample, *_ = config.parse(argv, __doc__, *used, below=protocols.flags(setting))
        protocols.fill_in(sample, setting)
        example_tokens = setting.example_tokens
    return (args, sample, machine_args, own), items(names, args.limit, known), example_tokens


def read_preferences(argv, used):
    """As read_evaluation(), of make_prefs.py."""
    import make_prefs

    groups = config.parse(argv, __doc__, make_prefs.PreferenceArguments, *used)
    args, sample, *_ = groups
    if args.strategy != "sample":
        raise InputError(f"--strategy {args.strategy} samples nothing: there is nothing to plan, run make_prefs.py")
    make_prefs.check(args, sample)
    return groups, args.num if args.task else len(make_prefs.read_problems(args, make_prefs.problems.NAMES)), 0


if __name__ == "__main__":
    exits.early(read_arguments)  # answers --help and mistakes before the imports below, which take seconds

import torch

from models import architecture, families, folders, quantized
from reasoning import comparison, planning
from scoring import noise
from training import deepspeed_config, memory
from training.advice import stuck, tries
from training.costs import Cost, Lengths, Work, scoring_cost, training_cost, work_of
from training.footprint import Machine, card_items, disk_items, graph_items, host_items
from training.plan_table import hours, judged, ssd_lines, table
from training.shapes import Shape, model_shape

GIB = 2**30


class Plan(NamedTuple):
    items: list
    machine: Machine
    shape: Shape
    work: Work
    training: Cost
    scoring: Cost
    fits: bool
    verdict: str

    @property
    def parameters(self):
        return self.shape.parameters

    @property
    def trainable(self):
        return sum(self.shape.trained)

    @property
    def seconds(self):
        """Per training pair and rank."""
        return self.training.seconds(self.machine)

    def total(self, place):
        """Bytes on the card, or on the host."""
        return total(self.items, place)


def total(items, *places):
    """Bytes of the items at `places`: card, host."""
    return sum(item.size for item in items if item.place in places)


def plan(model_config, data_args, model_args, noise_args, train_args, ds, machine, lengths=None, advise=True):
    """The Plan of a run.

    ds: as read_ds_config() gives it. lengths: of every row; None: all have the longest, which is scored whole. advise:
    if the run does not fit, look for what to change.
    """
    # 1. What does not depend on the tokens per forward pass
    shape = model_shape(model_config, model_args)
    fixed = card_items(shape, ds, model_args, machine)
    room = memory.ROOM * (machine.gpu_gib * GIB - total(fixed, "card"))

    # 2. The tokens per forward pass, and what one graph then holds
    noise.settle(noise_args, shape.blocks is not None)
    diffusion_steps = noise_args.diffusion_steps
    if diffusion_steps == "auto":  # not yet calibrated; main says so
        estimator = noise.chosen_estimator(noise_args, shape.blocks is not None)
        diffusion_steps, _ = noise.default_size(estimator, shape.blocks is not None)
    longest = Lengths(0, data_args.max_length + train_args.sft_pad_to)
    work = work_of(lengths or longest, noise_args, train_args, diffusion_steps, shape.blocks)

    def items_of(graph):
        return graph_items(shape, graph, ds, model_args, machine)

    tokens = model_args.tokens_per_forward
    if tokens == "auto":
        tokens = most_that_fit(work, items_of, room)
    work = work._replace(tokens_per_forward=tokens)
    items = fixed + items_of(work.largest_graph) + host_items(shape, ds, model_args, machine)

    # 3. Does it fit?
    fits, verdict = judged(items, machine)
    if not fits and advise:
        groups = data_args, model_args, noise_args, train_args
        verdict += "; " + advice(model_config, groups, ds, machine, work)
    return Plan(
        items=items,
        machine=machine,
        shape=shape,
        work=work,
        training=training_cost(shape, work, ds, model_args, machine),
        scoring=scoring_cost(shape, work, ds, model_args, machine),
        fits=fits,
        verdict=verdict,
    )


def most_that_fit(work, items_of, room):
    """--tokens_per_forward auto: the most tokens whose graph takes less than `room` bytes, at least the longest row.

    items_of(graph): the [Item] of an activations.Graph.
    """
    choices = range(work.least_tokens, work.most_tokens + 1)

    def size(tokens):
        return total(items_of(work.graph_of(tokens)), "card")

    return choices[max(0, bisect.bisect_left(choices, room, key=size) - 1)]


# --- advice -----------------------------------------------------------------------------------------------


def advice(model_config, groups, ds, machine, work):
    """The first change with which the run fits, in words; else what the machine lacks."""
    (data_args, model_args, *others), least = groups, None
    for each in tries(model_args, work.least_tokens, ds, machine):
        args = replace(model_args, **each.values)
        found = plan(model_config, data_args, args, *others, each.ds, machine, work.lengths, advise=False)
        if found.fits:
            return f"it fits with {each.words(model_args)}"
        if least is None or total(found.items, "card", "host") < total(least.items, "card", "host"):
            least = found
    card, host = (math.ceil(least.total(place) / GIB) for place in ("card", "host"))
    return (
        f"nothing in ds_configs/ makes it fit; the least found needs a card of {card} GiB and {host} GiB of host "
        "memory; try a shorter --max_length, a smaller model, or a larger machine"
    )


# --- a run's start ----------------------------------------------------------------------------------------


def at_start(groups, ds, ranks):
    """Lines for a run's start, about this machine. groups: the arguments of config.GROUPS; ranks: engine.Ranks."""
    _, model_args, _, train_args = groups
    model_config = architecture.load_config(model_args.model_name_or_path, model_args.trust_remote_code)
    if model_args.trust_remote_code and model_config.model_type not in families.KNOWN:
        return "plan: none, for the model brings its own code"
    cuda = ranks.device.type == "cuda"
    machine = Machine(
        gpu_gib=usable_gib(ranks.device) if cuda else math.inf,
        host_gib=memory.host_bytes() / GIB,
        ranks=int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world)),
        one_memory=not cuda,
        rounded="pinned_max_cached_size_mb" not in os.environ.get("PYTORCH_ALLOC_CONF", ""),
    )
    lines = [f"plan: {plan(model_config, *groups, ds, machine, advise=cuda).verdict}"]
    if words := stuck(ds, train_args.learning_rate):
        lines.append(f"warning: {words}")
    return "\n".join(lines)


def usable_gib(device):
    """The part of a card's memory that this process may take."""
    memory_of_card = torch.cuda.get_device_properties(device).total_memory
    return torch.cuda.get_per_process_memory_fraction(device) * memory_of_card / GIB


# --- the command ------------------------------------------------------------------------------------------


def config_folder(name):
    """A local folder as it is; of a model on the Hub the folder of its config.json, which alone is downloaded."""
    if name and not os.path.exists(name) and name.count("/") == 1 and not name.startswith((".", "/", "~")):
        from huggingface_hub import hf_hub_download

        failed = f"{name} is not a local folder and its config.json could not be downloaded from the Hub"
        with folders.downloading(failed):
            return os.path.dirname(hf_hub_download(name, "config.json"))
    return name


def machine_of(args):
    """The Machine of MachineArguments; what they leave open is this machine's, or a card of 16 GiB where is none."""
    card = torch.cuda.get_device_properties(0).total_memory / GIB if torch.cuda.is_available() else 16.0
    return Machine(
        gpu_gib=args.gpu_gib or card,
        host_gib=args.host_gib or memory.host_bytes() / GIB,
        tflops=args.tflops,
        pcie_gbs=args.pcie_gbs,
        ssd_gbs=args.ssd_gbs,
        ranks=args.ranks,
        rounded=torch.__version__ < "2.13",  # from there on launch.sh can tell torch not to
    )


def plan_sampling(args, sample, machine_args, own):
    """--for evaluate or make_prefs. Returns the exit code."""
    machine, ds = machine_of(machine_args), deepspeed_config.read_for_sampling(sample.deepspeed)
    sample.model_name_or_path = config_folder(sample.model_name_or_path)
    sample.device = "cpu"  # which every machine has; the plan is for a card
    arguments.check(sample)
    sample.device = "cuda"
    model_config = architecture.load_config(sample.model_name_or_path, sample.trust_remote_code)
    sampled = planning.Sampled(
        problems=own.problems,
        k=args.k,
        models=1 + len(getattr(args, "compare", None) or []),
        prompt_tokens=own.prompt_tokens,
        longest_prompt=own.longest_prompt,
        response_tokens=own.response_tokens,
        tokens_per_pass=own.tokens_per_pass,
    )
    lines, fits = planning.lines(model_config, sample, ds, machine, sampled)
    if machine_args.purpose == "evaluate":
        lines.insert(-1, comparison.gain_line_of_share(own.problems, own.changed))
    print("\n".join(lines), flush=True)
    return 0 if fits else 1


def main(argv=None):
    # 1. What is to be planned
    groups = read_arguments(argv)
    if purpose_of(argv) != "train":
        return plan_sampling(*groups)
    data_args, model_args, noise_args, train_args, machine_args, own = groups
    machine = machine_of(machine_args)
    folder = config_folder(model_args.model_name_or_path)
    model_config = architecture.load_config(folder, model_args.trust_remote_code)
    ds = deepspeed_config.read_ds_config(model_args.deepspeed)
    quantized.check(model_args, ds)

    # 2. The plan
    lengths = None
    if own.prompt_tokens or own.response_tokens:
        lengths = Lengths(own.prompt_tokens, own.response_tokens or data_args.max_length - own.prompt_tokens)
    made = plan(model_config, data_args, model_args, noise_args, train_args, ds, machine, lengths)

    # 3. What to know of it
    if noise_args.diffusion_steps == "auto":
        print("--diffusion_steps auto: planned with the default, before its calibration")
    print(table(made, families.attention_line(model_config, model_args.block_size)))
    states = disk_items(made.shape, ds, model_args)
    if states:
        print(ssd_lines(states, machine.ssd_gbs))
    if own.pairs:
        print(hours(made, own.pairs, train_args, noise_args.noise_sets))
    if words := stuck(ds, train_args.learning_rate):
        print(f"warning: {words}")
    print(made.verdict, flush=True)
    return 0 if made.fits else 1


if __name__ == "__main__":
    exits.run(main)

"""Does the run fit, and how long does it take? Memory of card and host, and seconds per pair. No weights are read.

    the arguments of train_dpo.py + config.json -> a table and a verdict; exit code 0 if it fits, 1 if not
    python plan.py --model_name_or_path examples/tiny --deepspeed ds_configs/zero3_offload_4080.json
    python plan.py --config_file configs/llada_8b_lora_4080.yaml --gpu_gib 16 --host_gib 64 --pairs 800

The formulas are in training/: memory in footprint.py and activations.py, operations and transfers in costs.py, what to
change in advice.py. bench/activations.py compares the memory with torch's on fake tensors, bench/planned.py with a run.
Here all is added up and judged. The host's memory is for all ranks. For a model on the Hub only config.json is
downloaded. train_dpo.py prints the verdict when it starts.
"""

import bisect
import math
import os
from dataclasses import dataclass, replace
from typing import NamedTuple

import config
from cli import exits
from cli.parser import arg, names
from files import InputError

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


@dataclass
class PlanArguments:
    gpu_gib: float = arg(
        0, "the card's memory in GiB; 0: this machine's card, or 16 where there is none", heading="Machine"
    )
    host_gib: float = arg(0, "the host's memory in GiB; 0: this machine's, or what a container or job may use of it")
    tflops: float = arg(
        49,
        "what the card does, 1e12 operations a second; 49 is half of an RTX 4080's peak of 97.5 in "
        "bf16 with float32 sums (NVIDIA Ada GPU Architecture, appendix A), a planning number",
    )
    pcie_gbs: float = arg(25, "the bus's rate in 1e9 bytes a second; 25 is about what PCIe 4.0 x16 gives of 31.5")
    ssd_gbs: float = arg(
        2,
        "the SSD's rate in 1e9 bytes a second, reads and writes together, for optimizer states on it; 2 is a planning "
        "number: consumer drives write 1 to 2 when their cache is full",
    )
    ranks: int = arg(1, "cards, all in this host")
    prompt_tokens: int = arg(0, "tokens of every prompt", heading="Rows")
    response_tokens: int = arg(
        0, "tokens of every response; 0: so many that a prompt and its response have --max_length"
    )
    pairs: int = arg(
        0, "also plan the hours of reference scores and of training for so many pairs (sft: rows); 0: none"
    )


def read_arguments(argv=None):
    """One instance of each of config.GROUPS and PlanArguments, checked."""
    groups = config.parse(argv, __doc__, *config.GROUPS, PlanArguments, hide=UNUSED)
    data_args, model_args, noise_args, train_args, own = groups
    for name, least in (
        ("gpu_gib", 0),
        ("host_gib", 0),
        ("tflops", 1e-9),
        ("pcie_gbs", 1e-9),
        ("ssd_gbs", 1e-9),
        ("ranks", 1),
    ):
        if not least <= getattr(own, name) < math.inf:
            wanted = {"ranks": "1 or more", "gpu_gib": "0 or more", "host_gib": "0 or more"}.get(name, "more than 0")
            raise InputError(f"--{name} is {getattr(own, name)}, expected {wanted}")
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


if __name__ == "__main__":
    exits.early(read_arguments)  # answers --help and mistakes before the imports below, which take seconds

import torch

from models import architecture, families, folders, quantized
from scoring import noise
from training import deepspeed_config, memory
from training.advice import stuck, tries
from training.costs import Cost, Lengths, Work, scoring_cost, training_cost, work_of
from training.footprint import Machine, card_items, disk_items, graph_items, host_items
from training.plan_table import hours, ssd_lines, table
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
        diffusion_steps, _ = noise.STATES[shape.blocks is not None]
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
    fits, verdict = judged(total(items, "card") / GIB, total(items, "host") / GIB, machine)
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


def judged(card, host, machine):
    """(whether it fits, the verdict in words) of a run that needs so many GiB."""
    needs = [("card", card, machine.gpu_gib), ("host", host, machine.host_gib)]
    if machine.one_memory:
        needs = [("host", card + host, machine.host_gib)]
    missing = [f"the {place} needs {need:.1f} GiB and has {have:.1f}" for place, need, have in needs if need > have]
    if missing:
        return False, "DOES NOT FIT: " + ", ".join(missing)
    return True, "FITS: " + ", ".join(f"{place} {need:.1f} of {have:.1f} GiB" for place, need, have in needs)


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


def read_config(name, trust_remote_code):
    """The config of a local folder, or of a model on the Hub, of which config.json alone is downloaded."""
    if name and not os.path.exists(name) and name.count("/") == 1 and not name.startswith((".", "/", "~")):
        from huggingface_hub import hf_hub_download

        failed = f"{name} is not a local folder and its config.json could not be downloaded from the Hub"
        with folders.downloading(failed):
            name = os.path.dirname(hf_hub_download(name, "config.json"))
    return architecture.load_config(name, trust_remote_code)


def machine_of(own):
    """The Machine of PlanArguments; what they leave open is this machine's, or a card of 16 GiB where there is none."""
    card = torch.cuda.get_device_properties(0).total_memory / GIB if torch.cuda.is_available() else 16.0
    return Machine(
        gpu_gib=own.gpu_gib or card,
        host_gib=own.host_gib or memory.host_bytes() / GIB,
        tflops=own.tflops,
        pcie_gbs=own.pcie_gbs,
        ssd_gbs=own.ssd_gbs,
        ranks=own.ranks,
        rounded=torch.__version__ < "2.13",  # from there on launch.sh can tell torch not to
    )


def main(argv=None):
    # 1. What is to be planned
    data_args, model_args, noise_args, train_args, own = read_arguments(argv)
    machine = machine_of(own)
    model_config = read_config(model_args.model_name_or_path, model_args.trust_remote_code)
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

"""Does the run fit, and how long does a pair take: memory of card and host by item, bus, arithmetic. No weights are read.

    the arguments of train_dpo.py + config.json -> a table and a verdict; exit code 0 if it fits, 1 if not
    python plan.py --model_name_or_path examples/tiny --deepspeed ds_configs/zero3_offload_4080.json
    python plan.py --config_file configs/llada_8b_lora_4080.yaml --gpu_gib 16 --host_gib 64

What each item weighs is in footprint.py; here it is added up, timed and judged. The host's bytes are of all ranks. Of a model of
the hub config.json alone is fetched. train_dpo.py prints the verdict when it starts.

L length, D width, S states; rows: sequences in one graph; e: bytes of a weight, 2 in bf16.
"""

import copy
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import config
from cli import exits
from cli.parser import arg, names
from files import InputError

UNUSED = (
    names(config.DataArguments) - {"max_length"}
    | {"mask_token_id", "end_token_id", "lora_alpha", "order", "block_length", "noise_sets", "noise_seed"}
    | names(config.TrainArguments)
    - {
        "loss_type",
        "backprop_steps",
        "sft_weight",
        "sft_pad_to",
        "learning_rate",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
    }
)  # by this script: they change no memory and no time


@dataclass
class PlanArguments:
    gpu_gib: float = arg(
        0, "the card's memory in GiB; 0: this machine's card, or 16 where there is none", heading="Machine"
    )
    host_gib: float = arg(0, "the host's memory in GiB; 0: this machine's")
    tflops: float = arg(
        49,
        "what the card does, 1e12 operations a second; 49 is half of an RTX 4080's peak of 97.5 in "
        "bf16 with float32 sums (NVIDIA Ada GPU Architecture, appendix A), a planning number",
    )
    pcie_gbs: float = arg(25, "the bus's rate in 1e9 bytes a second; 25 is about what PCIe 4.0 x16 gives of 31.5")
    ranks: int = arg(1, "cards, all in this host")


def read_arguments(argv=None):
    """One instance of each of config.GROUPS and PlanArguments, checked."""
    groups = config.parse(argv, __doc__, *config.GROUPS, PlanArguments, hide=UNUSED)
    data_args, model_args, noise_args, train_args, own = groups
    for name, least in (("gpu_gib", 0), ("host_gib", 0), ("tflops", 1e-9), ("pcie_gbs", 1e-9), ("ranks", 1)):
        if not least <= getattr(own, name) < math.inf:
            wanted = "1 or more" if name == "ranks" else "a positive number"
            raise InputError(f"--{name} is {getattr(own, name)}, expected {wanted}")
    if data_args.max_length < 1:
        raise InputError(f"--max_length is {data_args.max_length}, expected at least 1")
    config.check_scoring(model_args, noise_args)
    config.check(train_args)
    return groups


if __name__ == "__main__":
    exits.early(read_arguments)  # answers --help and mistakes before the imports below, which take seconds

import torch

from models import architecture, families, quantized
from scoring import noise, objective
from scoring.states import backward_passes, sizes
from training import deepspeed_config, memory
from training.footprint import Item, Machine, activations, card_items, host_items, logits, offload, shape, states

DS_CONFIGS = Path(__file__).parent / "ds_configs"
AUTO_STEPS = config.NoiseArguments.diffusion_steps  # T for --diffusion_steps auto, not yet calibrated; main says so


class Plan(NamedTuple):
    items: list
    machine: Machine
    parameters: int
    trainable: int
    states_per_forward: int
    bus: float  # bytes per optimizer step and rank
    flops: float  # per pair
    seconds: float  # per pair and rank
    fits: bool
    verdict: str

    def total(self, place):
        """Bytes."""
        return sum(item.size for item in self.items if item.place == place)


def work(noise_args, train_args):
    """(states of each response, those with a gradient): of a pair, or of a batch under loss_type sft."""
    if train_args.loss_type == "sft":
        rows = train_args.per_device_train_batch_size
        return [rows], [rows]
    steps = noise_args.diffusion_steps if noise_args.diffusion_steps != "auto" else AUTO_STEPS
    return objective.counts(train_args, noise.state_count(noise_args.estimator, steps, noise_args.trajectories))


def rows(counts, carrying, size):
    """Sequences in one graph."""
    return sum(counts) if backward_passes(counts, carrying, size) == 1 else min(size, max(carrying))


def costs(shape, counts, carrying, size, length, ds, model_args, train_args):
    """(bytes over the bus per optimizer step, FLOPs per pair). At most: every sequence has `length` tokens, all scored,
    and ZeRO-3 fetches every parameter for every pass. Matrices: 2 operations an element and token, twice that backward;
    attention 4 L D a token and layer."""
    joint = backward_passes(counts, carrying, size) == 1
    segments = lambda parts: sum(math.ceil(part / size) for part in parts)  # noqa: E731
    plain, graph = 0 if joint else sum(counts), sum(carrying)
    body = length * (2 * shape.linear + shape.layers * 4 * length * shape.width)
    lora, again = bool(shape.frozen), int(model_args.gradient_checkpointing)
    back = (1 if lora else 2) + again
    flops = plain * (body + 2 * length * shape.head) + graph * (
        body * (1 + back) + 2 * length * shape.head * (3 if lora else 4)
    )
    s, zero, trained = states(ds, model_args), ds["zero_optimization"], sum(shape.trained)
    batch = 1 if train_args.loss_type == "sft" else train_args.per_device_train_batch_size
    pairs = batch * train_args.gradient_accumulation_steps
    backwards = train_args.gradient_accumulation_steps * batch * backward_passes(counts, carrying, size)
    bus = 0
    if zero["stage"] == 3 and offload(ds, "offload_param")[0]:
        bus += (
            s.weight
            * (trained + sum(shape.frozen))
            * pairs
            * ((0 if joint else segments(counts)) + 2 * segments(carrying))
        )
    if (
        zero["stage"] and offload(ds, "offload_optimizer")[0]
    ):  # sums go up and down; then the gradient, then the weights
        back_up = 0 if offload(ds, "offload_param")[0] else s.weight
        bus += trained * (s.weight * (2 * backwards - 1) + s.gradient + back_up)
    return bus, flops / (counts[0] if train_args.loss_type == "sft" else 1)


def plan(model_config, data_args, model_args, noise_args, train_args, ds, machine, advise=True):
    """The Plan of a run. ds: as engine.read_ds_config gives it. advise: look for what to change if it does not fit."""
    sized, e = shape(model_config, model_args), states(ds, model_args).weight
    counts, carrying = work(noise_args, train_args)
    length = data_args.max_length + (
        train_args.sft_pad_to if train_args.loss_type == "sft" else 0
    )  # at most: a prompt, padded
    fixed = card_items(sized, ds, model_args, machine)
    room = machine.gpu_gib * 2**30 - sum(item.size for item in fixed)
    graph = lambda size: (  # noqa: E731
        activations(sized, rows(counts, carrying, size), length, e, model_args.gradient_checkpointing),
        logits(sized, rows(counts, carrying, size), length, e),
    )
    size = counts[0] if train_args.loss_type == "sft" else model_args.states_per_forward
    if size == "auto":
        size = max([1] + [some for some in sizes(counts[0]) if sum(graph(some)) < memory.ROOM * room])
    held, words = graph(size)
    items = (
        fixed
        + [
            Item("card", f"activations of {rows(counts, carrying, size)} x {length} tokens", held),
            Item("card", "logits", words),
        ]
        + host_items(sized, ds, model_args, machine)
    )
    bus, flops = costs(sized, counts, carrying, size, length, ds, model_args, train_args)
    pairs = train_args.per_device_train_batch_size * train_args.gradient_accumulation_steps
    made = Plan(
        items,
        machine,
        sum(sized.frozen or sized.trained),
        sum(sized.trained),
        size,
        bus,
        flops,
        max(flops / (machine.tflops * 1e12), bus / pairs / (machine.pcie_gbs * 1e9)),
        True,
        "",
    )
    card, host = (made.total(place) / 2**30 for place in ("card", "host"))
    wanted = (
        [("host", card + host, machine.host_gib)]
        if machine.one_memory
        else [("card", card, machine.gpu_gib), ("host", host, machine.host_gib)]
    )
    over = [f"the {place} needs {need:.1f} GiB and has {have:.1f}" for place, need, have in wanted if need > have]
    if not over:
        return made._replace(
            verdict="FITS: " + ", ".join(f"{place} {need:.1f} of {have:.1f} GiB" for place, need, have in wanted)
        )
    verdict = "DOES NOT FIT: " + ", ".join(over)
    if advise:
        verdict += "; " + advice(made, model_config, data_args, model_args, noise_args, train_args, ds)
    return made._replace(fits=False, verdict=verdict)


def advice(made, model_config, data_args, model_args, noise_args, train_args, ds):
    """The first change, or two, with which it fits; else what the machine lacks. Full training before LoRA, LoRA before 4 bits, and
    bf16 states last: see stuck()."""
    files = [
        (f"ds_configs/{path.name}", deepspeed_config.read_ds_config(path))
        for path in sorted(DS_CONFIGS.glob("*_offload*.json"))
    ]
    files = [
        (name, other)
        for name, other in files
        if not (model_args.load_in_4bit and other["zero_optimization"]["stage"] == 3)
    ]
    whole, low = ([(name, other) for name, other in files if bool(stuck(other, 1)) == each] for each in (False, True))
    small, modest = changed(model_args, states_per_forward=1, gradient_checkpointing=True), "--states_per_forward 1"
    if not model_args.gradient_checkpointing:
        modest += " --gradient_checkpointing true"
    tries = [(modest, small, ds)]
    tries += [
        (f"--deepspeed {name}{more}", args, other)
        for args, more in ((model_args, ""), (small, f" {modest}"))
        for name, other in whole
    ]
    if made.machine.rounded:
        unlocked = lambda other: json.loads(json.dumps(other).replace('"pin_memory": true', '"pin_memory": false'))  # noqa: E731
        tries += [
            (f"a copy of {name} with pin_memory false{more}", args, unlocked(other))
            for args, more in ((model_args, ""), (small, f" and {modest}"))
            for name, other in whole
        ]
    r, free = model_args.lora_r or 16, changed(model_args, states_per_forward="auto", gradient_checkpointing=True)
    modest = "" if model_args.gradient_checkpointing else " --gradient_checkpointing true"
    said = "" if model_args.states_per_forward == "auto" else " --states_per_forward auto"
    ways = [
        (changed(args, lora_r=r, use_mixed_precision=kind), words + more)
        for args, more in ((free, said + modest), (small, f" --states_per_forward 1{modest}"))
        for kind, words in ((args.use_mixed_precision, ""), ("bf16", " --use_mixed_precision bf16"))
    ]
    tries += [(f"--lora_r {r} --deepspeed {name}{words}", args, other) for args, words in ways for name, other in whole]
    tries += [
        (
            f"--lora_r {r} --load_in_4bit true --deepspeed ds_configs/zero0.json{words}",
            changed(args, load_in_4bit=True),
            deepspeed_config.read_ds_config(DS_CONFIGS / "zero0.json"),
        )
        for args, words in ways
    ]
    tries += [(f"--deepspeed {name} --states_per_forward 1{modest}", small, other) for name, other in low]
    least = made
    for words, args, other in tries:
        found = plan(model_config, data_args, args, noise_args, train_args, other, made.machine, advise=False)
        if found.fits:
            return f"it fits with {words}"
        least = min(least, found, key=lambda each: each.total("card") + each.total("host"))
    card, host = (math.ceil(least.total(place) / 2**30) for place in ("card", "host"))
    return (
        f"nothing in ds_configs/ makes it fit; the least found needs a card of {card} GiB and {host} GiB of host memory: "
        "a shorter --max_length, a smaller model, or a larger machine"
    )


def changed(args, **values):
    args = copy.copy(args)
    vars(args).update(values)
    return args


def stuck(ds, learning_rate):
    """What to know of master weights in bf16, or "". AdamW moves a weight by about the learning rate; bf16's 8 bits round that away
    where their spacing is more than twice as large."""
    if not ds.get("bf16", {}).get("bf16_master_weights_and_grads"):
        return ""
    return (
        f"master weights in bf16 round a step of {learning_rate:g} away on every weight above {256 * learning_rate:.2g}, nearly all "
        "at DPO's learning rates; LoRA, or float32 masters (ds_configs/zero3_offload_4080.json), learn there"
    )


def at_start(groups, ds, ranks):
    """Lines for a run's start, of this machine. groups: config.GROUPS' arguments; ranks: engine.Ranks."""
    cuda, here = ranks.device.type == "cuda", int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world))
    card = torch.cuda.get_device_properties(ranks.device).total_memory / 2**30 if cuda else math.inf
    share = torch.cuda.get_per_process_memory_fraction(ranks.device) if cuda else 1
    machine = Machine(
        share * card,
        memory_total(),
        ranks=here,
        one_memory=not cuda,
        rounded="pinned_max_cached_size_mb" not in os.environ.get("PYTORCH_ALLOC_CONF", ""),
    )
    model_config = architecture.load_config(groups[1].model_name_or_path, groups[1].trust_remote_code)
    if groups[1].trust_remote_code and model_config.model_type not in families.KNOWN:
        return "plan: none, for the model brings its own code"
    lines = [f"plan: {plan(model_config, *groups, ds, machine, advise=cuda).verdict}"]
    return "\n".join(lines + [f"warning: {words}" for words in [stuck(ds, groups[3].learning_rate)] if words])


def read_config(name, trust_remote_code):
    """The config of a local folder, or of a model of the hub, of which config.json alone is downloaded."""
    if name and not os.path.exists(name) and name.count("/") == 1 and not name.startswith((".", "/", "~")):
        from huggingface_hub import hf_hub_download

        try:
            name = os.path.dirname(hf_hub_download(name, "config.json"))
        except Exception as error:  # the hub's client raises dozens of kinds
            raise InputError(
                f"{name}: its config.json is neither in a local folder nor to be had from the hub "
                f"({type(error).__name__}); put it in a folder and give --model_name_or_path FOLDER"
            ) from None
    return architecture.load_config(name, trust_remote_code)


def table(plan):
    """What main prints."""
    lines = []
    for place, have in (("card", plan.machine.gpu_gib), ("host", plan.machine.host_gib)):
        lines += [f"{place:62}   GiB"]
        lines += [f"  {item.name:58}{item.size / 2**30:8.2f}" for item in plan.items if item.place == place]
        lines += [f"  {'in all, of ' + format(have, '.1f'):58}{plan.total(place) / 2**30:8.2f}"]
    return "\n".join(
        lines
        + [
            f"{plan.parameters:,} parameters, {plan.trainable:,} trained; {plan.states_per_forward} states a forward",
            f"at most {plan.bus / 1e9:.1f} GB over the bus an optimizer step and rank, {plan.flops / 1e12:.1f} TFLOP a pair",
            f"planned: {plan.seconds:.1f} s a pair of the longest length, the slower of {plan.machine.tflops:g} TFLOP/s and "
            f"{plan.machine.pcie_gbs:g} GB/s",
        ]
    )


def memory_total():
    """GiB of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


def main(argv=None):
    data_args, model_args, noise_args, train_args, own = read_arguments(argv)
    here = torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 16.0
    machine = Machine(
        own.gpu_gib or here,
        own.host_gib or memory_total(),
        own.tflops,
        own.pcie_gbs,
        own.ranks,
        rounded=torch.__version__ < "2.13",
    )  # from there on launch.sh can tell torch not to
    model_config = read_config(model_args.model_name_or_path, model_args.trust_remote_code)
    ds = deepspeed_config.read_ds_config(model_args.deepspeed)
    quantized.check(model_args, ds)
    made = plan(model_config, data_args, model_args, noise_args, train_args, ds, machine)
    if noise_args.diffusion_steps == "auto":
        print(f"--diffusion_steps auto: planned with {AUTO_STEPS}, before its calibration")
    print(table(made))
    if words := stuck(ds, train_args.learning_rate):
        print(f"warning: {words}")
    print(made.verdict, flush=True)
    return 0 if made.fits else 1


if __name__ == "__main__":
    exits.run(main)

"""Does the run fit, and how long does a pair take: memory of card and host by item, bus, arithmetic. No weights are read.

    the arguments of train_dpo.py + config.json -> a table and a verdict; exit code 0 if it fits, 1 if not
    python plan.py --config_file configs/X.yaml [--gpu_gib 16] [--host_gib 64] [--tflops 97.5] [--pcie_gbs 25] [--ranks 1]

The sizes are those of the tensors that DeepSpeed 0.19.8 makes (runtime/zero/stage3.py, stage_1_and_2.py), torch's autograd
keeps (llada.py's block) and head.py makes; bench/plan.py measures them. Bytes are of one rank's card and of all `ranks` on one host.

L length, D width, V vocabulary, S states; rows: sequences in one graph; e: bytes of a weight, 2 in bf16.
"""
import copy
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Optional

import torch
from torch import nn
from transformers import AutoModelForMaskedLM
from transformers.initialization import no_init_weights

import checkpoint
import config
import diffusion
import engine
from head import CHUNK_BYTES
from packed import InputError
from score import backward_passes, sizes

CONTEXT = 0.6 * 2**30  # bytes of the CUDA context, cuBLAS and what the allocator cannot reuse: a planning number
PROCESS = 1.5 * 2**30  # bytes of a process with torch, transformers and deepspeed on the host: a planning number
NORM = 250_000_000  # elements that DeepSpeed's gradient norm turns into float64 at a time (stage3._constant_buffered_norm2)
DS_CONFIGS = Path(__file__).parent / "ds_configs"
PASSING = ("logits", "largest gradient, its sum, and its float64 norm")  # of the backward pass: gone when weights are saved


@dataclass
class PlanArguments:
    gpu_gib: float = config.arg(0, "the card's memory in GiB; 0: this machine's card, or 16 where there is none")
    host_gib: float = config.arg(0, "the host's memory in GiB; 0: this machine's")
    tflops: float = config.arg(97.5, "the card's peak in 1e12 operations a second; default: RTX 4080, bf16 with float32 sums, not sparse "
                               "(NVIDIA Ada GPU Architecture, appendix A): a planning number, never reached")
    pcie_gbs: float = config.arg(25, "the bus's rate in 1e9 bytes a second; default: about what PCIe 4.0 x16 gives of its 31.5")
    ranks: int = config.arg(1, "cards, all in this host")


class Machine(NamedTuple):
    """GiB, GiB, 1e12 operations/s, 1e9 bytes/s. one_memory: the card is the host (a CPU run): what stays where it is is not copied."""

    gpu_gib: float
    host_gib: float
    tflops: float = 97.5
    pcie_gbs: float = 25
    ranks: int = 1
    one_memory: bool = False


class Item(NamedTuple):
    place: str  # card or host
    name: str
    size: float  # bytes


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


class Shape(NamedTuple):
    """Elements of a model's tensors. trained: of each tensor with a gradient, in order; frozen: of the others."""

    trained: list
    frozen: list
    linear: int  # of the blocks' matrices: 2 operations each for a token
    block: int  # of the largest block
    head: int  # V * D
    words: int
    width: int
    layers: int
    inner: int  # width of the MLP
    keys: int  # width of the keys: kv heads * head width


def shape(model_config, model_args):
    """Count on the meta device: exact, no memory."""
    with torch.device("meta"), no_init_weights():
        model = AutoModelForMaskedLM.from_config(model_config, trust_remote_code=model_args.trust_remote_code)
    model.tie_weights()
    r, wanted = getattr(model_args, "lora_r", 0) or 0, getattr(model_args, "lora_targets", None)
    wanted = [] if wanted in (None, "", "all", "auto") else wanted.split(",") if isinstance(wanted, str) else list(wanted)
    blocks = next((module for module in model.modules() if isinstance(module, nn.ModuleList)), [])
    linears = [(name, module) for name, module in blocks.named_modules() if isinstance(module, nn.Linear)] if len(blocks) else []
    if not linears:
        raise InputError(f"model_type {model_config.model_type} has no blocks to plan for; expected llada")
    whole = [parameter.numel() for parameter in model.parameters()]  # tied ones once
    adapters = [r * size for name, module in linears if not wanted or name.split(".")[-1] in wanted
                for size in (module.in_features, module.out_features)]
    head, first = model.get_output_embeddings(), dict(blocks[0].named_modules())
    inner = max(module.out_features for module in first.values() if isinstance(module, nn.Linear))
    heads = model_config.num_attention_heads
    keys = (getattr(model_config, "num_key_value_heads", None) or heads) * (model_config.hidden_size // heads)
    return Shape(adapters if r else whole, whole if r else [], sum(module.weight.numel() for _, module in linears),
                 max(sum(parameter.numel() for parameter in block.parameters()) for block in blocks), head.weight.numel(),
                 head.out_features, head.in_features, len(blocks), inner, keys)


def activations(shape, rows, length, e, checkpointing):
    """Bytes of `rows` sequences' graph at the turn from forward to backward: each layer's input and one layer's saved tensors,
    or all layers' saved tensors. Per token of a block (llada.py): two norms (float32 copy of the input, normalised, output), queries,
    keys, values, attention's output, four of the MLP's width."""
    norm = (4 if e == 2 else 0) + 2 * e
    block = 2 * norm * shape.width + 3 * e * shape.width + 2 * e * shape.keys + 4 * e * shape.inner
    flight = 3 * e * shape.inner  # gradients that the MLP's backward holds beside them
    ends = (norm + 2 * e) * shape.width  # final norm, scored positions, the gradient that comes back
    tokens = rows * length
    if checkpointing:
        return tokens * (shape.layers * e * shape.width + block + flight + ends)
    return tokens * (shape.layers * (block + (0 if e == 2 else e * shape.width)) + flight + ends)


def logits(shape, rows, length, e):
    """Bytes of head.py's chunk in float32, and of its copy in bf16."""
    chunk = min(max(CHUNK_BYTES, 4 * shape.words), rows * length * 4 * shape.words)
    return chunk * (1.5 if e == 2 else 1)


class States(NamedTuple):
    """Bytes per element of what an optimizer keeps, by the ds_config: weight, master, gradient, both moments."""

    weight: int
    master: int
    gradient: int
    moments: int


def states(ds, model_args):
    bf16 = model_args.use_mixed_precision == "bf16"
    low = bf16 and ds.get("bf16", {}).get("bf16_master_weights_and_grads", False)
    wide = 2 if low else 4
    return States(2 if bf16 else 4, wide, wide, 4 if low and ds["bf16"].get("bf16_optimizer_states") else 8)


def offload(ds, which):
    """Whether ds_config's offload_optimizer or offload_param names a device, and whether its memory is page-locked."""
    entry = ds["zero_optimization"].get(which) or {}
    return entry.get("device", "none") != "none", bool(entry.get("pin_memory", False))


def sub_groups(numels, most):
    """Sums of consecutive tensors, closed as soon as they reach `most` (stage3._create_fp16_sub_groups)."""
    sums = [0]
    for numel in numels:
        if sums[-1] >= most:
            sums.append(0)
        sums[-1] += numel
    return sums


def locked(sizes):
    """Bytes that torch's page-locked allocator adds: it rounds each up to a power of two (ATen/core/CachingHostAllocator.h)."""
    return sum(2 ** math.ceil(math.log2(size)) - size for size in sizes if size >= 1)


def host_items(shape, ds, model_args, machine):
    """What lives on the host, of all ranks. Page-locked memory's rounding and left-overs are read in the sources, not measured."""
    zero, s, n = ds["zero_optimization"], states(ds, model_args), machine.ranks
    trained, frozen, stage = sum(shape.trained), sum(shape.frozen), zero["stage"]
    (optimizer, pin), (params, pin_params) = offload(ds, "offload_optimizer"), offload(ds, "offload_param")
    params, e, found, pins = params and stage == 3, s.weight, [], []
    if params:
        found += [("parameters", e * (trained + frozen))]
        pins += [n * locked([e * trained / n])] + ([n * locked(e * x / n for x in shape.frozen)] if pin_params else [])
    if optimizer and stage:
        found += [("master weights", s.master * trained), ("moments", s.moments * trained), ("gradients", s.gradient * trained)]
        if stage == 3:
            found += [("gradient accumulation buffer", e * trained)]
            grads = sub_groups([x / n for x in shape.trained], zero.get("sub_group_size", 1e9))
            pins += [n * locked([s.gradient * x for x in grads] + [e * trained / n])] if pin else []
        else:
            summed = e if s.gradient == 4 else 0  # in bf16 the sums stand in the gradients themselves
            found += [("weights on their way back to the card", e * trained), ("gradient accumulation buffers", summed * trained),
                      ("largest gradient", n * e * max(shape.trained))]
            pins += [n * locked([s.master * trained / n, s.gradient * trained / n, e * trained / n])
                     + locked(summed * x for x in shape.trained)] if pin else []
    found += [("whole weights, gathered to be saved at the end", e * trained)]
    if not machine.one_memory:
        left = n * sum(2 ** math.ceil(math.log2(max(1, e * x / n))) for x in shape.trained) if params and pin_params else 0
        found += [("page-locked memory, rounded up to powers of two", sum(pins)), ("page-locked memory of the loading, kept by torch", left),
                  ("the processes", n * PROCESS)]
    return [Item("host", name, size) for name, size in found if size]


def card_items(shape, ds, model_args, machine):
    """What lives on a card whatever the states per forward."""
    zero, s, n, stage = ds["zero_optimization"], states(ds, model_args), machine.ranks, ds["zero_optimization"]["stage"]
    (optimizer, _), (params, _) = offload(ds, "offload_optimizer"), offload(ds, "offload_param")
    e, trained, every, largest = s.weight, sum(shape.trained), sum(shape.trained) + sum(shape.frozen), max(shape.trained)
    low, bucket, there, found = e == 2, zero.get("reduce_bucket_size", 5e8), machine.one_memory, []
    if stage == 3:
        if not params:
            found += [("parameters", e * every / n)]
        if n > 1 or params and not there:  # else a gathered tensor is a view
            live = zero.get("stage3_max_live_parameters", 1e9) + zero.get("stage3_prefetch_bucket_size", 5e7)
            found += [("parameters gathered for use", e * min(every, max(live, shape.block, shape.head)))]
    else:
        found += [("parameters", e * every)]
    if optimizer and stage:
        copies = 0 if there else e  # its sum so far, brought back from the host to be added to
        whole = largest / n
        cast = max(s.gradient if s.gradient != e else 0, 8 * (min(NORM, whole) if stage == 3 else whole) / whole)
        found += [("largest gradient, its sum, and its float64 norm", e * largest + (copies + cast) * whole)]
    elif stage:
        kept = trained if stage == 1 else trained / n
        found += [("gradients", e * kept), ("optimizer: moments and Adam's temporary", (8 + 4) * trained / n)]
        if low or stage < 3:
            found += [("optimizer: master weights", 4 * trained / n), ("optimizer: float32 gradients", 4 * trained / n if low else 0)]
    else:
        found += [("gradients", e * trained), ("optimizer: moments and Adam's temporary", (8 + 4) * trained)]
        found += [("optimizer: master weights and gradients", 8 * trained)] if low else []
    if stage:
        held = min(bucket, trained)  # of which one is filled while the other leaves; stage 3's reduction copies it
        found += [("gradient buckets", e * held * (2 if stage == 3 or zero.get("overlap_comm") else 1))]
    if not there:
        found += [("CUDA context and the allocator's gaps", CONTEXT)]
    return [Item("card", name, size) for name, size in found if size]


def work(noise_args, train_args):
    """(states of each response, those with a gradient): of a pair, or of a batch under loss_type sft."""
    if train_args.loss_type == "sft":
        rows = train_args.per_device_train_batch_size
        return [rows], [rows]
    steps = noise_args.diffusion_steps if noise_args.diffusion_steps != "auto" else 4  # the calibration's are not known yet
    S, extra = diffusion.state_count(noise_args.estimator, steps, noise_args.trajectories), [1] if train_args.sft_weight else []
    return [S, S] + extra, [train_args.backprop_steps or S] * 2 + extra


def rows(counts, carrying, size):
    """Sequences in one graph."""
    return sum(counts) if backward_passes(counts, carrying, size) == 1 else min(size, max(carrying))


def costs(shape, counts, carrying, size, length, ds, model_args, train_args):
    """(bytes over the bus per optimizer step, FLOPs per pair). At most: every sequence has `length` tokens, all scored, and ZeRO-3
    fetches every parameter for every pass. Matrices: 2 operations an element and token, twice that backward; attention 4 L D."""
    joint = backward_passes(counts, carrying, size) == 1
    segments = lambda parts: sum(math.ceil(part / size) for part in parts)  # noqa: E731
    plain, graph = 0 if joint else sum(counts), sum(carrying)
    body = length * (2 * shape.linear + shape.layers * 4 * length * shape.width)
    lora, again = bool(shape.frozen), int(model_args.gradient_checkpointing)
    back = (1 if lora else 2) + again
    flops = plain * (body + 2 * length * shape.head) + graph * (body * (1 + back) + 2 * length * shape.head * (3 if lora else 4))
    s, zero, trained = states(ds, model_args), ds["zero_optimization"], sum(shape.trained)
    batch = 1 if train_args.loss_type == "sft" else train_args.per_device_train_batch_size
    pairs = batch * train_args.gradient_accumulation_steps
    backwards = train_args.gradient_accumulation_steps * batch * backward_passes(counts, carrying, size)
    bus = 0
    if zero["stage"] == 3 and offload(ds, "offload_param")[0]:
        bus += s.weight * (trained + sum(shape.frozen)) * pairs * ((0 if joint else segments(counts)) + 2 * segments(carrying))
    if zero["stage"] and offload(ds, "offload_optimizer")[0]:  # sums go up and down; then the gradient, then the weights
        bus += trained * (s.weight * (2 * backwards - 1) + s.gradient + (0 if offload(ds, "offload_param")[0] else s.weight))
    return bus, flops / (batch if train_args.loss_type != "sft" else counts[0])


def plan(model_config, data_args, model_args, noise_args, train_args, ds, machine, advise=True):
    """The Plan of a run. ds: the ds_config as engine.read_ds_config gives it. advise: look for what to change if it does not fit."""
    sized, e = shape(model_config, model_args), states(ds, model_args).weight
    counts, carrying = work(noise_args, train_args)
    fixed = card_items(sized, ds, model_args, machine)
    room = machine.gpu_gib * 2**30 - sum(item.size for item in fixed)
    graph = lambda size: (  # noqa: E731
        activations(sized, rows(counts, carrying, size), data_args.max_length, e, model_args.gradient_checkpointing),
        logits(sized, rows(counts, carrying, size), data_args.max_length, e))
    size = counts[0] if train_args.loss_type == "sft" else model_args.states_per_forward
    if size == "auto":
        size = max([1] + [some for some in sizes(counts[0]) if sum(graph(some)) < engine.ROOM * room])
    held, words = graph(size)
    items = fixed + [Item("card", f"activations of {rows(counts, carrying, size)} x {data_args.max_length} tokens", held),
                     Item("card", "logits", words)] + host_items(sized, ds, model_args, machine)
    bus, flops = costs(sized, counts, carrying, size, data_args.max_length, ds, model_args, train_args)
    pairs = train_args.per_device_train_batch_size * train_args.gradient_accumulation_steps
    made = Plan(items, machine, sum(sized.frozen or sized.trained), sum(sized.trained), size, bus, flops,
                max(flops / (machine.tflops * 1e12), bus / pairs / (machine.pcie_gbs * 1e9)), True, "")
    over = [f"the {place} needs {made.total(place) / 2**30:.1f} GiB and has {have:.1f}" for place, have in
            (("card", machine.gpu_gib), ("host", machine.host_gib)) if made.total(place) > have * 2**30]
    if not over:
        return made._replace(verdict=f"FITS: card {made.total('card') / 2**30:.1f} of {machine.gpu_gib:.1f} GiB, host "
                                     f"{made.total('host') / 2**30:.1f} of {machine.host_gib:.1f} GiB")
    verdict = "DOES NOT FIT: " + ", ".join(over)
    if advise:
        verdict += "; " + advice(made, model_config, data_args, model_args, noise_args, train_args, ds)
    return made._replace(fits=False, verdict=verdict)


def advice(made, model_config, data_args, model_args, noise_args, train_args, ds):
    """The first change, or two, with which it fits; else what the machine lacks."""
    tries, small = [], copy.copy(model_args)
    small.states_per_forward, small.gradient_checkpointing = 1, True
    modest = "--states_per_forward 1" + ("" if model_args.gradient_checkpointing else " --gradient_checkpointing true")
    tries.append((modest, small, ds))
    files = [(path, engine.read_ds_config(path)) for path in sorted(DS_CONFIGS.glob("zero[23]_offload*.json"))]
    tries += [(f"--deepspeed ds_configs/{path.name}{more}", args, other) for args, more in ((model_args, ""), (small, f" {modest}"))
              for path, other in files]
    pageable = [(path, json.loads(json.dumps(other).replace('"pin_memory": true', '"pin_memory": false'))) for path, other in files]
    tries += [(f"a copy of ds_configs/{path.name} with pin_memory false and {modest}", small, other) for path, other in pageable]
    if hasattr(model_args, "lora_r"):
        adapted = copy.copy(small)
        adapted.lora_r = adapted.lora_r or 16
        tries += [(f"--lora_r {adapted.lora_r} --deepspeed ds_configs/{path.name} {modest}", adapted, other) for path, other in files]
    least = made
    for words, args, other in tries:
        found = plan(model_config, data_args, args, noise_args, train_args, other, made.machine, advise=False)
        if found.fits:
            return f"it fits with {words}"
        least = min(least, found, key=lambda each: each.total("card") + each.total("host"))
    return (f"nothing in ds_configs/ makes it fit; the least found needs a card of {math.ceil(least.total('card') / 2**30)} GiB and "
            f"{math.ceil(least.total('host') / 2**30)} GiB of host memory: a shorter --max_length, a smaller model, or a larger machine")


def line(plan):
    """One line for a run's start."""
    return f"plan: {plan.verdict}; {plan.states_per_forward} states a forward, {plan.seconds:.1f} s a pair at the card's peak"


def table(plan):
    """What main prints."""
    lines = []
    for place, have in (("card", plan.machine.gpu_gib), ("host", plan.machine.host_gib)):
        lines += [f"{place:62}   GiB"] + [f"  {item.name:58}{item.size / 2**30:8.2f}" for item in plan.items if item.place == place]
        lines += [f"  {'in all, of ' + format(have, '.1f'):58}{plan.total(place) / 2**30:8.2f}"]
    return "\n".join(lines + [
        f"{plan.parameters:,} parameters, {plan.trainable:,} trained; {plan.states_per_forward} states a forward",
        f"bus: {plan.bus / 1e9:.1f} GB an optimizer step and rank, at most; arithmetic: {plan.flops / 1e12:.1f} TFLOP a pair, at most",
        f"a pair takes {plan.seconds:.1f} s or more: the slower of {plan.machine.tflops:g} TFLOP/s and {plan.machine.pcie_gbs:g} GB/s"])


def memory_total():
    """GiB of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    *groups, own = config.parse(argv, __doc__.splitlines()[0], *config.GROUPS, PlanArguments)
    data_args, model_args, noise_args, train_args = groups
    for name, least in (("gpu_gib", 0), ("host_gib", 0), ("tflops", 1e-9), ("pcie_gbs", 1e-9), ("ranks", 1)):
        if not least <= getattr(own, name) < math.inf:
            raise InputError(f"--{name} is {getattr(own, name)}, expected {'1 or more' if name == 'ranks' else 'a positive number'}")
    for name, value in (("states_per_forward", model_args.states_per_forward), ("max_length", data_args.max_length)):
        if value != "auto" and value < 1:
            raise InputError(f"--{name} is {value}, expected at least 1")
    here = torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 16.0
    machine = Machine(own.gpu_gib or here, own.host_gib or memory_total(), own.tflops, own.pcie_gbs, own.ranks)
    made = plan(checkpoint.load_config(model_args.model_name_or_path, model_args.trust_remote_code), data_args, model_args, noise_args,
                train_args, engine.read_ds_config(model_args.deepspeed), machine)
    print(f"{table(made)}\n{made.verdict}", flush=True)
    return 0 if made.fits else 1


if __name__ == "__main__":
    config.run(main)

"""What a run's tensors weigh, item by item, on card and host. No weights are read: the model is counted on the meta device.

    config.json + ds_config + arguments -> shape(...), activations(...), logits(...), host_items(...), card_items(...)

The sizes are those of the tensors that DeepSpeed 0.19.8 makes (runtime/zero/stage3.py, stage_1_and_2.py), torch's autograd
keeps (llada.py's block) and head.py makes; bench/planned.py measures them. Bytes are of one rank's card, and of
all `ranks` on one host.

D width, V vocabulary; rows: sequences in one graph; e: bytes of a weight, 2 in bf16.
"""

import math
from typing import NamedTuple

import torch
from torch import nn
from transformers.initialization import no_init_weights

from files import InputError
from models import architecture, families, lora, quantized
from models.head import CHUNK_BYTES

CONTEXT = 0.6 * 2**30  # bytes of the CUDA context, cuBLAS and what the allocator cannot reuse: a planning number
PROCESS = 1.5 * 2**30  # bytes of a process with torch, transformers and deepspeed on the host: a planning number
NORM = 250_000_000  # elements that DeepSpeed's gradient norm turns into float64 at a time (stage3._constant_buffered_norm2)
PASSING = ("activations", "logits", "largest gradient, its")  # of the backward pass: gone when weights are saved


class Machine(NamedTuple):
    """GiB, GiB, 1e12 operations/s, 1e9 bytes/s. one_memory: the card is the host (a CPU run), and nothing is copied across.
    rounded: page-locked memory comes in powers of two, and is never given back (torch before 2.13, or without launch.sh)."""

    gpu_gib: float
    host_gib: float
    tflops: float = 49
    pcie_gbs: float = 25
    ranks: int = 1
    one_memory: bool = False
    rounded: bool = False


class Item(NamedTuple):
    place: str  # card or host
    name: str
    size: float  # bytes


class Shape(NamedTuple):
    """Elements of a model's tensors. trained: of each tensor with a gradient, in order; frozen: of the others."""

    trained: list
    frozen: list
    packed: int  # of frozen, those in 4 bits
    linear: int  # of the blocks' matrices: 2 operations each for a token
    block: int  # of the largest block
    head: int  # V * D
    words: int
    width: int
    layers: int
    inner: int  # width of the MLP
    queries: int  # heads * head width
    keys: int  # key-value heads * head width


def shape(model_config, model_args):
    """Count on the meta device: exact, no memory."""
    with torch.device("meta"), no_init_weights():
        model = architecture.build(
            model_config,
            torch.bfloat16,
            families.shifted(model_config, model_args.shift_logits),
            model_args.trust_remote_code,
        )
    blocks = next((module for module in model.modules() if isinstance(module, nn.ModuleList)), [])
    linears, head = architecture.block_linears(model), model.get_output_embeddings()
    if not linears:
        raise InputError(
            f"config.json: model_type {model_config.model_type} has no blocks with linear layers to plan for"
        )
    whole = [parameter.numel() for parameter in model.parameters()]  # tied ones once
    layers, heads = model_config.num_hidden_layers, model_config.num_attention_heads
    wide = getattr(model_config, "head_dim", None) or model_config.hidden_size // heads
    adapters = []
    if model_args.lora_r:
        adapters = [
            model_args.lora_r * size
            for name in lora.pattern(model, model_args.lora_targets)[1]
            for size in linears[name]
        ]
    return Shape(
        trained=adapters or whole,
        frozen=whole if adapters else [],
        packed=sum(a * b for a, b in linears.values()) if model_args.load_in_4bit else 0,
        linear=sum(a * b for a, b in linears.values()) * layers // len(blocks),  # ALBERT runs one block many times
        block=max(sum(parameter.numel() for parameter in block.parameters()) for block in blocks),
        head=head.weight.numel(),
        words=head.out_features,
        width=model_config.hidden_size,
        layers=layers,
        inner=max(out for _, out in linears.values()),
        queries=heads * wide,
        keys=(getattr(model_config, "num_key_value_heads", None) or heads) * wide,
    )


def activations(shape, rows, length, e, checkpointing):
    """Bytes of `rows` sequences' graph at the turn from forward to backward: each layer's input and one layer's saved tensors,
    or all layers' saved tensors. Per token of a block (llada.py): two norms (float32 copy of the input, normalised, output),
    queries, keys, values, attention's output, four of the MLP's width."""
    norm = (4 if e == 2 else 0) + 2 * e
    block = 2 * norm * shape.width + e * shape.width + 2 * e * (shape.queries + shape.keys) + 4 * e * shape.inner
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
    """What lives on the host, of all ranks. Page-locked memory's rounding and left-overs: by the sources, not measured."""
    zero, s, n = ds["zero_optimization"], states(ds, model_args), machine.ranks
    trained, frozen, stage = sum(shape.trained), sum(shape.frozen), zero["stage"]
    (optimizer, pin), (params, pin_params) = offload(ds, "offload_optimizer"), offload(ds, "offload_param")
    params, e, found, pins = params and stage == 3, s.weight, [], []
    if params:
        found += [("parameters", e * (trained + frozen))]
        pins += [n * locked([e * trained / n])] + ([n * locked(e * x / n for x in shape.frozen)] if pin_params else [])
    if optimizer and stage:
        found += [
            ("master weights", s.master * trained),
            ("moments", s.moments * trained),
            ("gradients", s.gradient * trained),
        ]
        if stage == 3:
            found += [("gradient accumulation buffer", e * trained)]
            grads = sub_groups([x / n for x in shape.trained], zero.get("sub_group_size", 1e9))
            pins += [n * locked([s.gradient * x for x in grads] + [e * trained / n])] if pin else []
        else:
            summed = e if s.gradient == 4 else 0  # in bf16 the sums stand in the gradients themselves
            found += [
                ("weights on their way back to the card", e * trained),
                ("gradient accumulation buffers", summed * trained),
                ("largest gradient", n * e * max(shape.trained)),
            ]
            pins += (
                [
                    n * locked([s.master * trained / n, s.gradient * trained / n, e * trained / n])
                    + locked(summed * x for x in shape.trained)
                ]
                if pin
                else []
            )
    found += [("whole weights, gathered to be saved at the end", e * trained)]
    if not machine.one_memory:
        later = sum(size for _, size in found)  # what is there when the loaded weights have gone to the card
        if stage < 3 and (more := n * e * (trained + frozen - shape.packed) - later) > 0:
            found += [("weights, while they are loaded, beyond the above", more)]
        found += [("the processes", n * PROCESS)]
        if machine.rounded:
            left = (
                n * sum(2 ** math.ceil(math.log2(max(1, e * x / n))) for x in shape.trained)
                if params and pin_params
                else 0
            )
            found += [
                ("page-locked memory, rounded up to powers of two", sum(pins)),
                ("page-locked memory of the loading, kept by torch", left),
            ]
    return [Item("host", name, size) for name, size in found if size]


def card_items(shape, ds, model_args, machine):
    """What lives on a card whatever the states per forward."""
    zero, s, n, stage = ds["zero_optimization"], states(ds, model_args), machine.ranks, ds["zero_optimization"]["stage"]
    (optimizer, _), (params, _) = offload(ds, "offload_optimizer"), offload(ds, "offload_param")
    e, trained, every, largest = (
        s.weight,
        sum(shape.trained),
        sum(shape.trained) + sum(shape.frozen),
        max(shape.trained),
    )
    low, bucket, there, found = e == 2, zero.get("reduce_bucket_size", 5e8), machine.one_memory, []
    if stage == 3:
        if not params:
            found += [("parameters", e * every / n)]
        if n > 1 or params and not there:  # else a gathered tensor is a view
            live = zero.get("stage3_max_live_parameters", 1e9) + zero.get("stage3_prefetch_bucket_size", 5e7)
            found += [("parameters gathered for use", e * min(every, max(live, shape.block, shape.head)))]
    else:
        found += [("parameters", e * (every - shape.packed) + quantized.BYTES * shape.packed)]
        if shape.packed:
            found += [("a matrix unpacked, forwards and backwards", 2 * e * shape.inner * shape.width)]
    if optimizer and stage:
        copies = 0 if there else e  # its sum so far, brought back from the host to be added to
        whole = largest / n
        cast = max(s.gradient if s.gradient != e else 0, 8 * (min(NORM, whole) if stage == 3 else whole) / whole)
        found += [("largest gradient, its sum, and its float64 norm", e * largest + (copies + cast) * whole)]
    elif stage:
        kept = trained if stage == 1 else trained / n
        found += [("gradients", e * kept), ("optimizer: moments and Adam's temporary", (8 + 4) * trained / n)]
        if low or stage < 3:
            found += [("optimizer: master weights", 4 * trained / n)]
            found += [("optimizer: float32 gradients", 4 * trained / n)] if low else []
    else:
        found += [("gradients", e * trained), ("optimizer: moments and Adam's temporary", (8 + 4) * trained)]
        found += [("optimizer: master weights and gradients", 8 * trained)] if low else []
    if stage:
        held = min(bucket, trained)  # of which one is filled while the other leaves; stage 3's reduction copies it
        found += [("gradient buckets", e * held * (2 if stage == 3 or zero.get("overlap_comm") else 1))]
    if not there:
        found += [("CUDA context and the allocator's gaps", CONTEXT)]
    return [Item("card", name, size) for name, size in found if size]

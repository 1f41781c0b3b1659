"""Bytes of a run's tensors, item by item, on card and host. No weights are read.

    shapes.Shape + ds_config + arguments -> graph_items(), host_items(), card_items(), disk_items()

The tensors are those that DeepSpeed 0.19.8 makes (runtime/zero/stage3.py, stage_1_and_2.py) and those of
activations.py. Bytes are of one rank's card, and of all ranks on one host. bench/planned.py compares the sum with a
run.
"""

import math
from typing import NamedTuple

from models import quantized
from training.activations import Kind, activation_bytes, head_bytes, layer_backward_bytes

CONTEXT = 0.6 * 2**30  # bytes of the CUDA context, cuBLAS and what the allocator cannot reuse: a planning number
PROCESS = 1.5 * 2**30  # bytes of a process with torch, transformers and deepspeed on the host: a planning number
NORM = 250_000_000  # elements that DeepSpeed casts to float64 at a time for the norm (stage3._constant_buffered_norm2)
MOMENTS_AND_TEMPORARY = (
    8 + 4
)  # bytes per trained element of torch's AdamW in float32: two moments, and a temporary in its step
PASSING = ("activations", "in the backward pass")  # items of the backward pass: gone when weights are saved


class Machine(NamedTuple):
    """What a plan is made for. The numbers are per card, but for the host's memory."""

    gpu_gib: float
    host_gib: float
    tflops: float = 49  # 1e12 operations a second
    pcie_gbs: float = 25  # 1e9 bytes a second
    ssd_gbs: float = 2  # 1e9 bytes a second, reads and writes together
    memory_gbs: float = 717  # the card's memory, 1e9 bytes a second: an RTX 4080's
    ranks: int = 1
    one_memory: bool = False  # the card is the host (a run on a CPU): nothing is copied between them
    # Page-locked memory comes in powers of two and is never freed: torch before 2.13, or without launch.sh
    rounded: bool = False


class Item(NamedTuple):
    place: str  # card or host
    name: str
    size: float  # bytes


# --- one graph --------------------------------------------------------------------------------------------


def graph_items(shape, graph, ds, model_args, machine):
    """[Item] of what a card holds of one activations.Graph.

    What is held from the forward pass on, and beside it what the backward pass needs at its largest moment: the
    moments come one after the other.
    """
    e = bytes_per_element(ds, model_args)
    repeats = shape.query_width > shape.key_width and not machine.one_memory
    kind = Kind(e.weight, model_args.gradient_checkpointing, repeats)
    moments = {"the logits": head_bytes(shape, graph, kind), "one layer": layer_backward_bytes(shape, graph, kind)}
    placed = placement(ds)
    if placed.optimizer_on_host:
        moments["the largest gradient, sum, norm"] = offloaded_gradient(shape, e, placed, machine)
    largest = max(moments, key=moments.get)
    return [
        Item("card", f"activations of {graph.tokens} tokens", activation_bytes(shape, graph, kind)),
        Item("card", f"in the backward pass at most: {largest}", moments[largest]),
    ]


# --- where a ds_config puts things ------------------------------------------------------------------------


class BytesPerElement(NamedTuple):
    """What a trained element costs: the weight, and what the optimizer keeps beside it."""

    weight: int
    master: int
    gradient: int
    moments: int  # both


def bytes_per_element(ds, model_args):
    """BytesPerElement of a run under the ds_config `ds`."""
    low = model_args.use_mixed_precision == "bf16"
    low_masters = low and ds.get("bf16", {}).get("bf16_master_weights_and_grads", False)
    low_moments = low_masters and ds["bf16"].get("bf16_optimizer_states")
    return BytesPerElement(
        weight=2 if low else 4,
        master=2 if low_masters else 4,
        gradient=2 if low_masters else 4,
        moments=4 if low_moments else 8,
    )


class Placement(NamedTuple):
    """What a ds_config keeps on the host, and whether in page-locked memory."""

    stage: int
    parameters_on_host: bool
    parameters_locked: bool
    optimizer_on_host: bool  # or, of its states, what swapping needs there
    optimizer_locked: bool
    states_on_disk: bool  # master weights, moments and gradients: training/nvme.py


def placement(ds):
    """Placement of the ds_config `ds`."""
    zero = ds["zero_optimization"]
    parameters, optimizer = (zero.get(name) or {} for name in ("offload_param", "offload_optimizer"))
    return Placement(
        stage=zero["stage"],
        parameters_on_host=zero["stage"] == 3 and parameters.get("device", "none") != "none",
        parameters_locked=bool(parameters.get("pin_memory", True)),
        optimizer_on_host=zero["stage"] > 0 and optimizer.get("device", "none") != "none",
        optimizer_locked=bool(optimizer.get("pin_memory", True)),
        states_on_disk=optimizer.get("device") == "nvme",
    )


# --- the host ---------------------------------------------------------------------------------------------


def host_items(shape, ds, model_args, machine):
    """[Item] of what is on the host, for all ranks."""
    e, trained = bytes_per_element(ds, model_args), sum(shape.trained)
    placed = placement(ds)
    found = []
    if placed.parameters_on_host:
        found += [("parameters", e.weight * shape.elements)]
    states = state_items(shape, e)
    if placed.states_on_disk:
        found += swap_items(shape, ds["zero_optimization"], e, machine.ranks)
    elif placed.optimizer_on_host:
        found += states
    if placed.optimizer_on_host and placed.stage == 3:
        found += [("gradient accumulation buffer", e.weight * trained)]
    elif placed.optimizer_on_host:
        found += [
            ("weights on their way back to the card", e.weight * trained),
            ("gradient accumulation buffers", summed_bytes(e) * trained),
            ("largest gradient", machine.ranks * e.weight * max(shape.trained)),
        ]
    found += [("whole weights, gathered to be saved at the end", e.weight * trained)]
    if not machine.one_memory:
        if placed.stage < 3:  # each rank loads the whole model before any of it leaves for the card
            loaded = machine.ranks * e.weight * (shape.elements - shape.packed)
            afterwards = sum(size for _, size in found)
            found += [("weights, while they are loaded, beyond the above", max(0, loaded - afterwards))]
        found += [("the processes", machine.ranks * PROCESS)]
        if machine.rounded:
            found += locked_items(shape, ds, e, placed, machine.ranks)
    return [Item("host", name, size) for name, size in found if size]


def state_items(shape, e):
    """[(name, bytes)] of the optimizer's states, wherever they are."""
    trained = sum(shape.trained)
    return [
        ("master weights", e.master * trained),
        ("moments", e.moments * trained),
        ("gradients", e.gradient * trained),
    ]


def swap_items(shape, zero, e, ranks):
    """[(name, bytes)] of what the host holds of states on an SSD: buffers of the largest sub-group.

    In the first step its moments are beside them: Adam makes them in other memory (swap_tensor/optimizer_utils.py). The
    weights that are gathered at the end take that memory, too.
    """
    largest = max(sub_groups([numel / ranks for numel in shape.trained], zero.get("sub_group_size", 1e9)))
    buffers = zero["offload_optimizer"].get("buffer_count", 4)
    beyond = ranks * e.moments * largest - e.weight * sum(shape.trained)
    return [
        ("buffers to swap a sub-group", ranks * buffers * e.master * largest),
        ("moments of a sub-group, in the first step", max(0, beyond)),
    ]


def disk_items(shape, ds, model_args):
    """[Item] of what is on the SSD. A step reads all of it and writes all of it."""
    if not placement(ds).states_on_disk:
        return []
    return [Item("SSD", name, size) for name, size in state_items(shape, bytes_per_element(ds, model_args))]


def summed_bytes(e):
    """Bytes per element of stage 2's accumulation buffers: with bf16 gradients the sums are kept in the gradients."""
    return e.weight if e.gradient == 4 else 0


def locked_items(shape, ds, e, placed, ranks):
    """What torch's page-locked memory takes above its tensors: by the sources of torch and DeepSpeed, not measured.

    The allocator rounds each tensor up to a power of two (ATen/core/CachingHostAllocator.h), and keeps what is freed.
    """
    share = sum(shape.trained) / ranks
    rounding = left_of_loading = 0
    if placed.parameters_on_host:
        rounding += ranks * lost_to_rounding([e.weight * share])
    if placed.parameters_on_host and placed.parameters_locked:
        rounding += ranks * lost_to_rounding(e.weight * numel / ranks for numel in shape.frozen)
        left_of_loading = ranks * sum(power_of_two(max(1, e.weight * numel / ranks)) for numel in shape.trained)
    if placed.states_on_disk and placed.optimizer_locked:
        rounding += ranks * lost_to_rounding([e.weight * share])
    elif placed.optimizer_on_host and placed.optimizer_locked and placed.stage == 3:
        most = ds["zero_optimization"].get("sub_group_size", 1e9)
        groups = sub_groups([numel / ranks for numel in shape.trained], most)
        rounding += ranks * lost_to_rounding([*(e.gradient * numel for numel in groups), e.weight * share])
    elif placed.optimizer_on_host and placed.optimizer_locked:
        rounding += ranks * lost_to_rounding([e.master * share, e.gradient * share, e.weight * share])
        rounding += lost_to_rounding(summed_bytes(e) * numel for numel in shape.trained)
    return [
        ("page-locked memory, rounded up to powers of two", rounding),
        ("page-locked memory of the loading, kept by torch", left_of_loading),
    ]


def power_of_two(size):
    """The power of two at `size` or above."""
    return 2 ** math.ceil(math.log2(size))


def lost_to_rounding(sizes):
    """Bytes that are added to tensors of `sizes` bytes."""
    return sum(power_of_two(size) - size for size in sizes if size >= 1)


def sub_groups(numels, most):
    """Sums of consecutive tensors, closed as soon as they reach `most` (stage3._create_fp16_sub_groups)."""
    sums = [0]
    for numel in numels:
        if sums[-1] >= most:
            sums.append(0)
        sums[-1] += numel
    return sums


# --- the card ---------------------------------------------------------------------------------------------


def card_items(shape, ds, model_args, machine):
    """[Item] of what is on a card whatever the tokens of a forward pass."""
    e, placed = bytes_per_element(ds, model_args), placement(ds)
    found = parameter_items(shape, ds["zero_optimization"], e, placed, machine)
    if not placed.optimizer_on_host:
        found += optimizer_items(sum(shape.trained), e, placed.stage, machine.ranks)
    if placed.stage:
        found += [("gradient buckets", bucket_bytes(sum(shape.trained), ds["zero_optimization"], e))]
    if not machine.one_memory:
        found += [("CUDA context and the allocator's gaps", CONTEXT)]
    return [Item("card", name, size) for name, size in found if size]


def parameter_items(shape, zero, e, placed, machine):
    """The weights on a card: all of them, or under ZeRO-3 a share and what is gathered for use."""
    if placed.stage < 3:
        return [
            ("parameters", e.weight * (shape.elements - shape.packed) + quantized.BYTES * shape.packed),
            ("matrices unpacked for use", e.weight * shape.unpacked),
        ]
    found = []
    if not placed.parameters_on_host:
        found += [("parameters", e.weight * shape.elements / machine.ranks)]
    if machine.ranks > 1 or placed.parameters_on_host and not machine.one_memory:  # else a gathered tensor is a view
        found += [("parameters gathered for use", e.weight * gathered(shape, zero, machine.ranks))]
        found += [("parameters freed, until the card has used them", 2 * e.weight * shape.largest_block)]
    return found


def gathered(shape, zero, ranks):
    """Elements that ZeRO-3 has gathered at most (runtime/zero/partitioned_param_coordinator.py).

    It fetches ahead as long as less than max_live_parameters are gathered, whatever the next tensor's size: the head
    comes on top, and so do the tensors that stay.
    """
    most = int(zero.get("stage3_max_live_parameters", 1e9)) + max(shape.tensors)
    return small(shape, zero) + min(streamed(shape, zero, ranks), max(most, shape.largest_block))


def small(shape, zero):
    """Elements of the tensors that ZeRO-3 gathers once and keeps on the card, because they are small."""
    threshold = zero.get("stage3_param_persistence_threshold", 1e5)
    return sum(numel for numel in shape.tensors if numel <= threshold)


def streamed(shape, zero, ranks):
    """Elements that a pass over the model gathers. Under LoRA on one card the host looks embeddings up."""
    looked_up = shape.embedding if shape.frozen and ranks == 1 else 0
    return shape.elements - small(shape, zero) - looked_up


def offloaded_gradient(shape, e, placed, machine):
    """Bytes of the largest gradient on its way to the host: itself, its rank's sum so far, and a cast of that share."""
    largest = max(shape.trained)
    share = largest / machine.ranks
    summed = 0 if machine.one_memory else e.weight  # brought back from the host to be added to
    in_float64 = min(NORM, share) if placed.stage == 3 else share
    cast = max(e.gradient if e.gradient != e.weight else 0, 8 * in_float64 / share)
    return e.weight * largest + (summed + cast) * share


def optimizer_items(trained, e, stage, ranks):
    """Gradients and AdamW's state on a card, for `trained` elements."""
    low = e.weight == 2
    if not stage:
        return [
            ("gradients", e.weight * trained),
            ("optimizer: moments and Adam's temporary", MOMENTS_AND_TEMPORARY * trained),
            ("optimizer: master weights and gradients", 8 * trained if low else 0),
        ]
    share = trained / ranks
    return [
        ("gradients", e.weight * (trained if stage == 1 else share)),
        ("optimizer: moments and Adam's temporary", MOMENTS_AND_TEMPORARY * share),
        ("optimizer: master weights", 4 * share if low or stage < 3 else 0),
        ("optimizer: float32 gradients", 4 * share if low else 0),
    ]


def bucket_bytes(trained, zero, e):
    """One bucket is filled while the other is reduced; stage 3's reduction copies it."""
    buckets = 2 if zero["stage"] == 3 or zero.get("overlap_comm") else 1
    return e.weight * buckets * min(zero.get("reduce_bucket_size", 5e8), trained)

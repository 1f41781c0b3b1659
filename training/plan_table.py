"""What plan.py prints: memory item by item, the time of a pair, the hours of a run, the wear of an SSD.

plan.Plan -> table(), spent(), hours(), ssd_lines()
"""

import math
from typing import NamedTuple

import losses

GIB = 2**30
RATED_TB = 600  # of writes: Samsung's 990 PRO of 1 TB


def table(made, attention=""):
    """The items, and what a pair costs. attention: families.attention_line(), to be told too."""
    machine, lines = made.machine, item_lines(made.items, made.machine)
    work, bus_gibs = made.work, machine.pcie_gbs * 1e9 / GIB
    plain_passes, graph_passes = map(len, work.divided)
    trained = f", {sum(made.shape.trained):,} trained"
    lines += [model_line(made.shape) + trained, *filter(None, [attention]), *row_lines(work)]
    lines += [
        f"tokens in a forward pass: {work.tokens_per_forward}",
        f"passes of a step of {work.pairs} {work.noun}s: {plain_passes} without a graph, {graph_passes} with one",
        f"planned: {made.seconds:.1f} s a {work.noun} (prompt and response {work.lengths.row} tokens), of",
        f"  {made.training.operations / 1e12:8.1f} TFLOP on the card, at {machine.tflops:g} TFLOP/s",
    ]
    if made.training.bus:
        apart = made.training.seconds(machine, overlap=False)
        lines.append(
            f"  {made.training.bus / GIB:8.1f} GiB over the bus, at {bus_gibs:.1f} GiB/s, hidden behind the "
            f"arithmetic; if nothing of it is hidden, {apart:.1f} s a {work.noun}"
        )
    return "\n".join(lines)


def item_lines(items, machine):
    """Memory item by item, of the card and of the host."""
    lines = []
    for place, available in (("card", machine.gpu_gib), ("host", machine.host_gib)):
        there = [item for item in items if item.place == place]
        lines.append(f"{place:66}   GiB")
        lines += [f"  {item.name:62}{item.size / GIB:8.2f}" for item in there]
        lines.append(f"  {f'in all, of {available:.1f}':62}{sum(item.size for item in there) / GIB:8.2f}")
    return lines


def judged(items, machine):
    """(whether it fits, the verdict in words) of [Item]."""
    card, host = (sum(item.size for item in items if item.place == place) / GIB for place in ("card", "host"))
    needs = [("card", card, machine.gpu_gib), ("host", host, machine.host_gib)]
    if machine.one_memory:
        needs = [("host", card + host, machine.host_gib)]
    missing = [f"the {place} needs {need:.1f} GiB and has {have:.1f}" for place, need, have in needs if need > have]
    if missing:
        return False, "DOES NOT FIT: " + ", ".join(missing)
    return True, "FITS: " + ", ".join(f"{place} {need:.1f} of {have:.1f} GiB" for place, need, have in needs)


def model_line(shape):
    """How large a model is."""
    active = ""
    if shape.experts:
        chosen = max(layer.chosen for layer in shape.layers)
        active = f", {shape.active:,} active ({chosen} of {shape.experts} experts for each token)"
    return f"{shape.parameters:,} parameters{active}"


def row_lines(work):
    """The shared row of a block-causal model's response."""
    [states, *_] = work.responses
    if states.blocks is None:
        return []
    rows = work.rows([states], work.tokens_per_forward)
    copies = max(len(row.layout.copies) for row in rows)
    words = f"{len(rows)} rows of at most" if len(rows) > 1 else "a row of"
    return [
        f"states of a response: {len(states.live)}, in {words} {max(row.tokens for row in rows)} tokens: "
        f"{rows[0].layout.clean} clean, and {copies} copies of {len(rows[0].layout.copies[0])}"
    ]


class Spent(NamedTuple):
    """What a run takes."""

    scoring: float  # seconds of reference scores
    training: float  # seconds
    steps: int
    pairs_a_step: int
    held_out: int


def spent(made, pairs, train_args, noise_sets):
    """Spent of a run of so many pairs, or under sft rows."""
    ranks, batch = made.machine.ranks, train_args.per_device_train_batch_size
    held_out = math.ceil(train_args.eval_fraction * pairs)
    pairs_a_step = batch * train_args.gradient_accumulation_steps * ranks
    steps = math.ceil(train_args.num_train_epochs * (pairs - held_out) / pairs_a_step)
    if train_args.max_steps > 0:
        steps = train_args.max_steps
    evaluations = math.ceil(steps / train_args.eval_steps) if train_args.eval_steps else 1
    scoring = made.scoring.seconds(made.machine)
    training = steps * pairs_a_step * made.seconds + evaluations * held_out * scoring
    scored = noise_sets * pairs * scoring if losses.has_reference(train_args.loss_type) else 0
    return Spent(scored / ranks, training / ranks, steps, pairs_a_step, held_out)


def hours(made, pairs, train_args, noise_sets):
    """One line: the hours that so many pairs take, or under sft rows."""
    found = spent(made, pairs, train_args, noise_sets)
    trained = f"{found.training / 3600:.1f} h of training ({found.steps} steps of {found.pairs_a_step}, "
    trained += f"{found.held_out} held out)"
    scored = f"{found.scoring / 3600:.1f} h of reference scores, " if found.scoring else ""
    return f"{pairs} {made.work.noun}s (prompt and response {made.work.lengths.row} tokens): {scored}{trained}"


def ssd_lines(states, rate):
    """What a step costs an SSD. states: [Item] of the optimizer's states there. rate: 1e9 bytes a second."""
    size = sum(item.size for item in states) / 1e9
    names = ", ".join(item.name for item in states)
    return (
        f"SSD: {size:.0f} GB ({names}); a checkpoint takes about 0.8 of it\n"
        f"  a step reads {size:.0f} GB and writes {size:.0f}: {2 * size / rate:.0f} s at {rate:g} GB/s, part of "
        "the seconds above; let steps be rare, by --gradient_accumulation_steps\n"
        f"  {RATED_TB} TB of writes, a usual rating of a drive of 1 TB, are {1000 * RATED_TB / size:,.0f} steps"
    )

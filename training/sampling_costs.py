"""What sampling costs in time and memory: passes of a response, what they read, hours. No weights are read.

    shapes.Shape + SampleArguments + Work -> sampling_plan() -> SamplingPlan, for plan.py --for

Rows of a batch are taken to begin their blocks together, so that the passes over whole rows stand apart from the short
ones. Not counted: what costs.py leaves out, and reading answers.

D width, V vocabulary, L tokens of a row, P of its prompt.
"""

import math
from typing import NamedTuple

from training import costs
from training.costs import Pass
from training.footprint import CONTEXT, PROCESS, Item, bytes_per_element, lost_to_rounding, parameter_items, placement
from training.memory import ROOM
from training.sampling_memory import (
    bytes_of_weight,
    drawing_bytes,
    has_cache,
    model_arguments,
    row_bytes,
    rows_that_fit,
)

GIB = 2**30


class Work(NamedTuple):
    """What is sampled."""

    responses: int
    prompt: int  # P, tokens
    response: int  # tokens before a response ends
    passes_of_block: int  # forward passes that fill a block
    longest_prompt: int = 0  # tokens; memory is for this one


class Reads(NamedTuple):
    """Passes of a response that are alike."""

    count: int
    tokens: int  # that a pass reads of the row
    keys: int  # that they see
    predicted: int  # masked places of the block, on average


class SamplingPlan(NamedTuple):
    """Hours and memory."""

    rows: int  # of a batch
    row: int  # tokens of the longest, which memory is for
    reads: list  # [Reads] of a response
    seconds: float
    arithmetic: float  # seconds of it alone
    reading: float  # seconds of the card's memory alone
    copying: float  # seconds of the bus alone
    items: list

    @property
    def passes(self):
        """Of a response."""
        return sum(each.count for each in self.reads)

    @property
    def tokens(self):
        """Of a response, read by all its passes."""
        return sum(each.count * each.tokens for each in self.reads)

    @property
    def computing(self):
        """Seconds on the card."""
        return self.arithmetic + self.reading

    @property
    def limit(self):
        """What takes most of the time."""
        if self.copying > self.computing:
            return "the bus"
        return "the card's memory" if self.reading > self.arithmetic else "arithmetic"


def reads_of(shape, sample, work):
    """[Reads] of one response. sample: SampleArguments after arguments.check()."""
    size, passes = sample.block_length, work.passes_of_block
    found, predicted = [], (size + 1) // 2
    if shape.blocks:
        return block_causal_reads(shape.blocks, work)
    row = work.prompt + sample.gen_length
    whole = passes if sample.cache == "none" else math.ceil(passes / (sample.refresh or passes))
    for block in range(math.ceil(work.response / size)):
        found.append(Reads(whole, row, row, predicted))
        short = size if sample.cache == "dual" else sample.gen_length - block * size
        found.append(Reads(passes - whole, short, row, predicted))
    return [each for each in found if each.count]


def block_causal_reads(blocks, work):
    """As reads_of(): a block's first pass also reads the block before it, the first one the prompt."""
    size, found = blocks.size, []
    predicted = (size + 1) // 2
    for block in range(math.ceil(work.response / size)):
        keys = work.prompt + (block + 1) * size
        before = size if block else work.prompt
        if blocks.first_from_clean:
            others = min(work.passes_of_block, size - 1)
            found += [Reads(1, before, keys - size, 1), Reads(others, size, keys, predicted)]
        else:
            found += [Reads(1, before + size, keys, predicted), Reads(work.passes_of_block - 1, size, keys, predicted)]
    return [each for each in found if each.count]


def pass_of(shape, sample, ds, machine, reads, rows):
    """The costs.Pass of `rows` responses that make alike passes together."""
    model_args, weight = model_arguments(sample), bytes_of_weight(sample)
    rows *= 2 if sample.cfg_scale else 1
    of_token = 2 * shape.block_weights + 4 * shape.query_width * len(shape.layers) * reads.keys
    operations = rows * (reads.tokens * of_token + 2 * shape.head * reads.predicted)
    memory = costs.unpacked_bytes(shape, model_args) + weight * (shape.parameters - shape.packed)
    if has_cache(shape, sample):
        memory += rows * reads.keys * 2 * len(shape.layers) * shape.key_width * weight
    return Pass(operations, costs.fetched_bytes(shape, ds, model_args, machine), memory)


def sampling_plan(shape, sample, ds, machine, work):
    """The SamplingPlan of some Work.

    shape: sampling_memory.sampled_shape(). sample: SampleArguments after arguments.check(). ds: as read_ds_config()
    gives it.
    """
    # 1. The batch
    row = max(work.prompt, work.longest_prompt) + sample.gen_length
    items = weight_items(shape, sample, ds, machine)
    rows = sample.batch_size
    if rows == "auto":
        room = machine.gpu_gib * GIB - sum(item.size for item in items if item.place == "card")
        rows = rows_that_fit(shape, sample, row, ROOM * room)
    rows = min(rows, work.responses)

    # 2. Rounds of full batches, and what is left
    reads = reads_of(shape, sample, work)
    rounds, rest = divmod(work.responses, rows)
    made = [(rounds * each.count, pass_of(shape, sample, ds, machine, each, rows)) for each in reads]
    if rest:
        made += [(each.count, pass_of(shape, sample, ds, machine, each, rest)) for each in reads]
    return SamplingPlan(
        rows=rows,
        row=row,
        reads=reads,
        seconds=sum(count * each.seconds(machine) for count, each in made),
        arithmetic=sum(count * each.operations for count, each in made) / (machine.tflops * 1e12),
        reading=sum(count * each.memory for count, each in made) / (machine.memory_gbs * 1e9),
        copying=sum(count * each.bus for count, each in made) / (machine.pcie_gbs * 1e9),
        items=items + batch_items(shape, sample, rows, row),
    )


# --- memory -----------------------------------------------------------------------------------------------


def weight_items(shape, sample, ds, machine):
    """[Item] of the weights on card and host, and of what else does not depend on the batch."""
    e, placed = bytes_per_element(ds, model_arguments(sample)), placement(ds)
    on_card = parameter_items(shape, ds["zero_optimization"], e, placed, machine)
    on_card.append(("CUDA context and the allocator's gaps", CONTEXT))
    on_host = [("the process", PROCESS)]
    if placed.parameters_on_host:
        on_host.append(("parameters", e.weight * shape.elements))
    else:
        on_host.append(("weights, while they are loaded", e.weight * (shape.elements - shape.packed)))
    if placed.parameters_on_host and placed.parameters_locked and machine.rounded:
        rounding = lost_to_rounding(e.weight * numel for numel in shape.tensors)
        on_host.append(("page-locked memory, rounded up to powers of two", rounding))
    found = [Item("card", *each) for each in on_card] + [Item("host", *each) for each in on_host]
    return [item for item in found if item.size]


def batch_items(shape, sample, rows, row):
    """[Item] of what passes over `rows` rows hold on the card."""
    of_row = row_bytes(shape, sample, row)
    found = [
        (f"keys and values of {rows} rows of {row} tokens", rows * of_row.cache),
        ("activations of a pass over whole rows", rows * of_row.activations),
        ("logits of a block, and drawing from them", rows * of_row.logits + drawing_bytes(shape, sample, rows)),
    ]
    return [Item("card", name, size) for name, size in found if size]

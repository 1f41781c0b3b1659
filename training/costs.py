"""What a pair costs in time: operations on the card, and bytes over the bus between host and card, pass by pass.

    footprint.Shape + ds_config + arguments -> work_of(), training_cost(), scoring_cost()

The passes are those that scoring/passes.py divides an optimizer step into, if all rows have the same lengths. ZeRO-3
fetches each weight once in a pass without a graph and twice in one with a graph, but the head once, which the backward
pass begins with (training/fetches.py; tests/training/test_fetches.py compares). Not counted: the optimizer's arithmetic
on the host, what the host needs to start the card's kernels, and memory-bound operations such as norms; --tflops is
half of a peak for their sake.

L length, D width, n response tokens, S states.
"""

from typing import NamedTuple

import numpy as np

from models import quantized
from scoring import noise, objective, passes
from training.footprint import bytes_per_element, disk_items, placement, streamed

SFT_SHARE = 0.5  # of a response's tokens that sft_noise masks, on average


class Lengths(NamedTuple):
    """Tokens of every row."""

    prompt: int
    response: int

    @property
    def row(self):
        return self.prompt + self.response


class Work(NamedTuple):
    """The rows of an optimizer step on one rank."""

    lengths: Lengths
    pieces: int  # pairs or, under --loss_type sft, micro-batches
    pairs: int  # pairs or rows
    rows: int  # of a piece, without a gradient or with
    graph_rows: int  # of a piece, that carry the gradient
    scored_rows: int  # of a pair in the reference job or as a held-out pair
    share: float  # of a response's tokens that a row scores, on average
    is_linear: bool  # no pass without a graph is needed
    tokens_per_forward: int = 1

    @property
    def noun(self):
        return "row" if self.is_linear else "pair"

    @property
    def most_tokens(self):
        """Tokens of a forward pass that --tokens_per_forward auto takes at most."""
        length = self.lengths.row
        return passes.most_tokens(length, self.rows * length * self.pieces // self.pairs, self.pairs)

    @property
    def divided(self):
        """(rows of each pass without a graph, rows of each pass with one)."""
        length = self.lengths.row
        rows, graph_rows = ([[length] * count] * self.pieces for count in (self.rows, self.graph_rows))
        found = passes.divide(rows, graph_rows, self.tokens_per_forward, is_linear=self.is_linear)
        whole = [self.rows * len(pieces) for pieces in found.whole]
        return [len(each) for each in found.without_graph], whole + [len(each) for each in found.with_graph]

    @property
    def tokens_in_graph(self):
        """Tokens whose activations are held at once, at most."""
        return self.lengths.row * max(self.divided[1])


class Pass(NamedTuple):
    """What a forward pass, and its backward pass if it has one, costs."""

    operations: float
    bus: float  # bytes between host and card
    memory: float = 0  # bytes between the card's memory and its cores, for weights in 4 bits
    ssd: float = 0  # bytes that are read and written, which overlap with nothing

    def seconds(self, machine, overlap=True):
        """overlap: whether what crosses the bus is hidden behind arithmetic, as far as there is enough of that."""
        computing = self.operations / (machine.tflops * 1e12) + self.memory / (machine.memory_gbs * 1e9)
        copying = self.bus / (machine.pcie_gbs * 1e9)
        swapping = self.ssd / (machine.ssd_gbs * 1e9)
        return swapping + (max(computing, copying) if overlap else computing + copying)


class Cost(NamedTuple):
    """Of `pairs` pairs, or rows, on one rank."""

    passes: list
    pairs: float

    def seconds(self, machine, overlap=True):
        """Of one pair."""
        return sum(each.seconds(machine, overlap) for each in self.passes) / self.pairs

    @property
    def operations(self):
        """Of one pair."""
        return sum(each.operations for each in self.passes) / self.pairs

    @property
    def bus(self):
        """Bytes of one pair."""
        return sum(each.bus for each in self.passes) / self.pairs


def work_of(lengths, noise_args, train_args, diffusion_steps):
    """Work of a run, at one row per forward pass. diffusion_steps: T, where the arguments may still say auto."""
    batch, micro_steps = train_args.per_device_train_batch_size, train_args.gradient_accumulation_steps
    if train_args.loss_type == "sft":
        padded = lengths._replace(response=max(lengths.response, train_args.sft_pad_to))
        return Work(padded, micro_steps, batch * micro_steps, batch, batch, 1, SFT_SHARE, is_linear=True)
    estimator, R = noise_args.estimator, noise_args.trajectories
    if estimator == "auto":
        estimator = noise.automatic_estimator(noise_args.order)
    states, carrying = objective.counts(train_args, noise.state_count(estimator, diffusion_steps, R))
    pairs, share = batch * micro_steps, scored_share(lengths.response, estimator, diffusion_steps, R)
    return Work(lengths, pairs, pairs, sum(states), sum(carrying), sum(states[:2]), share, is_linear=False)


def scored_share(n, estimator, T, R):
    """The share of a response's n tokens that a state scores, on average."""
    masked = noise.state_masks(n, estimator, T, R, np.random.default_rng(0))  # (S, n)
    return float((noise.state_weights(masked, estimator, T, R) > 0).mean())


def forward_operations(shape, work):
    """(blocks, head) of one row. Matrices: 2 per element and token; attention: 4 L D per token and layer."""
    length = work.lengths.row
    blocks = length * (2 * shape.block_weights + shape.layers * 4 * length * shape.query_width)
    return blocks, work.share * work.lengths.response * 2 * shape.head


def training_cost(shape, work, ds, model_args, machine):
    """Cost of an optimizer step."""
    blocks, head = forward_operations(shape, work)
    forward = blocks + head
    recompute = head  # models/head.py always makes its logits again
    if model_args.gradient_checkpointing:
        recompute += blocks
    backward_by_input = blocks + head
    backward_by_weight = 0 if shape.frozen else blocks + head  # LoRA's adapters are small
    with_graph = forward + recompute + backward_by_input + backward_by_weight

    fetched, unpacked = fetched_bytes(shape, ds, model_args, machine), unpacked_bytes(shape, model_args)
    again = max(0, fetched - bytes_per_element(ds, model_args).weight * shape.head)  # in a backward pass
    gradient = gradient_bytes(shape, ds, model_args)
    unpackings = 3 if model_args.gradient_checkpointing else 2
    plain_passes, graph_passes = work.divided
    made = [Pass(rows * forward, fetched, unpacked) for rows in plain_passes]
    for index, rows in enumerate(graph_passes):
        sums = gradient if index == 0 else 2 * gradient  # to the host; from the second pass on they are fetched first
        made.append(Pass(rows * with_graph, fetched + again + sums, unpackings * unpacked))
    swapped = 2 * sum(item.size for item in disk_items(shape, ds, model_args))  # read, and written
    return Cost([*made, Pass(0, step_bytes(shape, ds, model_args), ssd=swapped)], work.pairs)


def scoring_cost(shape, work, ds, model_args, machine):
    """Cost of scores without a gradient: in the reference job, or of held-out pairs."""
    tokens = max(work.tokens_per_forward, passes.ENOUGH)
    rows = max(1, tokens // work.lengths.row)
    forward = rows * sum(forward_operations(shape, work))
    fetched, unpacked = fetched_bytes(shape, ds, model_args, machine), unpacked_bytes(shape, model_args)
    return Cost([Pass(forward, fetched, unpacked)], rows / work.scored_rows)


def fetched_bytes(shape, ds, model_args, machine):
    """Bytes that a pass over the model brings to the card, if the weights are on the host."""
    if not placement(ds).parameters_on_host:
        return 0
    return bytes_per_element(ds, model_args).weight * streamed(shape, ds["zero_optimization"], machine.ranks)


def unpacked_bytes(shape, model_args):
    """Bytes read and written to unpack all weights in 4 bits once, to 16."""
    return shape.packed * (quantized.BYTES + 2) if model_args.load_in_4bit else 0


def gradient_bytes(shape, ds, model_args):
    """Bytes of the gradients that a backward pass sends to the host."""
    if not placement(ds).optimizer_on_host:
        return 0
    return bytes_per_element(ds, model_args).weight * sum(shape.trained)


def step_bytes(shape, ds, model_args):
    """Bytes over the bus of an optimizer step: the gradients, and the new weights."""
    placed, e = placement(ds), bytes_per_element(ds, model_args)
    if not placed.optimizer_on_host:
        return 0
    new_weights = 0 if placed.parameters_on_host else e.weight
    return sum(shape.trained) * (e.gradient + new_weights)

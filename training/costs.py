"""What a pair costs in time: operations on the card, and bytes over the bus between host and card.

    footprint.Shape + ds_config + arguments -> work_of(), training_cost(), scoring_cost()

Upper limits: every sequence has `length` tokens, all of them scored, and ZeRO-3 fetches every parameter for every pass.

L length, D width.
"""

import math
from typing import NamedTuple

from scoring import noise, objective
from training.footprint import bytes_per_element, disk_items, placement


class Work(NamedTuple):
    """The sequences that are scored together: those of a pair, or under --loss_type sft of a batch of rows."""

    states: list  # of each response
    with_gradient: list  # of each response, the states that carry the gradient
    length: int  # tokens of a sequence, at most
    pairs: int  # pairs or rows that these are
    tokens_per_forward: int = 1

    @property
    def sequences_per_pass(self):
        """Sequences in a forward pass, at most."""
        return max(1, self.tokens_per_forward // self.length)

    @property
    def in_one_graph(self):
        """Whether one forward pass scores everything, so that none is needed without a graph."""
        return self.states == self.with_gradient and sum(self.states) <= self.sequences_per_pass

    @property
    def backward_passes(self):
        return self.forwards(self.with_gradient)

    @property
    def sequences_in_graph(self):
        """Sequences whose activations are held at once."""
        return min(self.sequences_per_pass, sum(self.with_gradient))

    def forwards(self, states):
        """Forward passes for responses of so many `states`."""
        return math.ceil(sum(states) / self.sequences_per_pass)


class Cost(NamedTuple):
    """Of one pair, or row, on one rank."""

    operations: float
    bus: float  # bytes
    ssd: float = 0  # bytes that are read and written

    def seconds(self, machine):
        """The slower of the first two, which overlap, and the SSD's, which overlaps with nothing."""
        overlapping = max(self.operations / (machine.tflops * 1e12), self.bus / (machine.pcie_gbs * 1e9))
        return overlapping + self.ssd / (machine.ssd_gbs * 1e9)


def work_of(data_args, noise_args, train_args, diffusion_steps):
    """Work of a run, at one state per forward pass. diffusion_steps: T, where the arguments may still say auto."""
    if train_args.loss_type == "sft":
        rows = train_args.per_device_train_batch_size
        return Work([rows], [rows], data_args.max_length + train_args.sft_pad_to, rows, rows)
    count = noise.state_count(noise_args.estimator, diffusion_steps, noise_args.trajectories)
    states, with_gradient = objective.counts(train_args, count)
    return Work(states, with_gradient, data_args.max_length, 1)


def forward_operations(shape, length):
    """(blocks, head) of one sequence. Matrices: 2 per element and token; attention: 4 L D per token and layer."""
    blocks = length * (2 * shape.block_weights + shape.layers * 4 * length * shape.width)
    return blocks, length * 2 * shape.head


def training_cost(shape, work, ds, model_args, train_args):
    """Cost of a pair's forward and backward passes, and of its share of the optimizer step."""
    blocks, head = forward_operations(shape, work.length)
    forward = blocks + head
    recompute = head  # models/head.py always makes its logits again
    if model_args.gradient_checkpointing:
        recompute += blocks
    backward_by_input = blocks + head
    backward_by_weight = blocks + head
    if shape.frozen:
        backward_by_weight = 0  # LoRA's adapters are small
    with_graph = forward + recompute + backward_by_input + backward_by_weight
    without_graph = 0 if work.in_one_graph else sum(work.states)
    operations = without_graph * forward + sum(work.with_gradient) * with_graph

    fetches = 2 * work.forwards(work.with_gradient)  # forwards, and backwards
    if not work.in_one_graph:
        fetches += work.forwards(work.states)
    bus = fetches * fetched_bytes(shape, ds, model_args)
    pairs_a_step = train_args.per_device_train_batch_size * train_args.gradient_accumulation_steps
    backwards = pairs_a_step // work.pairs * work.backward_passes
    step = step_bytes(shape, ds, model_args, backwards)
    swapped = 2 * sum(item.size for item in disk_items(shape, ds, model_args))  # read, and written
    return Cost(operations / work.pairs, bus / work.pairs + step / pairs_a_step, swapped / pairs_a_step)


def scoring_cost(shape, work, ds, model_args):
    """Cost of a pair's two scores without a gradient: in the reference job, or as a held-out pair."""
    responses = work.states[:2]
    operations = sum(responses) * sum(forward_operations(shape, work.length))
    bus = work.forwards(responses) * fetched_bytes(shape, ds, model_args)
    return Cost(operations / work.pairs, bus / work.pairs)


def fetched_bytes(shape, ds, model_args):
    """Bytes that a pass over the model brings to the card: every weight if they are on the host."""
    return bytes_per_element(ds, model_args).weight * shape.elements if placement(ds).parameters_on_host else 0


def step_bytes(shape, ds, model_args, backwards):
    """Bytes over the bus for the gradients of an optimizer step of so many backward passes, and for the new weights."""
    placed, e = placement(ds), bytes_per_element(ds, model_args)
    if not placed.optimizer_on_host:
        return 0
    sums_to_host = backwards * e.weight
    sums_fetched = (backwards - 1) * e.weight  # the sum so far, to be added to
    gradient = e.gradient
    new_weights = 0 if placed.parameters_on_host else e.weight
    return sum(shape.trained) * (sums_to_host + sums_fetched + gradient + new_weights)

"""What a pair costs in time: operations on the card, and bytes over the bus between host and card, pass by pass.

    shapes.Shape + ds_config + arguments -> work_of(), training_cost(), scoring_cost()

The rows are those that scoring/states.py makes of random masks, and the passes those that scoring/passes.py divides an
optimizer step into, if all responses have the same lengths. ZeRO-3 fetches each weight once in a pass without a graph
and twice in one with a graph, but the head once, which the backward pass begins with (training/fetches.py;
tests/training/test_fetches.py compares). Not counted: the optimizer's arithmetic on the host, what the host needs to
start the card's kernels, and memory-bound operations such as norms; --tflops is half of a peak for their sake.

L length, D width, n response tokens, S states. Of a shared row: C clean tokens, m tokens of a copy.
"""

from typing import NamedTuple

import numpy as np

import losses
from models import quantized
from models.families import Masking
from models.rows import SharedRow
from scoring import noise, objective, passes, recipe
from scoring.states import response_states
from training.activations import Graph
from training.footprint import bytes_per_element, disk_items, placement, streamed


class Lengths(NamedTuple):
    """Tokens of every prompt and response."""

    prompt: int
    response: int

    @property
    def row(self):
        return self.prompt + self.response


class Row(NamedTuple):
    """A row of a forward pass."""

    layout: int | SharedRow  # its length, or a block-causal model's clean text and copies
    scored: int  # tokens whose log-probabilities are read

    @property
    def tokens(self):
        return self.layout if isinstance(self.layout, int) else self.layout.length

    @property
    def products(self):
        """Queries times keys, of one head: SDPA with a mask makes all of them, seen or not."""
        if isinstance(self.layout, int):
            return self.layout**2
        clean = self.layout.clean
        return clean**2 + sum(len(copy) * (clean + len(copy)) for copy in self.layout.copies)

    @property
    def graph(self):
        """The activations.Graph of this row, all of whose tokens that can be scored are."""
        if isinstance(self.layout, int):
            return Graph(self.tokens, self.tokens)
        clean, copies = self.layout.clean, [len(copy) for copy in self.layout.copies]
        masks = clean**2 + sum(length * (clean + length) for _, _, length in self.layout.alike())
        return Graph(self.tokens, sum(copies), clean, sum(clean + length for length in copies), masks)


class Work(NamedTuple):
    """The rows of an optimizer step on one rank."""

    lengths: Lengths
    pieces: int  # pairs or, under --loss_type sft, micro-batches
    pairs: int  # pairs or rows
    responses: list  # the States of a piece's responses
    carrying: list  # the States of each that carry the gradient
    is_linear: bool  # no pass without a graph is needed
    tokens_per_forward: int = 1
    apart: tuple = ()  # the States of a piece's responses that are scored before, without a graph: KTO's mismatched one
    noun: str = "pair"

    @property
    def least_tokens(self):
        """Tokens of the longest row with one state: the fewest of a forward pass."""
        return max(row.tokens for row in self.rows(self.responses, 1))

    @property
    def most_tokens(self):
        """Tokens of a forward pass that --tokens_per_forward auto takes at most."""
        of_a_piece = sum(states.tokens for states in self.responses)
        return passes.most_tokens(self.least_tokens, of_a_piece * self.pieces // self.pairs, self.pairs)

    @staticmethod
    def rows(responses, tokens):
        """[Row] of the States of `responses` at `tokens` a pass."""
        found = []
        for states in responses:
            for row in states.rows(tokens):
                layout = states.length(row) if states.blocks is None else states.shared(row)
                found.append(Row(layout, int((states.weight[list(row)] > 0).sum())))
        return found

    @property
    def divided(self):
        """([[Row]] of each pass without a graph, the same of each pass with one)."""
        tokens = self.tokens_per_forward
        rows, graph_rows = self.rows(self.responses, tokens), self.rows(self.carrying, tokens)
        lengths, graph_lengths = ([[row.tokens for row in each]] * self.pieces for each in (rows, graph_rows))
        found = passes.divide(lengths, graph_lengths, tokens, is_linear=self.is_linear)
        whole = [rows * len(pieces) for pieces in found.whole]
        without_graph = [[rows[index] for _, index in each] for each in found.without_graph]
        if apart := self.rows(self.apart, tokens) * self.pieces:
            filled = passes.fill([row.tokens for row in apart], tokens, False)
            without_graph = [[apart[index] for index in each] for each in filled] + without_graph
        return without_graph, whole + [[graph_rows[index] for _, index in each] for each in found.with_graph]

    @property
    def largest_graph(self):
        """The activations.Graph of the most tokens that are held at once."""
        graphs = [Graph.of(row.graph for row in rows) for rows in self.divided[1]]
        return max(graphs, key=tokens_of)

    def graph_of(self, tokens):
        """The activations.Graph of rows with so many tokens in all."""
        rows = self.rows(self.responses, tokens)
        return rows[0].graph.scaled(tokens / rows[0].tokens)


def tokens_of(graph):
    """To compare activations.Graph by."""
    return graph.tokens


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


def work_of(lengths, noise_args, train_args, diffusion_steps, blocks=None):
    """Work of a run, at one state per forward pass.

    noise_args: settled (noise.settle). diffusion_steps: T, where the arguments may still say auto. blocks:
    families.Blocks of a block-causal model.
    """
    batch, micro_steps = train_args.per_device_train_batch_size, train_args.gradient_accumulation_steps
    pairs = batch * micro_steps
    if train_args.loss_type == "sft":
        padded = lengths._replace(response=max(lengths.response, train_args.sft_pad_to))
        rows = [sft_states(padded, blocks)] * batch
        return Work(padded, micro_steps, pairs, rows, rows, is_linear=True, noun="row")
    drawn = drawn_states(lengths, noise_args, diffusion_steps, blocks)
    counts, carrying = objective.counts(train_args, len(drawn.inputs))
    responses = [[first_of(drawn, count) for count in each[:2]] for each in (counts, carrying)]
    if losses.has_nll(train_args):
        responses = [[*each, sft_states(lengths, blocks)] for each in responses]
    if train_args.loss_type == "kto":
        [own, mismatched], [carrying, _] = responses
        return Work(lengths, pairs, pairs, [own], [carrying], is_linear=False, apart=(mismatched,), noun="row")
    return Work(lengths, pairs, pairs, *responses, is_linear=False)


def drawn_states(lengths, noise_args, diffusion_steps, blocks):
    """The States of one response, with masks as they may be drawn."""
    estimator, R = noise.chosen_estimator(noise_args, blocks is not None), noise_args.trajectories
    divided = recipe.partition(lengths.prompt, lengths.response, blocks)
    rng = np.random.default_rng(0)
    masked = noise.state_masks(lengths.response, estimator, diffusion_steps, R, rng, **divided)  # (S, n)
    return states_of(lengths, masked, noise.state_weights(masked, estimator, diffusion_steps, R, **divided), blocks)


def first_of(states, count):
    """The first `count` of some States."""
    return states._replace(**{name: getattr(states, name)[:count] for name in ("inputs", "targets", "weight")})


def states_of(lengths, masked, weight, blocks):
    """The States of a response whose tokens do not matter."""
    prompt, response = np.zeros(lengths.prompt, np.int64), np.zeros(lengths.response, np.int64)
    return response_states(prompt, response, masked, weight, *Masking(0, blocks))


def sft_states(lengths, blocks):
    """The States of SFT's one row: every second token is masked, as many as on average."""
    masked = np.arange(lengths.response)[None] % 2 == 0
    return states_of(lengths, masked, masked, blocks)


def operations_of(shape, rows):
    """(blocks, head) of [Row]. Matrices: 2 per element and token; attention: 4 D per product and layer."""
    matrices = 2 * shape.block_weights * sum(row.tokens for row in rows)
    attention = 4 * shape.query_width * len(shape.layers) * sum(row.products for row in rows)
    return matrices + attention, 2 * shape.head * sum(row.scored for row in rows)


def training_cost(shape, work, ds, model_args, machine):
    """Cost of an optimizer step."""
    fetched, unpacked = fetched_bytes(shape, ds, model_args, machine), unpacked_bytes(shape, model_args)
    again = max(0, fetched - bytes_per_element(ds, model_args).weight * shape.head)  # in a backward pass
    gradient = gradient_bytes(shape, ds, model_args)
    unpackings = 3 if model_args.gradient_checkpointing else 2
    plain_passes, graph_passes = work.divided
    made = [Pass(sum(operations_of(shape, rows)), fetched, unpacked) for rows in plain_passes]
    for index, rows in enumerate(graph_passes):
        sums = gradient if index == 0 else 2 * gradient  # to the host; from the second pass on they are fetched first
        operations = operations_with_graph(shape, rows, model_args)
        made.append(Pass(operations, fetched + again + sums, unpackings * unpacked))
    swapped = 2 * sum(item.size for item in disk_items(shape, ds, model_args))  # read, and written
    return Cost([*made, Pass(0, step_bytes(shape, ds, model_args), ssd=swapped)], work.pairs)


def operations_with_graph(shape, rows, model_args):
    """Operations of a forward and a backward pass over [Row]."""
    blocks, head = operations_of(shape, rows)
    recompute = head  # models/head.py always makes its logits again
    if model_args.gradient_checkpointing:
        recompute += blocks
    backward_by_input = blocks + head
    backward_by_weight = 0 if shape.frozen else blocks + head  # LoRA's adapters are small
    return blocks + head + recompute + backward_by_input + backward_by_weight


def scoring_cost(shape, work, ds, model_args, machine):
    """Cost of scores without a gradient: in the reference job, or of held-out pairs."""
    tokens = max(work.tokens_per_forward, passes.ENOUGH)
    scored = [*work.responses, *work.apart][:2] if not work.is_linear else work.responses[:1]
    rows = work.rows(scored, tokens)
    pairs = max(1, tokens // rows[0].tokens) / len(rows)  # in a pass full of them
    operations = pairs * sum(operations_of(shape, rows))
    fetched, unpacked = fetched_bytes(shape, ds, model_args, machine), unpacked_bytes(shape, model_args)
    return Cost([Pass(operations, fetched, unpacked)], pairs)


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

"""Forward passes of the sampler, each over all responses that are being filled, whatever their lengths.

Every response is a generator (bidirectional.py, blockwise.py): it yields what it wants to read next, and is sent what
the model predicts. A pass reads for all of them at once. A response that has ended leaves, and the next one takes its
place, so that passes stay full.

With guidance, z = u + (cfg_scale + 1)(c - u): c are the logits and u those without the prompt.

N predicted places of a pass, V vocabulary, L tokens of a row.
"""

import itertools
import time
from typing import NamedTuple

import torch

from models.architecture import bare
from models.attention import Rows
from models.cache import Store, Window, Windows
from reasoning import commits


class Read(NamedTuple):
    """What a response wants to read of its row: tokens first..stop, to predict some of them."""

    ids: torch.Tensor  # (L,) int64, on the CPU
    prompt: int  # tokens
    first: int
    stop: int
    keys: int  # tokens of the row, from its start, that are seen
    places: torch.Tensor  # (n,) int64: whose logits are read
    mask: torch.Tensor | None = None  # (stop - first, keys) bool: what is seen of them


class Special(NamedTuple):
    """Token ids that a sampler must know."""

    mask_id: int
    ends: torch.Tensor  # ids that end a text, int64
    eos: int | None = None


class Flight:
    """A response that is being filled."""

    def __init__(self, index, filling, generator):
        self.index, self.filling, self.generator = index, filling, generator
        self.read, self.passes, self.tokens = next(filling), 0, 0

    def take(self, prediction):
        """Hand over what a pass predicts. Returns the response's ids once it is complete."""
        self.passes, self.tokens = self.passes + 1, self.tokens + self.read.stop - self.read.first
        try:
            self.read = self.filling.send(prediction)
        except StopIteration as end:
            return end.value


class Passes:
    """Forward passes of one model, over at most `size` responses of at most `longest` tokens."""

    def __init__(self, model, sample, special, size, longest):
        self.model, self.sample, self.special, self.size = model, sample, special, size
        self.device, self.joins_rows = model.device, bare(model).joins_rows
        self.ids_device = self.device
        if sample.deepspeed:
            from training import fetches  # deepspeed's import is slow, and nothing else of sampling needs it

            self.ids_device = fetches.ids_device(model, self.device)
        self.never = special.mask_id if bare(model).blocks else None  # a block-causal model never says the mask token
        streams = 2 if sample.cfg_scale else 1
        self.store = Store(streams * size, longest) if bare(model).blocks or sample.cache != "none" else None

    def predict(self, flights):
        """[(tokens, sure)], (n,) each and on the CPU, for {slot: Flight} in the order of slots."""
        reads = {slot: flight.read for slot, flight in flights.items()}
        if self.sample.cfg_scale:
            blind = {slot + self.size: without_prompt(read, self.special) for slot, read in reads.items()}
            c, u = self.logits(reads | blind).chunk(2)  # (N, V) each
            logits = u + (self.sample.cfg_scale + 1) * (c - u)
        else:
            logits = self.logits(reads)
        if self.sample.logits_eos_inf:
            logits[:, self.special.eos] = -torch.inf
        counts = [len(read.places) for read in reads.values()]
        uniforms = None
        if self.sample.temperature:
            drawn = [torch.rand(n, generator=flight.generator) for n, flight in zip(counts, flights.values())]
            uniforms = torch.cat(drawn).to(self.device, non_blocking=True)
        ends = self.special.ends.to(self.device, non_blocking=True)
        tokens, sure = commits.predict(logits, uniforms, self.sample, ends, self.never)
        return list(zip(tokens.cpu().split(counts), sure.cpu().split(counts)))

    def logits(self, reads):
        """Logits (N, V) at the places of {slot: Read}, in their order."""
        if self.joins_rows:
            return self.forward(reads)
        alike = itertools.groupby(reads.items(), length_of)  # a forward pass for each run of rows of equal length
        return torch.cat([self.forward(dict(group)) for _, group in alike])

    def forward(self, reads):
        """logits() by one forward pass."""
        ids, positions, start = [], [], 0
        for read in reads.values():
            ids.append(read.ids[read.first : read.stop])
            positions.append(read.places + (start - read.first))
            start += read.stop - read.first
        positions = torch.cat(positions).to(self.device, non_blocking=True)
        if not self.joins_rows:
            return self.model(input_ids=torch.stack(ids).to(self.ids_device), positions=positions).logits
        rows = self.rows(reads)
        ids = torch.cat(ids)[None].to(self.ids_device, non_blocking=True)  # (1, tokens of the pass)
        return self.model(input_ids=ids, positions=positions, rows=rows).logits

    def rows(self, reads):
        """Where the rows of a pass stand, for the model's attention."""
        if self.store is None:
            return Rows([len(read.ids) for read in reads.values()], self.device)
        windows = [Window(slot, each.first, each.stop, each.keys, each.mask) for slot, each in reads.items()]
        return Windows(self.store, windows, self.device)


def length_of(item):
    """Of the row of (slot, Read)."""
    return len(item[1].ids)


def without_prompt(read, special):
    """A Read with masks in the prompt's place."""
    ids = read.ids.clone()
    ids[: read.prompt] = special.mask_id
    return read._replace(ids=ids)


def run(passes, waiting, start, pace=None):
    """Yields [(index, ids)] of the responses that end, after each pass in which some do.

    waiting: a deque of indices of responses, which this empties; start(index) -> Flight. If a pass runs out of memory,
    those that were being filled wait again. pace: told of each pass and of each response that ends (pace.py).
    """
    flights, began = {}, time.perf_counter()  # {slot: Flight}, in the order of slots
    try:
        while waiting or flights:
            free = [slot for slot in range(passes.size) if slot not in flights]
            new = {slot: start(waiting.popleft()) for slot in free[: len(waiting)]}
            flights = dict(sorted((flights | new).items()))
            predictions = passes.predict(flights)
            if pace:
                tokens = sum(flight.read.stop - flight.read.first for flight in flights.values())
                done = time.perf_counter()
                pace.passed(done - began, tokens, len(flights))
                began = done
            ended = []
            for (slot, flight), prediction in zip(list(flights.items()), predictions):
                ids = flight.take(prediction)
                if ids is not None:
                    ended.append((flight.index, ids))
                    del flights[slot]
                    if pace:
                        pace.ended(flight.passes, flight.tokens)
            if ended:
                yield ended
    except torch.OutOfMemoryError:
        waiting.extendleft(flight.index for flight in reversed(flights.values()))
        raise

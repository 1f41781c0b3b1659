"""The sampler of block-causal models: block after block, each denoised while it sees the finished ones before it.

    models.families.Blocks says how a family samples: SDAR, TraDo, DiRL and LLaDA2 count blocks from the row's start, so
    that a prompt's last tokens share the first block; A2D's bd3lm and Nemotron count from the prompt's end. Nemotron
    and Fast-dLLM v2 predict a block's first token from the clean token before it. Fast-dLLM v2's logits are shifted.

A finished block never changes, and no earlier token sees it, so that its keys and values are kept (models/cache.py):
exact, not an approximation. A pass reads all tokens that are not kept, up to the end of the current block. So the next
block's first pass reads a finished block for the last time, and caching takes no passes of its own.
All blocks are whole. A last block that is longer than the response is cut.

Sources: SDAR's generate.py (JetAstra/SDAR), LLaDA2.0's generate, bd3lm of dllm, Nemotron-Labs-Diffusion's and Fast-dLLM
v2's generate. The tokens are theirs at temperature 0, except that the mask token is never predicted, where the
originals leave masks behind, fail or do not end, and that a response ends with the block that holds an end.
What differs at other temperatures is in docs/evaluation.md.

R rows whose text has not ended, P prompt tokens, L tokens up to the current block's end, N predicted places,
V vocabulary.
"""

import torch

from models.cache import Cache
from reasoning.commits import choose, commits_per_pass, reveal, row_generator


def blocks_of(model):
    """The families.Blocks of sampler.load()'s model; None if it is bidirectional."""
    return getattr(model, "module", model).blocks


def span(P, gen_length, blocks):
    """(start of the first block that holds a response token, end of the last one) after a prompt of P tokens."""
    start = P if blocks.sampled_from == "prompt" else P - P % blocks.size
    return start, start - (start - P - gen_length) // blocks.size * blocks.size


@torch.no_grad()
def generate(model, prompts, sample, mask_id, eos=None, eot=None, keys=None):
    """Sample a response to each of prompts (B, P) int64, all of one length; returns ids (B, gen_length) int64.

    sample: SampleArguments after arguments.check(); a block_length below the model's block size divides its blocks:
    their parts are filled from left to right. The other arguments: as of sampler.generate().
    """
    (B, P), device, blocks = prompts.shape, model.device, blocks_of(model)
    generators = [row_generator(sample.seed, key) for key in (range(B) if keys is None else keys)]
    ends = torch.tensor(sorted({eos, eot} - {None}), dtype=torch.long, device=device)
    begin, end = span(P, sample.gen_length, blocks)
    x = torch.full((B, end), mask_id, dtype=torch.long, device=device)
    x[:, :P] = prompts
    rows = torch.arange(B, device=device)  # (R,)
    reader = Reader(model, blocks, begin, Cache(end), eos if sample.logits_eos_inf else None)
    for start in range(begin, end, blocks.size):
        part, draws = x[rows, : start + blocks.size], [generators[i] for i in rows.tolist()]  # (R, L)
        # 1. Where the family does so, take the block's first token from the clean token before it.
        if blocks.first_from_clean and start >= max(P, 1):
            part[:, start] = choose(reader.first(part, start), [1] * len(rows), draws, sample.temperature, mask_id)
        # 2. Fill the block, or its parts from left to right.
        for first in range(start, part.shape[1], sample.block_length):
            left, right = max(first, P), first + sample.block_length
            window = part[:, left:right]  # a view: what is revealed is part's
            for commits in commits_per_pass(sample):
                masked = window == mask_id
                if not masked[:, : max(P + sample.gen_length - left, 0)].any():  # the rest is cut
                    break
                row, place = masked.nonzero(as_tuple=True)  # (N,), (N,) in row order
                logits = reader.denoise(part, start, row, left + place)  # (N, V)
                window.copy_(reveal(window, masked, logits, draws, commits, sample, ends, mask_id))
        # 3. Leave out rows whose text ends in this block.
        x[rows, : part.shape[1]] = part
        live = ~torch.isin(part[:, max(start, P) :], ends).any(1)
        rows = rows[live]
        if not len(rows):
            break
        reader.cache.select(live)
    return x[:, P : P + sample.gen_length].to(prompts.device)


class Reader:
    """Forward passes over the tokens that are not in the cache. Afterwards it holds all before the current block."""

    def __init__(self, model, blocks, begin, cache, eos):
        """begin: where some block begins. eos: an id that is never predicted, or None."""
        self.model, self.blocks, self.begin, self.cache, self.eos = model, blocks, begin, cache, eos

    def denoise(self, part, start, row, place):
        """Logits (N, V) of tokens (row, place), (N,) each, of part (R, L), whose last block begins at `start`."""
        if self.blocks.shift:
            place = (place - 1).clamp(min=0)  # the row's first token has none before it
        return self.read(part, start, row, place)

    def first(self, part, start):
        """Logits (R, V) of the token at `start` of each row, from the clean token before it."""
        row = torch.arange(len(part), device=part.device)
        return self.read(part[:, :start], start, row, torch.full_like(row, start - 1))

    def read(self, part, start, row, place):
        done = self.cache.length
        seen = visible(done, start, part.shape[1], self.blocks, self.begin)  # (L - done, L)
        mask = None if seen.all() else seen.to(part.device)[None, None]
        positions = row * (part.shape[1] - done) + place - done
        logits = self.model(input_ids=part[:, done:], attention_mask=mask, positions=positions, cache=self.cache).logits
        self.cache.keep(start)
        if self.eos is not None:
            logits[:, self.eos] = -torch.inf
        return logits


def visible(done, start, stop, blocks, begin):
    """Which of tokens 0..stop each of done..stop sees, bool: clean ones up to `start`, then a block to denoise."""
    query, key = torch.arange(done, stop)[:, None], torch.arange(stop)
    if blocks.is_causal:
        return (key <= query) | (query >= start)
    return (key - begin) // blocks.size <= (query - begin) // blocks.size

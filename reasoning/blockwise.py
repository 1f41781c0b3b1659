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

P prompt tokens.
"""

import functools

import torch

from reasoning.commits import commit, commits_per_pass
from reasoning.passes import Read


def span(P, gen_length, blocks):
    """(start of the first block that holds a response token, end of the last one) after a prompt of P tokens."""
    start = P if blocks.sampled_from == "prompt" else P - P % blocks.size
    return start, start - (start - P - gen_length) // blocks.size * blocks.size


def fill(prompt, sample, special, generator, blocks):
    """Fill a response to prompt (P,) int64: yields each Read, is sent what it predicts, returns ids (gen_length,).

    sample: SampleArguments after arguments.check(); a block_length below the model's block size divides its blocks:
    their parts are filled from left to right. special: passes.Special. generator: of the response's own noise.
    """
    P, limit = len(prompt), len(prompt) + sample.gen_length
    begin, end = span(P, sample.gen_length, blocks)
    ids = torch.cat((prompt, torch.full((end - P,), special.mask_id)))
    done = 0  # tokens whose keys and values are kept
    for start in range(begin, end, blocks.size):
        stop = start + blocks.size
        # 1. Where the family does so, take the block's first token from the clean token before it.
        if blocks.first_from_clean and start >= max(P, 1):
            seen = visible(done, start, start, blocks, begin)
            ids[start : start + 1], _ = yield Read(ids, P, done, start, start, torch.tensor([start - 1]), seen)
            done = start
        # 2. Fill the block, or its parts from left to right.
        for first in range(start, stop, sample.block_length):
            left = max(first, P)
            part = ids[left : first + sample.block_length]  # a view
            for commits in commits_per_pass(sample):
                masked = (part == special.mask_id).nonzero()[:, 0]
                if not (masked < limit - left).any():  # the rest is cut
                    break
                places = left + masked
                if blocks.shift:
                    places = (places - 1).clamp(min=0)  # the row's first token has none before it
                prediction = yield Read(ids, P, done, stop, stop, places, visible(done, start, stop, blocks, begin))
                done = start
                commit(part, masked, prediction, commits, sample, generator)
        # 3. The text ends in the first block that holds an end.
        if torch.isin(ids[max(start, P) : stop], special.ends).any():
            break
    return ids[P:limit]


@functools.lru_cache(maxsize=256)
def visible(done, start, stop, blocks, begin):
    """Which of tokens 0..stop each of done..stop sees, bool: clean ones up to `start`, then a block to denoise.

    None: all of them.
    """
    query, key = torch.arange(done, stop)[:, None], torch.arange(stop)
    if blocks.is_causal:
        seen = (key <= query) | (query >= start)
    else:
        seen = (key - begin) // blocks.size <= (query - begin) // blocks.size
    return None if seen.all() else seen

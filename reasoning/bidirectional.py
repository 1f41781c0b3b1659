"""LLaDA's sampler, of bidirectional models: a response starts as masks; passes commit the most confident predictions.

A response is filled block by block; commits.py says what a pass commits.
Source: Nie et al., arXiv 2502.09992, and ML-GSAI/LLaDA's generate.py. The tokens are the same, except that
  * noise and random confidence come from one CPU generator per response, not from the device's generator;
  * equal confidences are committed from left to right (under confidence_eos_eot_inf every eos has confidence 0);
  * confidence_eos_eot_inf holds for eos at any temperature; in the original, at temperature 0 only;
  * a mask id in the prompt, or one that the model predicts, stays; in the original, later passes may fill it;
  * a response takes no further passes after a block with an end; its text, which is cut there, is the same.

A cache is an approximation (Fast-dLLM, arXiv 2505.22618), because each token sees all others, also later ones. The
first pass of a block reads the whole row, and keeps the keys and values of all its tokens. The block's other passes
read only a part of the row, and see the rest as it was:
    prefix    from the block's start to the row's end
    dual      the block alone
--refresh N reads the whole row in every Nth pass of a block; with 1 nothing is approximated.

P prompt tokens, L = P + gen_length.
"""

import torch

from reasoning.commits import commit, commits_per_pass
from reasoning.passes import Read


def fill(prompt, sample, special, generator, before=0):
    """Fill a response to prompt (P,) int64: yields each Read, is sent what it predicts, returns ids (gen_length,).

    sample: SampleArguments after arguments.check(). special: passes.Special. generator: of the response's own noise.
    before: tokens before a block that a pass must read, too: 1 where logits are shifted.
    """
    P = len(prompt)
    ids = torch.cat((prompt, torch.full((sample.gen_length,), special.mask_id)))  # (L,)
    for start in range(P, len(ids), sample.block_length):
        block = ids[start : start + sample.block_length]  # a view
        for number, commits in enumerate(commits_per_pass(sample)):
            masked = (block == special.mask_id).nonzero()[:, 0]
            if not len(masked):
                break
            first, stop = window(number, start, len(ids), sample)
            prediction = yield Read(ids, P, max(0, first - before), stop, len(ids), start + masked)
            commit(block, masked, prediction, commits, sample, generator)
        if torch.isin(block, special.ends).any():  # the text ends in the first block that holds an end
            break
    return ids[P:]


def window(number, start, length, sample):
    """(first, stop) of the tokens that pass `number` of the block at `start` reads of a row."""
    if sample.cache == "none" or number % (sample.refresh or sample.block_length) == 0:
        return 0, length
    return start, length if sample.cache == "prefix" else start + sample.block_length

"""The noise of supervised fine-tuning: which tokens of a response are hidden, as each family's own training draws them.

n response tokens, S states (copies of a row).
"""

from typing import NamedTuple

import numpy as np

from scoring.noise import fixed_of

EPSILON = 1e-3  # tokens are hidden with probability (1 - EPSILON) t + EPSILON (LLaDA's GUIDELINES.md)


class Recipe(NamedTuple):
    """How a family draws the noise of SFT: t ~ U(low, high), tokens hidden with chance p = (1 - EPSILON) t + EPSILON.

    The loss of a row is sum over hidden tokens of -logp / p over its n tokens or, without is_weighted, their mean.
    """

    low: float = 0.0
    high: float = 1.0
    is_weighted: bool = True
    is_by_block: bool = False  # every block has its own t
    hides_one: bool = False  # if none is hidden, one token is
    is_doubled: bool = False  # a second copy hides what the first one shows
    hides_prompt: bool = False
    fills_block: bool = False  # end tokens that count fill the last block

    @property
    def states(self):
        """S, the copies of a row."""
        return 2 if self.is_doubled else 1


LLADA = Recipe()  # GUIDELINES.md
RECIPES = {  # by model_type, where it is not LLaDA's
    "illada": Recipe(hides_prompt=True),
    "sdar": Recipe(hides_one=True),
    "llada2_moe": Recipe(low=0.3, high=0.8, is_weighted=False, fills_block=True),  # dFactory's
    "a2d-qwen2": Recipe(fills_block=True),  # dllm's
    "a2d-qwen3": Recipe(fills_block=True),
    "a2d-llama": Recipe(fills_block=True),
    "Fast_dLLM_Qwen": Recipe(is_weighted=False, is_by_block=True, is_doubled=True),
}


def draw(n, rng, recipe=LLADA, block=None, fixed=None):
    """One draw of a recipe's noise for n tokens: masked (S, n) bool and weight (S, n) float32; S is 2 if it is doubled.

    block, fixed (n,): of a block-causal model. What is fixed counts as one token, predicted in every state.
    sum(weight * -logp) is the NLL per token.
    """
    fixed = fixed_of(fixed, n)
    first = np.unique(block, return_index=True, return_inverse=True) if recipe.is_by_block else None
    u = rng.random(n)[first[1]][first[2]] if recipe.is_by_block else rng.random()
    p = (1 - EPSILON) * (recipe.low + (recipe.high - recipe.low) * u) + EPSILON
    masked = (rng.random((1, n)) < p) & ~fixed  # (1, n)
    if recipe.hides_one and not masked.any() and not fixed.all():
        masked[0, rng.choice(np.flatnonzero(~fixed))] = True
    if recipe.is_doubled:
        masked = np.concatenate((masked, ~masked & ~fixed))
    counted = masked + fixed / len(masked)  # (S, n)
    if recipe.is_weighted:
        return masked, (np.where(masked, 1 / p, counted) / n).astype(np.float32)
    return masked, (counted / max(counted.sum(), 1)).astype(np.float32)

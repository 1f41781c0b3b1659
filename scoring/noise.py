"""The noise of a masked diffusion language model: trajectories, masks, weights. Pure functions on the CPU.

Every estimator has one form: masked (S, n) booleans say which response tokens are hidden in each state, weight (S, n)
how much each token's log-probability counts there; the score is sum(weight * logp).

    stepwise         trajectories; a token counts in the state that reveals it
    spread           trajectories; the weight of what a state reveals is spread evenly over all that it hides. In random
                     order any of the hidden tokens may be next, so the mean is the same, with less noise
    radau            the same with levels and weights of Radau's quadrature rule, whose bias is far smaller
    elbo             iid levels l ~ U{1..n}, l random tokens hidden, each with weight n/l (arXiv 2505.19223; 2502.09992,
                     equation 6)
    elbo_stratified  the same with one level in each T-th of 1..n

n response tokens, T denoising steps, R trajectories, K noise sets, S states. Trajectories have S = 1 + R(T-1): state 0
is all masks and belongs to every trajectory, state 1 + r(T-1) + (s-1) is trajectory r before step s = 1..T-1. elbo has
S = RT: T levels with R masks each.

Block-causal models have elbo and elbo_stratified, block by block: block (n,) int is the number of each token's block,
fixed (n,) bool the tokens that are never hidden, because the model predicts them from the clean tokens before them. All
S = RT states of a block have a level of their own, stratified one in each S-th of 1..m, where m tokens of the block can
be hidden. docs/method.md has the derivation.
"""

import hashlib
from typing import NamedTuple

import numpy as np

from files import InputError

ESTIMATORS = ("stepwise", "spread", "radau", "elbo", "elbo_stratified")
STATES = {False: (3, 3), True: (4, 1)}  # default T and R of bidirectional and of block-causal models
EPSILON = 1e-3  # SFT masks with probability (1 - EPSILON) t + EPSILON (LLaDA's GUIDELINES.md)


def generator(noise_seed, tokens, side, noise_set=0):
    """The one source of randomness: Philox keyed by content, the same on any machine, in any order.

    tokens: the ids that identify the example (prompt, chosen, rejected). side: what is drawn, such as "pair", "chosen",
    "rejected" or "sft".
    """
    digest = hashlib.sha256(np.ascontiguousarray(tokens, dtype="<u4").tobytes())
    digest.update(f"|{noise_seed}|{side}|{noise_set}".encode())
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest.digest()[:16], "little")))


def automatic_estimator(order, has_blocks=False):
    """The estimator that `--estimator auto` stands for, unless a calibration chooses one."""
    if has_blocks:
        return "elbo_stratified"
    return "stepwise" if order == "blocks" else "spread"


def settle(noise_args, has_blocks):
    """Fill in what the arguments leave to the kind of model: T, R and, unless a calibration gives it, the estimator.

    Raises InputError for what a block-causal model cannot have.
    """
    if has_blocks and noise_args.order == "blocks":
        raise InputError("--order blocks is for bidirectional models; leave it out for a block-causal one")
    if has_blocks and noise_args.estimator in ("stepwise", "spread", "radau"):
        raise InputError(
            f"--estimator {noise_args.estimator} is for bidirectional models; a block-causal one takes elbo_stratified "
            "or elbo"
        )
    for name, default in zip(("diffusion_steps", "trajectories"), STATES[has_blocks]):
        if getattr(noise_args, name) is None:
            setattr(noise_args, name, default)
    if noise_args.estimator == "auto" and noise_args.diffusion_steps != "auto":
        noise_args.estimator = automatic_estimator(noise_args.order, has_blocks)


def side_of(estimator, side, has_blocks=False):
    """The name of the noise of side 0 (chosen) or 1 (rejected), for generator().

    Both responses of a pair share their trajectories, and the masks of their blocks: the same places are hidden in
    both, so that the difference of their scores has less noise. has_blocks: the model is block-causal.
    """
    if estimator.startswith("elbo") and not has_blocks:
        return ("chosen", "rejected")[side]
    return "pair"


def state_count(estimator, T, R):
    """S."""
    return T * R if estimator.startswith("elbo") else 1 + R * (T - 1)


def step_of_state(estimator, T, R):
    """(S,) int64: the denoising step before which each state stands, 0..T-1 (elbo: the number of its level).

    >>> step_of_state("spread", 3, 2).tolist()
    [0, 1, 2, 1, 2]
    """
    if estimator.startswith("elbo"):
        return np.arange(T).repeat(R)
    return np.append(0, np.tile(np.arange(1, T), R))


def state_masks(n, estimator, T, R, rng, block_length=None, block=None, fixed=None):
    """Draw the states of one response: masked (S, n) bool. block, fixed (n,): of a block-causal model."""
    if block is not None:
        return block_masks(np.asarray(block), fixed_of(fixed, n), T * R, rng, estimator == "elbo_stratified")
    if estimator.startswith("elbo"):
        return elbo_masks(n, T, R, rng, estimator == "elbo_stratified")
    cuts = n - radau_levels(n, T)[1:] if estimator == "radau" else None
    return trajectory_masks(trajectories(n, T, R, rng, block_length, cuts), T)


def state_weights(masked, estimator, T, R, block=None, fixed=None):
    """weight (S, n) float32 of each token's log-probability, from the masks alone, as they are stored."""
    if block is not None:
        return block_weights(masked, np.asarray(block), fixed_of(fixed, masked.shape[1]))
    hidden = masked.sum(1, keepdims=True)  # (S, 1)
    if estimator.startswith("elbo"):
        return (masked * (masked.shape[1] / hidden / len(masked))).astype(np.float32)
    if estimator == "radau":
        return quadrature_weights(masked)
    weight = trajectory_weights(masked, T, R)
    if estimator == "spread":
        weight = (masked * (weight.sum(1, keepdims=True) / np.maximum(hidden, 1))).astype(np.float32)
    return weight


def elbo_masks(n, T, R, rng, stratified):
    """T levels l in 1..n, R masks of l random tokens each: masked (RT, n) bool."""
    if stratified:
        level = ((np.arange(T) + rng.random(T)) / T * n).astype(np.int64) + 1
    else:
        level = rng.integers(1, n + 1, T)
    rank = rng.random((T * R, n)).argsort(1).argsort(1)
    return rank < level.repeat(R)[:, None]


def fixed_of(fixed, n):
    """(n,) bool of the tokens that are never hidden; None: there are none."""
    return np.zeros(n, bool) if fixed is None else np.asarray(fixed, bool)


def block_masks(block, fixed, S, rng, stratified):
    """Each block its own level l in 1..m in each state, l of its m tokens hidden: masked (S, n) bool.

    stratified: level number j of a block is in the j-th of S equal parts of 1..m, and hides those tokens that weigh
    least in the levels below it, so that the weights of every token add up to nearly the same. State s takes the level
    number (block + s) mod S of each block: every state has low and high levels.

    All numbers are drawn by token: two responses have the same masks in the blocks that both have.
    """
    numbers, first, index = np.unique(block, return_index=True, return_inverse=True)  # index (n,) of its block
    size = np.bincount(index, ~fixed)  # (blocks,) m
    jitter, rank = rng.random((len(block), 2, S)).swapaxes(0, 1)  # (n, S) each
    u = (np.arange(S) + jitter[first]) / S if stratified else jitter[first]  # (blocks, S)
    level = ((u * size[:, None]).astype(np.int64) + 1)[index].T  # (S, n)
    masked = np.zeros(level.shape, bool)
    covered = np.where(fixed, np.inf, 0.0)  # (n,) the sum of a token's weights so far, but for a factor m/S
    for j in range(S):
        order = np.lexsort((rank[:, j], covered, index))  # block by block, in the order of hiding
        place = np.argsort(order) - first[index]
        masked[j] = (place < level[j]) & ~fixed
        if stratified:
            covered += masked[j] / level[j]
    return np.take_along_axis(masked, (np.arange(S)[:, None] + block) % S, axis=0)


def block_weights(masked, block, fixed):
    """weight (S, n) float32: m/(l S) where hidden with l of the m tokens of the block; 1/S everywhere if fixed."""
    index = np.unique(block, return_inverse=True)[1]
    size = np.bincount(index, ~fixed)[index]  # (n,) m
    level = np.stack([np.bincount(index, hidden)[index] for hidden in masked])  # (S, n)
    weight = np.where(masked, size / np.maximum(level, 1), fixed)
    return (weight / len(masked)).astype(np.float32)


def drawing(estimator, has_blocks):
    """A digest of the masks and weights of a few responses: it changes when this file draws or weighs differently.

    It depends on the estimator, and on whether the model is block-causal; weights are rounded, so that no machine's
    last bits matter.
    """
    digest = hashlib.sha256()
    for n, block_length in ((1, None), (2, None), (9, None), (40, None), (9, 4)):
        if block_length is None or estimator == "stepwise":
            divided = {"block": np.arange(n) // 4} if has_blocks else {}
            masked = state_masks(n, estimator, 3, 2, generator(0, [n], "drawing"), block_length, **divided)
            weight = state_weights(masked, estimator, 3, 2, **divided)
            digest.update(np.packbits(masked).tobytes() + np.rint(weight * 1e4 / np.pi).astype("<i4").tobytes())
    return digest.hexdigest()[:8]


def gradient_states(masked, weight, k, rng):
    """Which k of the S states carry the gradient, and how much more each of them counts: factor (S,) float32.

    Systematic sampling along the trajectory: states by falling number of masks, random among equals, with chances in
    proportion to their weight, at most 1. So sum_s factor_s grad_s has the mean of sum_s grad_s. At most k factors are
    not 0; fewer if fewer states have weight.
    """
    mass = weight.sum(1, dtype=np.float64)  # (S,)
    if (mass > 0).sum() <= k:
        return (mass > 0).astype(np.float32)
    chance = k * mass / mass.sum()
    while (sure := chance > 1).any():  # these are taken for certain, and the others share what is left of k
        sure |= chance == 1
        chance = np.where(sure, 1, (k - sure.sum()) * mass / mass[~sure].sum())
    order = np.lexsort((rng.permutation(len(mass)), -masked.sum(1)))
    ends = np.floor(chance[order].cumsum() + rng.random() - 1e-9)
    taken = order[np.diff(ends, prepend=0) > 0]  # those whose interval contains a whole number
    factor = np.zeros(len(mass), np.float32)
    factor[taken] = 1 / chance[taken]
    return factor


def trajectories(n, T, R, rng, block_length=None, cuts=None):
    """Draw R rotated trajectories of T steps over n tokens, in random order or, given a block_length, block by block.

    cuts (T-1,): the first rank of steps 1..T-1; default: steps of equal size, n*s//T. Returns reveal_step (R, n) int64
    in 0..T-1: a token is revealed at the step that its rank falls into. Trajectory r shifts every rank by r*n//R, so a
    token revealed early in one is revealed late in another. Blocks go from left to right, as the semi-autoregressive
    sampler fills them, and ranks are random and shift inside each.

    >>> trajectories(4, 2, 2, generator(0, [1], "chosen")).sum(0).tolist()   # early once, late once
    [1, 1, 1, 1]
    >>> trajectories(4, 2, 1, generator(0, [1], "chosen"), block_length=2).tolist()
    [[0, 0, 1, 1]]
    """
    b = block_length or n
    start = np.arange(n) // b * b  # (n,) first token of the token's block
    size = np.minimum(b, n - start)  # (n,) tokens of that block
    order = np.lexsort((rng.random(n), start))  # tokens by rank; a shorter response takes the first of the same numbers
    inside = np.argsort(order) - start  # (n,) rank within the block
    shifted = start + (inside + np.arange(R)[:, None] * size // R) % size  # (R, n)
    cuts = n * np.arange(1, T) // T if cuts is None else cuts
    return np.searchsorted(cuts, shifted, side="right")


def trajectory_masks(reveal_step, T):
    """masked (S, n) bool: a token is hidden before step s when its reveal_step is s or later."""
    R, n = reveal_step.shape
    later = reveal_step[:, None, :] >= np.arange(1, T)[None, :, None]  # (R, T-1, n)
    return np.concatenate((np.ones((1, n), bool), later.reshape(R * (T - 1), n)))


def trajectory_weights(masked, T, R):
    """weight (S, n) float32 of the stepwise denoising score: (trajectories that reveal the token from this state) / R.

    A token is revealed from a state if it is hidden there and shown in the trajectory's next state; from the last
    state everything still hidden is revealed. Each column sums to 1. Raises ValueError if the masks are not nested.
    """
    S, n = masked.shape
    if S != 1 + R * (T - 1):
        raise ValueError(f"{S} states do not make {R} trajectories of {T} steps ({1 + R * (T - 1)} states)")
    hidden = masked[1:].reshape(R, T - 1, n)
    all_hidden, none_hidden = np.broadcast_to(masked[0], (R, 1, n)), np.zeros((R, 1, n), bool)
    path = np.concatenate((all_hidden, hidden, none_hidden), axis=1)  # (R, T+1, n)
    if not masked[0].all() or (path[:, 1:] & ~path[:, :-1]).any():
        raise ValueError("masks are not trajectories: a shown token is hidden again, or the first state shows one")
    reveal = (path[:, :-1] & ~path[:, 1:]).astype(np.float32) / R  # (R, T, n)
    return np.concatenate((reveal[:, 0].sum(0, keepdims=True), reveal[:, 1:].reshape(S - 1, n)))


def radau_levels(n, T):
    """(T,) int64, falling: how many of n tokens a state of each step hides: all of them, then T - 1 further levels.

    What is estimated is the sum over l = 1..n of f(l), f(l) the mean log-probability of a token hidden with l - 1
    others. Gauss-Radau's rule of T nodes, one of them the end l = n, where every trajectory begins, has no error for
    polynomials of degree 2T - 2. Its other nodes are those of Gauss's rule for the weight n - l, eigenvalues of a small
    matrix (Golub, SIAM Review 15, 1973), and are rounded here to different whole numbers. With n <= T every level is
    there, and what is left over hides nothing.

    >>> radau_levels(30, 2).tolist(), radau_levels(30, 3).tolist(), radau_levels(2, 3).tolist()
    ([30, 10], [30, 20, 5], [2, 1, 0])
    """
    if n <= T or T == 1:
        return np.maximum(n - np.arange(T), 0)
    others = np.arange(1, n)
    powers = np.polynomial.legendre.legvander(2 * others / n - 1, T - 2)  # (n - 1, T - 1)
    basis, _ = np.linalg.qr(np.sqrt(n - others)[:, None] * powers)
    levels = np.rint(np.linalg.eigvalsh(basis.T * others @ basis)).astype(np.int64)  # rising
    place = np.arange(T - 1)
    levels = np.maximum.accumulate(np.maximum(levels, 1) - place) + place  # rising by at least 1
    return np.append(np.minimum(levels, n - T + 1 + place), n)[::-1]


def quadrature_weights(masked):
    """weight (S, n) float32 of a quadrature rule whose nodes are the levels of these states, the tokens that they hide.

    A level k has the weight w with which sum_k w_k k^p is the mean of l^p over l = 1..n, for as many powers p as there
    are levels. States of a level share it: each hidden token counts n w / k / (states of the level).
    """
    n, hidden = masked.shape[1], masked.sum(1)
    levels, place, states = np.unique(hidden[hidden > 0], return_inverse=True, return_counts=True)
    rows = np.polynomial.legendre.legvander(2 * np.arange(1, n + 1) / n - 1, len(levels) - 1)  # (n, levels)
    share = np.linalg.solve(rows[levels - 1].T, rows.mean(0))  # (levels,)
    by_state = np.zeros(len(masked))
    by_state[hidden > 0] = (n * share / levels / states)[place]
    return (masked * by_state[:, None]).astype(np.float32)


class SftRecipe(NamedTuple):
    """How a family's SFT draws its noise: t ~ U(low, high), p = (1 - epsilon) t + epsilon, tokens hidden independently.

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


LLADA_SFT = SftRecipe()  # GUIDELINES.md
SFT_RECIPES = {  # by model_type, where it is not LLaDA's
    "illada": SftRecipe(hides_prompt=True),
    "sdar": SftRecipe(hides_one=True),
    "llada2_moe": SftRecipe(low=0.3, high=0.8, is_weighted=False, fills_block=True),  # dFactory's
    "a2d-qwen2": SftRecipe(fills_block=True),  # dllm's
    "a2d-qwen3": SftRecipe(fills_block=True),
    "a2d-llama": SftRecipe(fills_block=True),
    "Fast_dLLM_Qwen": SftRecipe(is_weighted=False, is_by_block=True, is_doubled=True),
}


def sft_noise(n, rng, recipe=LLADA_SFT, block=None, fixed=None):
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

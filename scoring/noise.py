"""The noise of a masked diffusion language model: trajectories, masks, weights. Pure functions on the CPU.

Every estimator has one form: masked (S, n) booleans say which response tokens are hidden in each state, weight (S, n)
how much each token's log-probability counts there; the score is sum(weight * logp).

    stepwise         trajectories; a token counts in the state that reveals it
    spread           trajectories; the weight of what a state reveals is spread evenly over all that it hides. In random
                     order any of the hidden tokens may be next, so the mean is the same, with less noise
    radau            rotated windows at the nodes of Radau's quadrature rule (scoring/quadrature.py)
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
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from files import InputError
from scoring import quadrature

BLOCK_SIZE = (4, 1)  # default T and R of block-causal models; ESTIMATORS has those of the others


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
    return "stepwise" if order == "blocks" else "radau"


def chosen_estimator(noise_args, has_blocks):
    """The estimator of the arguments, auto filled in."""
    if noise_args.estimator == "auto":
        return automatic_estimator(noise_args.order, has_blocks)
    return noise_args.estimator


def default_size(estimator, has_blocks=False):
    """(T, R) where they are not given."""
    return BLOCK_SIZE if has_blocks else ESTIMATORS[estimator].size


def default_design(order="random", has_blocks=False):
    """(estimator, T, R) where none is given."""
    estimator = automatic_estimator(order, has_blocks)
    return estimator, *default_size(estimator, has_blocks)


def settle(noise_args, has_blocks):
    """Fill in what the arguments leave to the kind of model: T, R and, unless a calibration gives it, the estimator.

    Raises InputError for what a block-causal model cannot have.
    """
    if has_blocks and noise_args.order == "blocks":
        raise InputError("--order blocks is for bidirectional models; leave it out for a block-causal one")
    if has_blocks and noise_args.estimator not in ("auto", "elbo", "elbo_stratified"):
        raise InputError(
            f"--estimator {noise_args.estimator} is for bidirectional models; a block-causal one takes elbo_stratified "
            "or elbo"
        )
    estimator = chosen_estimator(noise_args, has_blocks)
    for name, default in zip(("diffusion_steps", "trajectories"), default_size(estimator, has_blocks)):
        if getattr(noise_args, name) is None:
            setattr(noise_args, name, default)
    if noise_args.diffusion_steps != "auto":
        noise_args.estimator = estimator


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


def trajectories(n, T, R, rng, block_length=None):
    """Draw R rotated trajectories of T steps over n tokens, in random order or, given a block_length, block by block.

    Returns reveal_step (R, n) int64 in 0..T-1: a token is revealed at the step that its rank falls into. Step s begins
    with rank n*s//T. Trajectory r shifts every rank by r*n//R, so a token revealed early in one is revealed late in
    another. Blocks go from left to right, as the semi-autoregressive sampler fills them, and ranks are random and shift
    inside each.

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
    return np.searchsorted(n * np.arange(1, T) // T, shifted, side="right")


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


def windows(n, nodes, R, rng):
    """(R, nodes, n) bool: R windows of each node, rotated in one random order of n tokens."""
    rank = rng.random(n).argsort().argsort()
    shifted = (rank + np.arange(R)[:, None] * n // R) % n  # (R, n)
    return shifted[:, None] >= n - nodes[:, None]


def rule_weights(masked, power):
    """weight (S, n) float32 of the quadrature rule whose nodes are the levels of these states, for w(l) ~ l^power.

    States of a level k share it: each token that they hide counts n share_k / k / (states of the level).
    """
    n, hidden = masked.shape[1], masked.sum(1)
    levels, place, states = np.unique(hidden[hidden > 0], return_inverse=True, return_counts=True)
    share = quadrature.shares(quadrature.weighting(n, power), levels)
    by_state = np.zeros(len(masked))
    by_state[hidden > 0] = (n * share / levels / states)[place]
    return (masked * by_state[:, None]).astype(np.float32)


# --- the estimators ---------------------------------------------------------------------------------------


class Estimator(NamedTuple):
    """How the states of a response are drawn, and how much each token counts there."""

    masks: Callable  # (n, T, R, rng) -> masked (S, n) bool; stepwise: block_length, too
    weights: Callable  # (masked, T, R) -> weight (S, n) float32
    steps: Callable  # (T, R) -> (S,) int64: the step before which each state stands, 0..T-1 (elbo: its level's number)
    size: tuple[int, int]  # default T and R
    is_paired: bool = True  # chosen and rejected hide the same places


def trajectory_steps(T, R):
    return np.append(0, np.tile(np.arange(1, T), R))


def level_steps(T, R):
    return np.arange(T).repeat(R)


def steps_of_equal_size(n, T, R, rng, block_length=None):
    return trajectory_masks(trajectories(n, T, R, rng, block_length), T)


def spread_weights(masked, T, R):
    weight, hidden = trajectory_weights(masked, T, R), masked.sum(1, keepdims=True)
    return (masked * (weight.sum(1, keepdims=True) / np.maximum(hidden, 1))).astype(np.float32)


def radau(power):
    """The Estimator of Radau's rule for w(l) ~ l^power."""

    def masks(n, T, R, rng):
        nodes = quadrature.radau_nodes(quadrature.weighting(n, power), T)
        others = windows(n, nodes[1:], R, rng).reshape(R * (T - 1), n)
        return np.concatenate((np.ones((1, n), bool), others))

    def weights(masked, T, R):
        return rule_weights(masked, power)

    return Estimator(masks, weights, trajectory_steps, (2, 3))


def elbo(stratified):
    """The Estimator of T levels with R masks each."""

    def masks(n, T, R, rng):
        return elbo_masks(n, T, R, rng, stratified)

    def weights(masked, T, R):
        return (masked * (masked.shape[1] / masked.sum(1, keepdims=True) / len(masked))).astype(np.float32)

    return Estimator(masks, weights, level_steps, (4, 1) if stratified else (8, 1), is_paired=False)


ESTIMATORS = {
    "stepwise": Estimator(steps_of_equal_size, trajectory_weights, trajectory_steps, (3, 3)),
    "spread": Estimator(steps_of_equal_size, spread_weights, trajectory_steps, (3, 3)),
    "radau": radau(0),
    "elbo": elbo(stratified=False),
    "elbo_stratified": elbo(stratified=True),
}


def side_of(estimator, side, has_blocks=False):
    """The name of the noise of side 0 (chosen) or 1 (rejected), for generator().

    Both responses of a pair share their trajectories, and the masks of their blocks: the same places are hidden in
    both, so that the difference of their scores has less noise. has_blocks: the model is block-causal.
    """
    return "pair" if has_blocks or ESTIMATORS[estimator].is_paired else ("chosen", "rejected")[side]


def state_count(estimator, T, R):
    """S."""
    return len(step_of_state(estimator, T, R))


def step_of_state(estimator, T, R):
    """(S,) int64: the denoising step before which each state stands, 0..T-1 (elbo: the number of its level).

    >>> step_of_state("spread", 3, 2).tolist()
    [0, 1, 2, 1, 2]
    """
    return ESTIMATORS[estimator].steps(T, R)


def state_masks(n, estimator, T, R, rng, block_length=None, block=None, fixed=None):
    """Draw the states of one response: masked (S, n) bool. block, fixed (n,): of a block-causal model."""
    if block is not None:
        return block_masks(np.asarray(block), fixed_of(fixed, n), T * R, rng, estimator == "elbo_stratified")
    in_blocks = {"block_length": block_length} if block_length else {}
    return ESTIMATORS[estimator].masks(n, T, R, rng, **in_blocks)


def state_weights(masked, estimator, T, R, block=None, fixed=None):
    """weight (S, n) float32 of each token's log-probability, from the masks alone, as they are stored."""
    if block is not None:
        return block_weights(masked, np.asarray(block), fixed_of(fixed, masked.shape[1]))
    return ESTIMATORS[estimator].weights(masked, T, R)


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

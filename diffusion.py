"""The noise of a masked diffusion language model: trajectories, masks, weights. Pure functions, CPU only.

Every estimator has one form: masked (S, n) booleans say which response tokens are hidden in each state, weight (S, n)
how much each token's log-probability counts there; the score is sum(weight * logp).

n response tokens, T denoising steps, R trajectories, S = 1 + R(T-1) states, K noise sets.
State 0 is all masks and belongs to every trajectory; state 1 + r(T-1) + (s-1) is trajectory r before step s = 1..T-1.
"""
import hashlib

import numpy as np

EPSILON = 1e-3  # SFT masks with probability (1 - EPSILON) t + EPSILON (LLaDA's GUIDELINES.md)


def generator(noise_seed, tokens, side, noise_set=0):
    """The one source of randomness: Philox keyed by content, the same on any machine, in any order.

    tokens: the ids that identify the example (prompt, chosen, rejected); side: "chosen", "rejected" or "sft".
    """
    digest = hashlib.sha256(np.ascontiguousarray(tokens, dtype="<u4").tobytes())
    digest.update(f"|{noise_seed}|{side}|{noise_set}".encode())
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest.digest()[:16], "little")))


def state_count(T, R):
    return 1 + R * (T - 1)


def trajectories(n, T, R, rng, block_length=None):
    """Draw R rotated trajectories of T steps over n tokens, in random order or, given a block_length, block by block.

    Returns reveal_step (R, n) int64 in 0..T-1. A token of rank k is revealed at the step s with n*s//T <= k < n*(s+1)//T;
    trajectory r shifts every rank by r*n//R, so a token revealed early in one is revealed late in another. Blocks stand
    from left to right, as the semi-autoregressive sampler fills them, and ranks are random and shift inside each.

    >>> trajectories(4, 2, 2, generator(0, [1], "chosen")).sum(0).tolist()   # early once, late once
    [1, 1, 1, 1]
    >>> trajectories(4, 2, 1, generator(0, [1], "chosen"), block_length=2).tolist()
    [[0, 0, 1, 1]]
    """
    b = block_length or n
    start = np.arange(n) // b * b  # (n,) where the token's block starts
    size = np.minimum(b, n - start)  # (n,) tokens of that block
    order = np.lexsort((rng.permutation(n), start))  # tokens by rank
    inside = np.argsort(order) - start  # (n,) rank within the block
    shifted = start + (inside + np.arange(R)[:, None] * size // R) % size  # (R, n)
    cuts = n * np.arange(1, T) // T  # (T-1,) first rank of steps 1..T-1
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
    if S != state_count(T, R):
        raise ValueError(f"{S} states do not make {R} trajectories of {T} steps ({state_count(T, R)} states)")
    hidden = masked[1:].reshape(R, T - 1, n)
    path = np.concatenate((np.broadcast_to(masked[0], (R, 1, n)), hidden, np.zeros((R, 1, n), bool)), axis=1)  # (R, T+1, n)
    if not masked[0].all() or (path[:, 1:] & ~path[:, :-1]).any():
        raise ValueError("masks are not trajectories: a shown token is hidden again, or the first state shows one")
    reveal = (path[:, :-1] & ~path[:, 1:]).astype(np.float32) / R  # (R, T, n)
    return np.concatenate((reveal[:, 0].sum(0, keepdims=True), reveal[:, 1:].reshape(S - 1, n)))


def sft_noise(n, rng):
    """One draw of LLaDA's SFT noise: t ~ U(0, 1), p = (1 - eps) t + eps, tokens hidden independently.

    Returns masked (n,) bool and weight (n,) float32 = masked / (p n): sum(weight * -logp) is the NLL per token.
    """
    p = (1 - EPSILON) * rng.random() + EPSILON
    masked = rng.random(n) < p
    return masked, masked.astype(np.float32) / np.float32(p * n)

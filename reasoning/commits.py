"""What a pass of a sampler commits: the token predicted at each masked place, how sure it is, and which are kept.

A masked place i gets c_i = argmax_v exp(z_iv) / (-log u_iv)^temperature, u ~ U(0, 1), from its logits z_i. The
predictions with the highest softmax(z_i)[c_i] are committed; the others stay masked (low-confidence remasking).
A threshold takes fewer passes: each commits every prediction at least that confident, and the most confident ones that
it would commit without, as if they were independent (Fast-dLLM, arXiv 2505.22618).

sampler.py and blockwise.py call reveal() with the logits of a pass. Noise and random confidence come from one CPU
generator per response, so that a response does not depend on its batch.

R rows of a batch, n places of a block, N masked places of those rows, V vocabulary.
"""

import hashlib

import torch


def commits_per_pass(sample):
    """Places that each pass over block_length of them commits (with a threshold: at least); they sum to block_length.

    A block takes its share of --steps, rounded up.
    """
    steps = sample.gen_length if sample.steps is None else sample.steps
    passes = min(-(-steps * sample.block_length // sample.gen_length), sample.block_length)
    share, extra = divmod(sample.block_length, passes)
    return [share + (1 if step < extra else 0) for step in range(passes)]


def row_generator(seed, key):
    """CPU randomness of one response; hashed, so that key 1 of seed 0 is not key 0 of seed 1."""
    digest = hashlib.sha256(f"generate|{seed}|{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))  # the CPU generator reads 32 bits


def reveal(block, masked, logits, draws, commits, sample, ends, never=None):
    """`block` (R, n) ids with the pass's commits among its `masked` (R, n) places.

    logits (N, V): of the masked places, row by row. draws: the generator of each row. commits: places to commit, if no
    threshold adds to them. ends: ids that confidence_eos_eot_inf makes least sure. never: an id that is not chosen.
    """
    counts = masked.sum(1).tolist()
    chosen = choose(logits, counts, draws, sample.temperature, never)  # (N,)
    sure = confidences(logits, chosen, counts, draws, sample, ends)  # (N,)
    confidence = torch.full(masked.shape, -torch.inf, dtype=sure.dtype, device=block.device)  # (R, n)
    confidence[masked] = sure
    commit = most_confident(confidence, commits, sample.threshold)
    return torch.where(commit, block.masked_scatter(masked, chosen), block)


def choose(logits, counts, draws, temperature, never=None):
    """The predicted id (N,) of each row of logits (N, V): the argmax, at a temperature that of exp(z) / (-log u)^T.

    counts, draws: for each batch row, how many of the N are its own, and its generator. never: an id not to choose.
    """
    if never is not None:
        logits = logits.index_fill(-1, torch.tensor([never], device=logits.device), -torch.inf)
    if temperature == 0:
        return logits.argmax(-1)
    chosen = []
    for z, draw in zip(logits.split(counts), draws):  # row by row: float64 over V is large, and each has its own noise
        u = torch.rand(z.shape, dtype=torch.float64, generator=draw).to(z.device)  # on the CPU: the same on any device
        noise = u.log_().neg_().log_().mul_(-temperature)  # log of (-log u)^-T, so that a z above 709 is not infinite
        chosen.append(noise.add_(z).argmax(-1))
    return torch.cat(chosen)


def confidences(logits, chosen, counts, draws, sample, ends):
    """How sure each of `chosen` (N,) is, (N,): its probability without noise; U(0, 1) or from left to right if asked.

    counts, draws: as in choose(). ends: ids that confidence_eos_eot_inf makes least sure. The probability is taken in
    the logits' dtype as in the original, but in float32 where a threshold is compared with it.
    """
    if sample.remasking == "random":
        drawn = [torch.rand(n, dtype=torch.float64, generator=draw) for n, draw in zip(counts, draws)]
        return torch.cat(drawn).to(logits.device)
    if sample.remasking == "sequential":
        return torch.cat([torch.arange(n, 0, -1) for n in counts]).to(logits)
    if sample.confidence_eos_eot_inf:
        logits = logits.index_fill(-1, ends, -torch.inf)  # they get 0, and the others share their probability
    if sample.threshold is not None:
        logits = logits.float()
    return logits.softmax(-1).gather(-1, chosen[:, None])[:, 0]


def most_confident(confidence, commits, threshold):
    """Which places to commit, (R, n): the `commits` highest, and all that are at least `threshold`."""
    order = confidence.argsort(dim=-1, descending=True, stable=True)  # stable: ties fall the same way on any device
    commit = torch.zeros_like(confidence, dtype=torch.bool).scatter_(1, order[:, :commits], True)
    return commit if threshold is None else commit | (confidence >= threshold)

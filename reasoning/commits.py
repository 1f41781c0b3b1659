"""What a pass of a sampler commits: the token predicted at each masked place, how sure it is, and which are kept.

The token is the most likely one; at a temperature T it is drawn from softmax(z / T) of the logits z, by one uniform
number per place: the first token at which the sum of the probabilities exceeds it (inverse CDF, in float32). That is
the distribution of LLaDA's argmax of exp(z) / (-log u)^T, which takes V numbers per place.
The predictions with the highest softmax(z)[token] are committed; the others stay masked (low-confidence remasking).
A threshold takes fewer passes: each commits every prediction at least that confident, and the most confident ones that
it would commit without, as if they were independent (Fast-dLLM, arXiv 2505.22618).

Uniform numbers and random confidence come from one CPU generator per response, so that a response does not depend on
its batch.

N masked places of a pass, V vocabulary, n places of one block.
"""

import hashlib

import torch

from models.head import chunks

PART = 512  # tokens whose probabilities are summed first, to find a token among few sums


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


# --- on the model's device: from logits to tokens ---------------------------------------------------------


def predict(logits, uniforms, sample, ends, never=None):
    """The predicted tokens (N,) int64 of logits (N, V), and how sure each is (N,).

    uniforms (N,) float32 in [0, 1): what each is drawn by; None at temperature 0. ends: ids that confidence_eos_eot_inf
    makes least sure. never: an id that is not chosen.
    """
    tokens, sure = [], []
    for rows in chunks(*logits.shape):
        drawn_by = None if uniforms is None else uniforms[rows]
        chosen, confidence = predict_rows(logits[rows], drawn_by, sample, ends, never)
        tokens.append(chosen)
        sure.append(confidence)
    return torch.cat(tokens), torch.cat(sure)


def predict_rows(logits, uniforms, sample, ends, never):
    """predict() of few rows."""
    if sample.temperature == 1 and not sample.confidence_eos_eot_inf:  # one softmax is drawn from and says how sure
        p = logits.float().softmax(-1)  # (N, V)
        if never is not None:
            p[:, never] = 0
        tokens = draw(p, uniforms)
        return tokens, p.gather(-1, tokens[:, None])[:, 0]
    possible = logits
    if never is not None:
        possible = logits.index_fill(-1, torch.tensor([never], device=logits.device), -torch.inf)
    tokens = choose(possible, uniforms, sample.temperature)
    return tokens, confidences(logits, tokens, sample, ends)


def choose(logits, uniforms, temperature):
    """The predicted ids (N,) of logits (N, V): the most likely, or drawn from softmax(logits / temperature)."""
    if temperature == 0:
        return logits.argmax(-1)
    z = logits.float()
    return draw((z if temperature == 1 else z / temperature).softmax(-1), uniforms)


def draw(p, uniforms):
    """Ids (N,) of probabilities p (N, V) float32: the first whose sum up to it exceeds uniforms (N,) x all of it.

    An id of probability 0 is never drawn, except where there is no other. Sums of PART ids are searched first: p is
    read twice, and no sum over all V ids is written.
    """
    whole = p.shape[1] // PART * PART
    sums = torch.cat((p[:, :whole].unflatten(1, (-1, PART)).sum(-1), p[:, whole:].sum(-1, keepdim=True)), 1).cumsum(1)
    wanted = below(uniforms[:, None] * sums[:, -1:], sums[:, -1:])  # (N, 1)
    part = (sums <= wanted).sum(1, keepdim=True)  # the first whose sum is above
    wanted = wanted - torch.where(part > 0, sums.gather(1, (part - 1).clamp(min=0)), 0)
    ids = part * PART + torch.arange(PART, device=p.device)  # (N, PART)
    within = torch.where(ids < p.shape[1], p.gather(1, ids.clamp(max=p.shape[1] - 1)), 0).cumsum(1)
    place = (within <= below(wanted, within[:, -1:])).sum(1)
    return (part[:, 0] * PART + place).clamp(max=p.shape[1] - 1)


def below(x, limit):
    """x, or the next number below `limit` where x is not below it."""
    return torch.minimum(x, torch.nextafter(limit, torch.zeros_like(limit)))


def confidences(logits, tokens, sample, ends):
    """How sure each of `tokens` (N,) is, (N,): its probability without noise.

    It is taken in the logits' dtype as in the original, but in float32 where a threshold is compared with it.
    """
    if sample.confidence_eos_eot_inf:
        logits = logits.index_fill(-1, ends, -torch.inf)  # they get 0, and the others share their probability
    if sample.threshold is not None:
        logits = logits.float()
    return logits.softmax(-1).gather(-1, tokens[:, None])[:, 0]


# --- on the host: which tokens of a block are kept --------------------------------------------------------


def ordered(sure, sample, generator):
    """What decides the order of the places instead of `sure` (n,): U(0, 1), or from left to right, if asked."""
    if sample.remasking == "random":
        return torch.rand(len(sure), dtype=torch.float64, generator=generator)
    if sample.remasking == "sequential":
        return torch.arange(len(sure), 0, -1)
    return sure


def most_confident(confidence, commits, threshold):
    """Which of confidence (n,) to commit, (n,) bool: the `commits` highest, and all that are at least `threshold`."""
    order = confidence.argsort(descending=True, stable=True)  # stable: ties fall the same way on any device
    commit = torch.zeros(len(confidence), dtype=torch.bool)
    commit[order[:commits]] = True
    return commit if threshold is None else commit | (confidence >= threshold)


def commit(block, masked, prediction, commits, sample, generator):
    """Fill those of the places `masked` (n,) of `block` that a pass commits. prediction: (tokens, sure), (n,) each."""
    tokens, sure = prediction
    kept = most_confident(ordered(sure, sample, generator), commits, sample.threshold)
    block[masked[kept]] = tokens[kept]

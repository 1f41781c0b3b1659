"""The mathematics in its plainest form, to test against: float64, one state at a time, nothing of ours imported.

A model is {tensor name: float64 tensor}, as its safetensors file names them. n response tokens, V vocabulary, D width,
L length, T denoising steps, R trajectories. reveal: R lists of n steps. p(y | x) is a softmax over V at each position.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

MASK = 3


def load(folder):
    return {
        name: tensor.double().requires_grad_() for name, tensor in load_file(Path(folder) / "model.safetensors").items()
    }


def rms_norm(x, weight, eps=1e-5):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rotated(x, theta=10000.0):
    """x (L, hd): dimension j and j + hd/2 turned by the angle position * theta ** (-2j / hd)."""
    L, width = x.shape
    half = width // 2
    first, second = [], []
    for j in range(half):
        angle = torch.arange(L, dtype=torch.float64) * theta ** (-2 * j / width)
        first.append(x[:, j] * angle.cos() - x[:, j + half] * angle.sin())
        second.append(x[:, j + half] * angle.cos() + x[:, j] * angle.sin())
    return torch.stack(first + second, -1)


def log_probs(model, ids, heads=4):
    """LLaDA on one row: log p (L, V), every position attending to every other."""

    def weight(name, block=None):
        place = name if block is None else f"blocks.{block}.{name}"
        return model[f"model.transformer.{place}.weight"]

    x = weight("wte")[torch.tensor(ids)]  # (L, D)
    width, block = x.shape[1] // heads, 0
    while f"model.transformer.blocks.{block}.attn_norm.weight" in model:
        h = rms_norm(x, weight("attn_norm", block))
        q, k, v = (h @ weight(name, block).T for name in ("q_proj", "k_proj", "v_proj"))
        mixed = []
        for head in range(heads):
            cut = slice(head * width, (head + 1) * width)
            attention = torch.softmax(rotated(q[:, cut]) @ rotated(k[:, cut]).T / math.sqrt(width), -1)
            mixed.append(attention @ v[:, cut])
        x = x + torch.cat(mixed, -1) @ weight("attn_out", block).T
        h = rms_norm(x, weight("ff_norm", block))
        gate = h @ weight("ff_proj", block).T
        x = x + (gate * torch.sigmoid(gate) * (h @ weight("up_proj", block).T)) @ weight("ff_out", block).T
        block += 1
    return torch.log_softmax(rms_norm(x, weight("ln_f")) @ weight("ff_out").T, -1)


def hidden(masked, prompt, response):
    """The row in which the response tokens of `masked` are the mask."""
    return [int(token) for token in prompt] + [MASK if hide else int(token) for token, hide in zip(response, masked)]


def score(model, prompt, response, reveal, T, spread=True):
    """1/R sum_r sum_s sum_{i revealed at s} log p(y_i | state before s, x).

    spread: at each s the mean over all tokens that it hides, times the number of those that it reveals.
    """
    total = 0.0
    for steps in reveal:
        for s in range(T):
            revealed = [i for i in range(len(response)) if steps[i] == s]
            if revealed:
                logp = log_probs(model, hidden([step >= s for step in steps], prompt, response))
                counted = [i for i in range(len(response)) if steps[i] >= s] if spread else revealed
                for i in counted:
                    total = total + len(revealed) / len(counted) * logp[len(prompt) + i, int(response[i])]
    return total / len(reveal)


def reveal_steps(bits, T, R):
    """reveal (R, n) of one response's rows of noise-k.npy (n, bytes): the last step before which a token is hidden."""
    reveal = []
    for r in range(R):
        states = [0, *range(1 + r * (T - 1), 1 + (r + 1) * (T - 1))]  # before step 0, 1, ..., T - 1
        steps = []
        for row in bits:
            hides = [s for s, state in enumerate(states) if row[state // 8] >> (7 - state % 8) & 1]
            assert hides == list(range(len(hides))) and hides, "a token shows and hides again"
            steps.append(hides[-1])
        reveal.append(steps)
    return reveal


def read_packed(folder):
    """[(prompt, chosen, rejected)] lists of ids."""
    tokens, bounds = np.load(Path(folder) / "tokens.npy"), np.load(Path(folder) / "bounds.npy")
    pairs = []
    for row in bounds.tolist():
        pairs.append(tuple(tokens[a:b].tolist() for a, b in zip(row, row[1:])))
    return pairs


def read_reference(packed, **wanted):
    """(reveal[k][pair] of chosen and of rejected, scores[k]) of the one packed/ref-*/ whose meta says `wanted`."""
    [folder] = [
        path.parent
        for path in Path(packed).glob("ref-*/meta.json")
        if wanted.items() <= json.loads(path.read_text())["depends_on"].items()
    ]
    depends = json.loads((folder / "meta.json").read_text())["depends_on"]
    T, R, sets, scores = depends["diffusion_steps"], depends["trajectories"], [], []
    while (folder / f"noise-{len(sets)}.npy").exists():
        bits, place, pairs = np.load(folder / f"noise-{len(sets)}.npy"), 0, []
        for _, *sides in read_packed(packed):
            pair = []
            for side in sides:
                pair.append(reveal_steps(bits[place : place + len(side)].tolist(), T, R))
                place += len(side)
            pairs.append(pair)
        assert place == len(bits)
        scores.append(np.load(folder / f"ref_scores-{len(sets)}.npy"))
        sets.append(pairs)
    return sets, scores


def preference_loss(margin, beta, smoothing=0.0):
    win = torch.sigmoid(torch.as_tensor(beta * margin, dtype=torch.float64))
    return -(1 - smoothing) * torch.log(win) - smoothing * torch.log(1 - win)


def pair_loss(model, reference, pair, reveal, T, beta, smoothing=0.0):
    """-log sigmoid(beta * margin), the reference's scores made here, from its weights."""
    prompt, chosen, rejected = pair
    with torch.no_grad():
        ref_w, ref_l = score(reference, prompt, chosen, reveal[0], T), score(reference, prompt, rejected, reveal[1], T)
    win, lose = score(model, prompt, chosen, reveal[0], T), score(model, prompt, rejected, reveal[1], T)
    return preference_loss((win - lose) - (ref_w - ref_l), beta, smoothing)


def kto_losses(model, reference, batch, T, beta, weights):
    """The losses of a batch of ((prompt, response, mismatched), reveal, label): KTO, arXiv 2402.01306, equation 8.

    weights: of an undesirable row and of a desirable one.
    """
    with torch.no_grad():
        gaps = [
            score(model, prompt, other, reveal[1], T) - score(reference, prompt, other, reveal[1], T)
            for (prompt, _, other), reveal, _ in batch
        ]
    kl = max(0.0, sum(float(gap) for gap in gaps) / len(gaps))
    found = []
    for (prompt, response, _), reveal, label in batch:
        with torch.no_grad():
            ref = score(reference, prompt, response, reveal[0], T)
        gain = score(model, prompt, response, reveal[0], T) - ref
        value = torch.sigmoid(beta * (gain - kl) if label else beta * (kl - gain))
        found.append(weights[label] * (1 - value))
    return found


def train(model, losses_of, batches, *, rates, betas, eps, weight_decay, clip):
    """AdamW with clipping by the global norm over `batches`, each with its rate. losses_of(model, batch) -> losses.

    Yields (mean loss, norm of the gradient, weights after the step).
    """
    optimizer = torch.optim.AdamW(list(model.values()), lr=rates[0], betas=betas, eps=eps, weight_decay=weight_decay)
    for batch, rate in zip(batches, rates):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        losses = []
        for each in losses_of(model, batch):
            loss = each / len(batch)
            loss.backward()
            losses.append(loss.item())
        norm = math.sqrt(sum(float((value.grad**2).sum()) for value in model.values()))
        for value in model.values():
            value.grad *= min(1.0, clip / norm)
        optimizer.step()
        yield sum(losses), norm, {name: value.detach().clone() for name, value in model.items()}

"""Tests of score_and_backward and scoring/window.py: the gradient of all pairs of a step, however they are divided.

bash tests/run.sh tests/scoring/test_window.py

The oracle is plain autograd of the sum of the losses, in float64 (plain.py).
"""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import plain
import pytest
import torch
from small import LENGTHS, MASK, call, flags, make_model, make_pairs, pack

import config
import score
import train_dpo
from models import checkpoint
from models.families import Masking
from preferences import packed as disk
from scoring import noise, objective, passes, sft_noise
from training import engine, stopping

T, R = 3, 2  # S = 5
BASE = flags(estimator="spread", diffusion_steps=T, trajectories=R, noise_sets=2, use_mixed_precision="no")
ITEMS = {(0, 0): 0.5, (1, 1): 0.2, (2, 3): 0.3, (3, 0): 0.4}  # (pair, epoch): scale; 1 token beside 200
ALONE = engine.Ranks(0, 1, torch.device("cpu"))
# One row a pass; rows of several pairs in a pass; two pairs whole and two divided; all in one graph
SIZES = (1, 40, 300, 10**5)


def make_home(folder, tiny_dir):
    """A model, pairs, its reference scores for them, and a policy that has left it."""
    model = make_model(folder / "model", tiny_dir)
    data = pack(folder / "packed", make_pairs(LENGTHS[:6]), model)
    assert call(score.main, "--data", data, *BASE) == 0
    policy = checkpoint.load_model(str(model), torch.float32)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=rng))
    pairs, reveal = plain.read_packed(data), plain.read_reference(data)[0]
    return SimpleNamespace(folder=folder, model=model, data=data, policy=policy, pairs=pairs, reveal=reveal)


@pytest.fixture(scope="module")
def home(tiny_dir, tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("window"), tiny_dir)


def preference(home, *argv):
    """The Preference that train_dpo's command line makes."""
    groups = train_dpo.read_arguments(["--data", str(home.data), *BASE, "--beta", "0.05", *map(str, argv)])
    return train_dpo.prepare(groups)[0]


class Made(NamedTuple):
    """What one call of score_and_backward made."""

    gradient: torch.Tensor  # of all weights, flat
    results: list
    passes: list  # forward passes without a graph, with a graph, backward passes
    between: int  # calls of after_pass


def made(policy, pieces, tokens, ranks=ALONE):
    """score_and_backward with every pass counted; the last backward pass alone is told that it is the last."""
    counts, last, between = [0, 0, 0], [], []

    def count(*_):
        counts[torch.is_grad_enabled()] += 1

    def backward(loss, is_last):
        counts[2] += 1
        last.append(is_last)
        loss.backward()

    policy.zero_grad()
    hook = policy.register_forward_hook(count)
    results = score.score_and_backward(policy, pieces, tokens, ranks, backward, lambda: between.append(0))
    hook.remove()
    assert last == [False] * (len(last) - 1) + [True]
    assert not any(scores.requires_grad for _, responses in results for scores in responses)
    return Made(flat(parameter.grad for parameter in policy.parameters()), results, counts, len(between))


def flat(tensors):
    return torch.cat([tensor.flatten().double() for tensor in tensors])


def off(got, want):
    """How far a gradient is from another, relative."""
    return float((got - want).norm() / want.norm())


def lengths(responses):
    """The lengths of the rows that score something."""
    return [states.inputs.shape[1] for states in responses for row in states.weight if row.any()]


# --- a preference loss ------------------------------------------------------------------------------------


def true_loss(home, weights, item, smoothing, sft_weight):
    """The formula's loss of a pair, with its SFT row."""
    (index, epoch), (prompt, chosen, _) = item, home.pairs[item[0]]
    reference, reveal = plain.load(home.model), home.reveal[epoch % 2][index]
    loss = plain.pair_loss(weights, reference, home.pairs[index], reveal, T, 0.05, smoothing)
    if sft_weight:
        rng = noise.generator(0, np.concatenate(home.pairs[index]), "sft", epoch)
        masked, weight = (each[0] for each in sft_noise.draw(len(chosen), rng))
        logp = plain.log_probs(weights, plain.hidden(masked, prompt, chosen))
        for i in range(len(chosen)):
            loss = loss - sft_weight * float(weight[i]) * logp[len(prompt) + i, chosen[i]]
    return loss


@pytest.mark.parametrize("smoothing, sft_weight", [(0.0, 0.0), (0.1, 0.3)])
def test_gradient(home, smoothing, sft_weight):
    """One graph = rows divided anyhow = autograd of the sum of the losses; as many passes as passes.divide says."""
    objective_of = preference(home, "--label_smoothing", smoothing, "--sft_weight", sft_weight)
    names, parameters = zip(*home.policy.named_parameters())
    weights = {name: parameter.detach().double().requires_grad_() for name, parameter in zip(names, parameters)}
    want = [true_loss(home, weights, item, smoothing, sft_weight) for item in ITEMS]
    total = sum(scale * loss for scale, loss in zip(ITEMS.values(), want))
    true = flat(torch.autograd.grad(total, [weights[name] for name in names]))
    assert true.norm() > 1e-3
    pieces = [objective_of.piece(item, scale) for item, scale in ITEMS.items()]
    rows = [lengths(piece.responses) for piece in pieces]
    for tokens in SIZES:
        got = made(home.policy, pieces, tokens)
        assert off(got.gradient, true) < 1e-5, tokens
        without, graph = passes.divide(rows, rows, tokens).counts
        assert got.passes == [without, graph, graph] and got.between == without + graph - 1, tokens
        for (loss, scores), truth in zip(got.results, want):
            assert float(loss) == pytest.approx(truth.item(), rel=1e-5)
            assert [len(score) for score in scores] == objective_of.counts
    assert 0 < len(passes.divide(rows, rows, 300).whole[0]) < len(ITEMS)
    assert passes.divide(rows, rows, SIZES[-1]).counts == (0, 1)


@pytest.mark.parametrize("k, sft_weight", [(1, 0.0), (3, 0.3), (4, 0.0)])
def test_gradient_of_part_of_the_states(home, k, sft_weight):
    """--backprop_steps: losses are those of all states, the gradient the sum over drawn states times their factors."""
    part = preference(home, "--backprop_steps", k, "--sft_weight", sft_weight)
    whole = preference(home, "--sft_weight", sft_weight)
    pieces = [whole.piece(item, scale) for item, scale in ITEMS.items()]
    losses = [float(loss) for loss, _ in made(home.policy, pieces, 10**5).results]
    weighted = 0.0
    for (index, epoch), piece in zip(ITEMS, pieces):
        parts = score.state_scores(home.policy, piece.responses, 10**5, ALONE)
        totals = [states.sum().detach().requires_grad_() for states in parts]
        slopes = torch.autograd.grad(piece.scale * piece.loss_of(totals), totals)
        for side in (0, 1):
            masked = part.reference.masks(index, side, epoch % 2)
            rng = noise.generator(0, np.concatenate(home.pairs[index]), "pair gradient", epoch)
            factor = noise.gradient_states(masked, piece.responses[side].weight, k, rng)
            weighted = weighted + slopes[side] * (torch.from_numpy(factor) * parts[side]).sum()
        if sft_weight:
            weighted = weighted + slopes[2] * parts[2].sum()
    want = flat(torch.autograd.grad(weighted, list(home.policy.parameters())))
    pieces = [part.piece(item, scale) for item, scale in ITEMS.items()]
    rows = [lengths(piece.responses) for piece in pieces]
    graph_rows = [lengths(states.with_gradient for states in piece.responses) for piece in pieces]
    for tokens in SIZES:
        got = made(home.policy, pieces, tokens)
        assert off(got.gradient, want) < 1e-5, tokens
        assert [float(loss) for loss, _ in got.results] == pytest.approx(losses, rel=1e-5)
        without, graph = passes.divide(rows, graph_rows, tokens).counts
        assert got.passes == [without, graph, graph]


def test_states_with_a_gradient_are_drawn_anew_each_epoch(home):
    part = preference(home, "--backprop_steps", 1)
    drawn, again, *later = (part.responses((2, epoch))[0].graph.inputs for epoch in (3, 3, 5, 7, 9, 11))
    assert (drawn == again).all() and any((drawn != other).any() for other in later)


# --- SFT --------------------------------------------------------------------------------------------------


def sft(home, pad_to=0):
    args = config.TrainArguments(sft_pad_to=pad_to)
    return objective.SFT(args, config.NoiseArguments(), disk.Packed(home.data), Masking(MASK))


@pytest.mark.parametrize("tokens", [1, 40, 120, 10**5])
def test_sft_makes_no_pass_without_a_graph(home, tokens):
    """Its loss is linear in the scores: the slopes are known, and rows go through the model once."""
    rows = sft(home, pad_to=15)
    items = [[(2, 0), (4, 0)], [(3, 0), (5, 0)], [(1, 1)]]
    pieces = [rows.piece(item, 1 / 3) for item in items]
    names, parameters = zip(*home.policy.named_parameters())
    weights = {name: parameter.detach().double().requires_grad_() for name, parameter in zip(names, parameters)}
    want = []
    for piece, item in zip(pieces, items):
        loss = 0.0
        for states in piece.responses:
            [row], [targets], [weight] = states.inputs.tolist(), states.targets, states.weight
            logp = plain.log_probs(weights, row)
            loss = loss - sum(float(weight[i]) * logp[i, targets[i]] for i in np.flatnonzero(weight))
        want.append(loss / len(item))
    true = flat(torch.autograd.grad(sum(want) / 3, [weights[name] for name in names]))
    got = made(home.policy, pieces, tokens)
    assert off(got.gradient, true) < 1e-5
    assert [float(loss) for loss, _ in got.results] == pytest.approx([loss.item() for loss in want], rel=1e-5)
    each = [lengths(piece.responses) for piece in pieces]
    graph = passes.divide(each, each, tokens, is_linear=True).counts[1]
    assert got.passes == [0, graph, graph]


def test_rows_of_which_nothing_is_hidden(home):
    """SFT's noise may hide no token of a short response: the loss is 0, and so is the gradient of the one pass."""
    rows = sft(home)
    epoch = next(epoch for epoch in range(500) if not rows.responses([(3, epoch)])[0].weight.any())
    got = made(home.policy, [rows.piece([(3, epoch)])], 40)
    assert got.passes == [0, 1, 1] and not got.gradient.any() and float(got.results[0][0]) == 0
    both = [rows.piece([(2, 0)]), rows.piece([(3, epoch)])]
    one, two = made(home.policy, both[:1], 40), made(home.policy, both, 40)
    assert two.passes == one.passes and torch.equal(one.gradient, two.gradient)


# --- several ranks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize("kind", ["preference", "sft"])
def test_passes_for_other_ranks_change_nothing(home, tokens, kind):
    """Where another rank has more to do, this one makes empty passes: the same gradient, scores and losses."""
    busy = SimpleNamespace(device=ALONE.device, most=lambda *counts: [count + 2 for count in counts])
    if kind == "sft":
        pieces = [sft(home).piece([(index, 0)]) for index in (2, 3)]
    else:
        pieces = [preference(home).piece(item, scale) for item, scale in ITEMS.items()]
    one, other = made(home.policy, pieces, tokens), made(home.policy, pieces, tokens, busy)
    assert other.passes == [count + 2 for count in one.passes] and other.between == one.between + 4
    assert off(other.gradient, one.gradient) < 1e-6
    for (loss, scores), (same, equal) in zip(one.results, other.results):
        assert loss == same and all(torch.equal(left, right) for left, right in zip(scores, equal))


def test_scores_of_a_rank_with_nothing_to_do(home):
    """As many passes as the busiest rank, and no scores."""
    busy, ran = SimpleNamespace(device=ALONE.device, most=lambda *counts: [count + 2 for count in counts]), []
    states = preference(home).responses((2, 0))
    with torch.no_grad():
        assert score.state_scores(home.policy, [], 40, busy, lambda: ran.append(0)) == [] and len(ran) == 2
        want = score.state_scores(home.policy, states, 40, ALONE)
        got = score.state_scores(home.policy, states, 40, busy)
    assert all(torch.equal(left, right) for left, right in zip(got, want))


def test_a_signal_ends_it_between_passes(home):
    """after_pass may raise: no backward pass was told that it is the last."""
    told = []

    def stop():
        if len(told) == 2:
            raise stopping.Stopped

    pieces = [preference(home).piece(item) for item in ITEMS]
    with pytest.raises(stopping.Stopped):
        score.score_and_backward(home.policy, pieces, 40, ALONE, lambda _, is_last: told.append(is_last), stop)
    assert told == [False, False]

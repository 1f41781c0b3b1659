"""Tests of losses.py: every loss of pairs against TRL's formula, its gradient, no reference, what is refused.

bash tests/run.sh tests/scoring/test_losses.py
"""

import numpy as np
import plain
import pytest
import torch
from small import ROOT, call, flags, log, pack, refusal, run
from test_window import ALONE, BASE, T, flat, made, make_home, off
from torch.nn.functional import logsigmoid

import config
import losses
import score
import train_dpo
from reporting import diagnosis, history, page
from scoring import noise, sft_noise

# The arguments that each loss is tried with; beta 0.2
GIVEN = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "sigmoid_norm": {},
    "robust": {"label_smoothing": 0.1},
    "exo_pair": {"label_smoothing": 0.01},
    "nca_pair": {},
    "bco_pair": {},
    "sppo_hard": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {"discopop_tau": 0.2},
    "simpo": {"simpo_gamma": 0.7, "label_smoothing": 0.1},
    "cpo": {"cpo_alpha": 0.3},
    "sft": {},
}
BETA = 0.2


def trl(name, policy, ref, tokens, nll, given):
    """The loss of one pair as TRL 1.16.0 has it: trl/trainer/dpo_trainer.py, trl/experimental/cpo/cpo_trainer.py.

    policy, ref: scores of chosen and rejected. There a batch's mean; nll is its cross-entropy of chosen responses.
    """
    e = given.get("label_smoothing", 0.0)
    chosen, rejected = policy[0] - ref[0], policy[1] - ref[1]
    delta = chosen - rejected
    mean_delta = chosen / tokens[0] - rejected / tokens[1]
    own_delta = policy[0] - policy[1]
    own_mean_delta = policy[0] / tokens[0] - policy[1] / tokens[1]
    if name == "sigmoid":
        return -logsigmoid(BETA * delta)
    if name == "hinge":
        return torch.relu(1 - BETA * delta)
    if name == "ipo":
        return (mean_delta - 1 / (2 * BETA)) ** 2
    if name == "sigmoid_norm":
        return -logsigmoid(BETA * mean_delta)
    if name == "robust":
        clean, flipped = -(1 - e) * logsigmoid(BETA * delta), -e * logsigmoid(-BETA * delta)
        return (clean - flipped) / (1 - 2 * e)
    if name == "exo_pair":
        qw, ql = torch.sigmoid(BETA * delta), torch.sigmoid(-BETA * delta)
        return qw * (qw.log() - np.log1p(-e)) + ql * (ql.log() - np.log(e))
    if name == "nca_pair":
        won, lost = BETA * chosen, BETA * rejected
        return -logsigmoid(won) - 0.5 * logsigmoid(-won) - 0.5 * logsigmoid(-lost)
    if name == "bco_pair":
        return -logsigmoid(BETA * chosen) - logsigmoid(-(BETA * rejected))
    if name == "sppo_hard":
        return (chosen - 0.5 / BETA) ** 2 + (rejected + 0.5 / BETA) ** 2
    if name == "apo_zero":
        return 1 - torch.sigmoid(BETA * chosen) + torch.sigmoid(BETA * rejected)
    if name == "apo_down":
        return torch.sigmoid(BETA * chosen) + 1 - torch.sigmoid(BETA * delta)
    if name == "discopop":
        logits = delta * BETA
        modulation = torch.sigmoid(logits / given["discopop_tau"])
        return -logsigmoid(logits) * (1 - modulation) + torch.exp(-logits) * modulation
    if name == "simpo":
        logits = own_mean_delta - given["simpo_gamma"] / BETA
        return -logsigmoid(BETA * logits) * (1 - e) - logsigmoid(-BETA * logits) * e
    if name == "cpo":
        return -logsigmoid(BETA * own_delta) + given["cpo_alpha"] * nll
    assert name == "sft"
    return nll


def test_every_loss_has_an_oracle():
    assert {name for name, loss in losses.LOSSES.items() if "preferences" in loss.tasks} == GIVEN.keys()


@pytest.mark.parametrize("name", GIVEN)
def test_value(name):
    """TRL's on the same scores to 1e-6, and its slopes."""
    args, loss = config.TrainArguments(beta=BETA, **GIVEN[name]), losses.LOSSES[name]
    rng, ref, tokens = np.random.default_rng(0), (-40.0, -55.0), (3, 7)
    for gains in [(0, 0), (3, -4), (-3, 4), (60, -70), (-60, 70), *rng.normal(0, 10, (10, 2))]:
        policy = [torch.tensor(r + g, dtype=torch.float64, requires_grad=True) for r, g in zip(ref, gains)]
        nll = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
        got = loss.function(losses.Pair(*map(loss.gain, policy, ref, tokens), nll), args)
        want = trl(name, policy, ref, tokens, nll, GIVEN[name])
        assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-6, abs=1e-6)
        inputs = [*policy, nll]
        slopes, wanted = (
            [0.0 if each is None else float(each) for each in torch.autograd.grad(of, inputs, allow_unused=True)]
            for of in (got, want)
        )
        assert slopes == pytest.approx(wanted, rel=1e-6, abs=1e-9)
        assert any(wanted) or name == "hinge"


def test_far_margins_are_finite():
    """In float32, where a sigmoid is 0 or 1; the exponential part of discopop vanishes, as its limit does."""
    for name in GIVEN:
        args, loss = config.TrainArguments(beta=1.0, **GIVEN[name]), losses.LOSSES[name]
        for gain in (-4000.0, 4000.0):
            pair = [torch.tensor(gain, requires_grad=True), torch.tensor(-gain, requires_grad=True)]
            value = loss.function(losses.Pair(*pair, torch.tensor(1.0, requires_grad=True)), args)
            assert torch.isfinite(value), name
            for slope in torch.autograd.grad(value, pair, allow_unused=True):
                assert slope is None or torch.isfinite(slope), name


# --- through the engine -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tiny_dir, tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("losses"), tiny_dir)


ITEMS = {(1, 1): 0.2, (4, 0): 0.7}  # (pair, epoch): scale


@pytest.fixture(scope="module")
def true_scores(home):
    """The weights in float64, and {item: (policy, reference, NLL)} of plain.py, with a graph."""
    reveal, reference = home.reveal, plain.load(home.model)
    weights = {name: each.detach().double().requires_grad_() for name, each in home.policy.named_parameters()}
    found = {}
    for index, epoch in ITEMS:
        (prompt, *sides), steps = home.pairs[index], reveal[epoch % 2][index]
        policy = [plain.score(weights, prompt, side, each, T) for side, each in zip(sides, steps)]
        ref = [plain.score(reference, prompt, side, each, T).item() for side, each in zip(sides, steps)]
        rng = noise.generator(0, np.concatenate(home.pairs[index]), "sft", epoch)
        masked, weight = (each[0] for each in sft_noise.draw(len(sides[0]), rng))
        logp = plain.log_probs(weights, plain.hidden(masked, prompt, sides[0]))
        nll = -sum(float(weight[i]) * logp[len(prompt) + i, token] for i, token in enumerate(sides[0]))
        found[index, epoch] = policy, ref, nll
    return weights, found


def objective_of(home, loss_type, given, *argv):
    words = flags(loss_type=loss_type, beta=BETA, **given)
    return train_dpo.prepare(train_dpo.read_arguments(["--data", str(home.data), *BASE, *words, *argv]))[0]


SUM, WEIGHTS = "sigmoid,simpo,sft", (0.8, 2.0, 0.1)


@pytest.mark.parametrize("loss_type", [*(name for name in GIVEN if name != "sft"), SUM])
def test_gradient(home, true_scores, loss_type):
    """Rows divided over passes, and in one graph: the gradient is plain autograd's of TRL's formula."""
    given, weights_of = GIVEN.get(loss_type, {}), {loss_type: 1.0}
    if loss_type == SUM:
        given, weights_of = {"simpo_gamma": 0.7}, dict(zip(SUM.split(","), WEIGHTS))
    listed = ["--loss_weights", *map(str, weights_of.values())] if loss_type == SUM else []
    made_by = objective_of(home, loss_type, given, *listed)
    weights, scores = true_scores
    total, values = 0.0, []
    for item, scale in ITEMS.items():
        policy, ref, nll = scores[item]
        tokens = [len(side) for side in home.pairs[item[0]][1:]]
        parts = [weight * trl(name, policy, ref, tokens, nll, given) for name, weight in weights_of.items()]
        values.append(sum(parts))
        total = total + scale * values[-1]
    names = [each for each, _ in home.policy.named_parameters()]
    true = flat(torch.autograd.grad(total, [weights[each] for each in names], retain_graph=True))
    assert true.norm() > 1e-3
    pieces = [made_by.piece(item, scale) for item, scale in ITEMS.items()]
    for size in (1, 10**5):
        got = made(home.policy, pieces, size, ALONE)
        assert off(got.gradient, true) < 1e-5, size
        for (value, _), want in zip(got.results, values):
            assert float(value) == pytest.approx(want.item(), rel=1e-4)


# --- without a reference ----------------------------------------------------------------------------------


def test_without_a_reference(home, tmp_path):
    """Nothing is scored before training, no reference is stored, and the report does not speak of one."""
    data = pack(tmp_path / "packed", home.pairs, home.model)
    argv = ["--data", data, *BASE, *flags(loss_type="simpo", beta=2.0)]
    assert "loss_type simpo needs no reference scores" in run([ROOT / "score.py", *argv])
    out = flags(output_dir=tmp_path / "run", max_steps=3, gradient_accumulation_steps=2, eval_fraction=0.3)
    said = run([ROOT / "train_dpo.py", *argv, *out, *flags(learning_rate=1e-3, report_to="none")])
    assert not list(data.glob("ref-*")) and "policy and reference" not in said and "warning" not in said
    assert log(tmp_path / "run")[0]["rewards/chosen"] < 0
    assert "after SimPO (arXiv 2405.14734)" in (tmp_path / "run" / "final" / "README.md").read_text()
    found = history.read(tmp_path / "run")
    assert found.unit == "nats per token" and (found.scored.rewards.sum(-1) < 0).all() and len(found.scored.pair) > 0
    assert not [words for words in diagnosis.findings(found) if "reference" in words]
    assert "SimPO (simpo, beta 2)" in page.header([found])


def test_masks_are_those_that_would_be_stored(home):
    """So that a loss with a reference and one without see the same noise."""
    stored, drawn = objective_of(home, "sigmoid", {}), objective_of(home, "simpo", {})
    assert drawn.reference is None
    for item in ITEMS:
        for one, other in zip(stored.responses(item), drawn.responses(item), strict=True):
            assert (one.inputs == other.inputs).all() and (one.weight == other.weight).all()


def test_ld_alpha(home, tmp_path, capsys):
    """Tokens beyond the shorter response's length count alpha times, in both scores: they are linear in alpha."""
    stored = {}
    for alpha in (1, 0.25, 0):
        data = pack(tmp_path / f"packed-{alpha}", home.pairs, home.model)
        assert call(score.main, "--data", data, *BASE, "--ld_alpha", alpha) == 0
        stored[alpha] = plain.read_reference(data)[1][0]  # (pairs, 2, S)
    assert (stored[1] == plain.read_reference(home.data)[1][0]).all()
    assert np.allclose(stored[0.25], 0.25 * stored[1] + 0.75 * stored[0], rtol=1e-5, atol=1e-5)
    lengths = [[len(side) for side in sides] for _, *sides in home.pairs]
    for n, one, other in zip(lengths, stored[1], stored[0]):
        for side in (0, 1):
            assert np.allclose(one[side], other[side]) == (n[side] == min(n))
    argv = ["--data", str(data), *BASE]
    assert "ld_alpha is 0.0 there and None in this run" in refusal(train_dpo.main, capsys, *argv)
    cut = train_dpo.prepare(train_dpo.read_arguments([*argv, "--ld_alpha", "0"]))[0]
    for whole, part in zip(objective_of(home, "sigmoid", {}).responses((4, 0)), cut.responses((4, 0))):
        tail = len(home.pairs[4][0]) + min(lengths[4])
        assert (part.weight[:, :tail] == whole.weight[:, :tail]).all() and not part.weight[:, tail:].any()


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--loss_type", "dpo"], "no loss is called 'dpo', expected sigmoid"),
        (["--loss_type", "sigmoid,sigmoid"], "names a loss twice"),
        (["--loss_type", "sigmoid,"], "no loss is called ''"),
        (["--loss_type", "sigmoid,sft", "--loss_weights", "1"], "1 weights, --loss_type sigmoid,sft has 2"),
        (["--loss_weights", "2"], "belongs to a sum, and --loss_type sigmoid is one loss"),
        (["--loss_type", "sigmoid", "sigmoid"], "names a loss twice"),
        (["--loss_type", "sigmoid,sft", "--sft_pad_to", "9"], "pads rows of --loss_type sft alone"),
        (["--loss_weights", "1,x"], "1,x is not numbers"),
        (["--loss_weights", "-1"], "expected numbers above 0"),
        (["--loss_weights", "nan"], "expected numbers above 0"),
        (["--loss_type", "sigmoid,sft", "--sft_weight", "1"], "leave it out with --loss_type sigmoid,sft"),
        (["--loss_type", "exo_pair"], "needs --label_smoothing above 0"),
        (["--simpo_gamma", "1"], "--simpo_gamma 1.0 belongs to --loss_type simpo, not sigmoid"),
        (["--loss_type", "simpo", "--cpo_alpha", "0"], "--cpo_alpha 0.0 belongs to --loss_type cpo"),
        (["--ld_alpha", "1.5"], "--ld_alpha is 1.5, expected 0 to 1"),
        (["--loss_type", "discopop", "--discopop_tau", "0"], "--discopop_tau is 0.0"),
    ],
)
def test_refused(tmp_path, capsys, argv, words):
    said = refusal(train_dpo.main, capsys, "--data", tmp_path, *argv)
    assert words in said

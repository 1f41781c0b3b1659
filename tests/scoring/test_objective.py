"""Tests of scoring/objective.py and losses.py: losses, split, order of the data.

bash tests/run.sh tests/scoring/test_objective.py
"""

import math
from types import SimpleNamespace

import numpy as np
import plain
import pytest
import torch
from small import EOS, LENGTHS, MASK, call, ds_config, flags, log, make_model, make_pairs, pack, run_jobs

import config
import losses
import score
import train_dpo
from files import InputError
from models.families import Masking
from preferences import packed as disk
from scoring import objective
from training import engine

T, R = 3, 2  # S = 5
NOISE = flags(estimator="spread", diffusion_steps=T, trajectories=R, noise_sets=2)
BASE = [*NOISE, *flags(use_mixed_precision="no")]


@pytest.fixture(scope="module")
def home(tiny_dir, tmp_path_factory):
    """A model, pairs and its reference scores for them, two noise sets."""
    folder = tmp_path_factory.mktemp("objective")
    model = make_model(folder / "model", tiny_dir)
    data = pack(folder / "packed", make_pairs(LENGTHS[:6]), model)
    assert call(score.main, "--data", data, *BASE) == 0
    return SimpleNamespace(model=model, data=data, pairs=plain.read_packed(data), reveal=plain.read_reference(data)[0])


def preference(home, *argv):
    """The Preference that train_dpo's command line makes."""
    groups = train_dpo.read_arguments(["--data", str(home.data), *BASE, *map(str, argv)])
    return train_dpo.prepare(groups)[0]


# The loss


def loss_of(name, chosen, rejected=0.0, nll=None, **given):
    """A loss of LOSSES, at gains as they are."""
    pair = losses.Pair(torch.tensor(chosen), torch.tensor(rejected), nll)
    return float(losses.LOSSES[name].function(pair, config.TrainArguments(**given)))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_preference_loss(smoothing):
    for margin in (-30.0, -1.5, 0.0, 0.7, 30.0):
        for beta in (0.05, 0.5):
            got = loss_of("sigmoid", margin, beta=beta, label_smoothing=smoothing)
            assert got == pytest.approx(float(plain.preference_loss(margin, beta, smoothing)), rel=1e-5, abs=1e-7)
    assert loss_of("sigmoid", -4000.0, beta=1.0) == 4000  # finite where sigmoid is 0
    assert loss_of("sigmoid", 0.0, label_smoothing=smoothing) == pytest.approx(math.log(2), abs=1e-7)


def test_a_new_loss_is_one_row(monkeypatch):
    """What docs/development.md says: a function and its row in the table; other names are refused at once."""
    with pytest.raises(InputError, match="no loss is called 'cubic'"):
        config.parse(["--loss_type", "cubic"], "", *config.GROUPS)

    def cubic(pair, args):
        return args.beta * pair.margin**3

    monkeypatch.setitem(losses.LOSSES, "cubic", losses.Loss(cubic, "Cubic", "a cubic loss", is_per_token=True))
    train_args = config.parse(["--loss_type", "sigmoid,cubic", "--loss_weights", "2,3"], "", *config.GROUPS)[3]
    config.check(train_args)
    packed = SimpleNamespace(lines=lambda: None)
    noise_args = config.NoiseArguments(estimator="spread", diffusion_steps=3, trajectories=3)
    made = objective.Preference(train_args, noise_args, packed, None, Masking(MASK))
    made.ref_scores, made.response_tokens = (lambda item: (-5.0, -4.0)), (lambda item: (2, 4))
    want = 2 * -math.log(1 / (1 + math.exp(-0.1 * (3 - 1)))) + 3 * 0.1 * (3 / 2 - 1 / 4) ** 3
    assert float(made.loss((0, 0))([torch.tensor(-2.0), torch.tensor(-3.0)])) == pytest.approx(want)


@pytest.mark.parametrize("loss_type", ["hinge", "ipo"])
def test_other_losses_of_a_pair(home, loss_type):
    """hinge takes sums over the response, ipo means over its tokens; chosen and rejected differ in length."""
    made, item, beta = preference(home, "--beta", 0.05, "--loss_type", loss_type), (4, 1), 0.05
    _, chosen, rejected = home.pairs[4]
    n = (len(chosen), len(rejected)) if loss_type == "ipo" else (1, 1)
    assert len(chosen) != len(rejected)
    reference = made.ref_scores(item)
    for moved in (3.0, -2.0):
        scores = [
            torch.tensor(float(reference[0]) + moved, requires_grad=True),
            torch.tensor(float(reference[1]) + 1.0),
        ]
        margin = moved / n[0] - 1 / n[1]
        want = max(0.0, 1 - beta * margin) if loss_type == "hinge" else (margin - 1 / (2 * beta)) ** 2
        loss = made.loss(item)(scores)
        assert float(loss.detach()) == pytest.approx(want, rel=1e-4)
        _, *rewards, margins, accuracy, logp, _, _ = made.measure(
            item, loss, [score.detach()[None] for score in scores]
        ).tolist()
        assert rewards == pytest.approx([beta * moved / n[0], beta / n[1]], rel=1e-3) and margins == pytest.approx(
            beta * margin, rel=1e-3
        )
        assert accuracy == (margin > 0) and logp == pytest.approx(
            float(scores[0].detach())
        )  # of the margin that the loss takes
        slope = -beta if loss_type == "hinge" else 2 * (margin - 1 / (2 * beta)) / n[0]
        assert float(torch.autograd.grad(loss, scores[0])[0]) == pytest.approx(slope, rel=1e-4)


def test_measure(home):
    """TRL's names: reward = beta * (policy - reference), accuracy = chosen above rejected."""
    made = preference(home, "--beta", 0.5)
    (ref_w, ref_l) = made.ref_scores((2, 1))
    stored = plain.read_reference(home.data)[1][1][2].sum(-1)
    assert [ref_w, ref_l] == pytest.approx(stored.tolist()) and not np.allclose(made.ref_scores((2, 0)), stored)
    scores = [torch.tensor([float(ref_w) + 1, 2.0]), torch.tensor([float(ref_l), -1.0])]  # by state
    got = dict(zip(objective.METRICS, made.measure((2, 1), torch.tensor(0.25), scores)))
    assert got == pytest.approx(
        {
            "loss": 0.25,
            "rewards/chosen": 1.5,
            "rewards/rejected": -0.5,
            "rewards/margins": 2.0,
            "rewards/accuracies": 1,
            "logps/chosen": ref_w + 3,
            "logps/rejected": ref_l - 1,
        },
        rel=1e-5,
    )
    assert made.measure((2, 1), torch.tensor(0.25), scores)[-1] == 1
    assert made.measure((2, 1), torch.tensor(0.25), scores[::-1])[4] == float(ref_l - 1 - ref_w > ref_w + 3 - ref_l)


def test_replayed_states(home):
    """Epoch e replays noise set e mod K."""
    made = preference(home)
    for index, epoch in ((2, 0), (2, 1), (5, 2), (0, 5)):
        for states, side, reveal in zip(
            made.responses((index, epoch)), home.pairs[index][1:], home.reveal[epoch % 2][index]
        ):
            prompt = home.pairs[index][0]
            start = len(prompt)
            rows = [plain.hidden([True] * len(side), prompt, side)]
            for steps in reveal:
                for s in (1, 2):
                    rows.append(plain.hidden([step >= s for step in steps], prompt, side))
            assert states.inputs.tolist() == rows
            revealed = sum(steps.count(0) for steps in reveal)  # from state 0, which hides all of them
            assert np.allclose(states.weight[0, start:], revealed / R / len(side))


def test_work():
    packed = SimpleNamespace(lines=lambda: None)
    made = objective.Preference(
        config.TrainArguments(),
        config.NoiseArguments(estimator="spread", diffusion_steps=3, trajectories=3),
        packed,
        None,
        Masking(MASK),
    )
    assert made.work([(3, 0), (1, 0), (2, 1)]) == [((3, 0), 1 / 3), ((1, 0), 1 / 3), ((2, 1), 1 / 3)]
    assert made.counts == [7, 7]


# The split and the order


class Rows:
    """As much of packed.Packed as the split reads."""

    def __init__(self, prompts):
        self.prompts, self.folder = prompts, "packed"

    def __len__(self):
        return len(self.prompts)

    def __getitem__(self, index):
        return (np.array(self.prompts[index], np.uint32),)


def test_split():
    rng = np.random.default_rng(0)
    prompts = [rng.integers(4, 500, 6).tolist() for _ in range(60)]
    prompts += [prompts[i] for i in range(0, 60, 2)]  # a second pair of every other prompt
    train, held = objective.split(Rows(prompts), 0.25, 42)
    assert sorted([*train, *held]) == list(range(90))
    trained, held_out = (set(map(tuple, np.array(prompts)[side])) for side in (train, held))
    assert not trained & held_out and len(held_out) == 15
    assert list(train) == sorted(train) and list(held) == sorted(held)
    assert objective.split(Rows(prompts), 0.25, 43)[1].tolist() != held.tolist()
    none = objective.split(Rows(prompts), 0.0, 42)
    assert len(none[0]) == 90 and len(none[1]) == 0
    assert len(objective.split(Rows(prompts), 0.001, 42)[1]) > 0  # a share that was asked for is not rounded away
    order = rng.permutation(90)  # content decides, not the place in the file
    again = objective.split(Rows([prompts[i] for i in order]), 0.25, 42)[1]
    assert {tuple(prompts[order[i]]) for i in again} == held_out
    with pytest.raises(InputError, match="eval_fraction"):
        objective.split(Rows(prompts[:1]), 0.5, 42)


def test_split_is_stable():
    """Pairs of known prompts change nothing; new prompts push out few: at most as many as came in."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(4, 500, 6).tolist() for _ in range(100)]

    def held(rows):
        return {tuple(rows[i]) for i in objective.split(Rows(rows), 0.2, 42)[1]}

    before = held(prompts)
    assert held(prompts + prompts[:30]) == before
    after = held(prompts + [rng.integers(4, 500, 6).tolist() for _ in range(5)])
    assert len(before - after) <= 5 and len(after) == 21


@pytest.mark.parametrize("lengths, block", [(None, 1), (True, 1), (True, 3)])
def test_stream(lengths, block):
    train = np.array([3, 5, 7, 8, 10, 11, 20, 21, 22, 23])
    lengths = np.random.default_rng(0).integers(1, 90, 30) if lengths else None

    def make(seed=0):
        return objective.Stream(train, seed, block, lengths)

    stream = make()
    places = [stream[place] for place in range(40)]
    pairs, epochs = np.array(places).T
    assert epochs.tolist() == [place // 10 for place in range(40)]
    orders = pairs.reshape(4, 10)
    assert (np.sort(orders) == train).all() and len(np.unique(orders, axis=0)) > 2
    for place in np.random.default_rng(1).permutation(40):  # any access order, an old reader or a new one
        assert stream[place] == make()[place] == places[place]
    assert [make(1)[place] for place in range(10)] != places[:10]


def test_stream_blocks():
    """SFT: pairs of like length stand together, in blocks of a micro-batch."""
    lengths = np.random.default_rng(0).permutation(96)
    stream = objective.Stream(np.arange(96), 0, 4, lengths)
    streamed = np.array([lengths[stream[place][0]] for place in range(96)]).reshape(-1, 4)
    assert np.ptp(streamed, axis=1).max() < 10 < np.ptp(lengths.reshape(-1, 4), axis=1).mean()


# SFT


def test_sft_rows(home):
    """Rows are filled up with end tokens, which are masked and weighed like any other; the prompt never is."""
    data = disk.Packed(home.data)
    rows = [(3, 0), (2, 0), (5, 1)]  # chosen of 2, 12 and 5 tokens after prompts of 6, 4 and 9
    for pad_to, longest in ((0, 16), (20, 29)):
        made = objective.sft_rows(rows, data, pad_to, 0, Masking(MASK))
        assert [states.inputs.shape for states in made] == [(1, longest)] * 3
        for states, (index, _) in zip(made, rows):
            prompt, chosen, _ = home.pairs[index]
            start = len(prompt)
            response = chosen + [EOS] * (longest - start - len(chosen))
            assert states.targets[0].tolist() == prompt + response
            assert states.inputs[0, :start].tolist() == prompt and not states.weight[0, :start].any()
            masked = states.inputs[0, start:] == MASK
            assert (states.inputs[0, start:][~masked] == np.array(response)[~masked]).all()
            weights = set(states.weight[0, start:][masked].tolist())  # 1 / (p n), one p a row
            assert len(weights) <= 1 and all(1 / (longest - start) <= value for value in weights)
            assert not states.weight[0, start:][~masked].any()
    padded = [objective.sft_rows([(3, epoch)], data, 60, 0, Masking(MASK))[0] for epoch in range(20)]
    assert any((states.inputs[0, 8:] == MASK).any() for states in padded)  # an end token is masked
    assert len({states.inputs.tobytes() for states in padded}) == 20  # each epoch draws its own noise
    one, other = (objective.sft_rows([(3, 7)], data, 0, 0, Masking(MASK))[0].inputs for _ in range(2))
    assert (one == other).all()


def test_sft_does_not_give_the_length_away(home, tmp_path):
    """Which rows stand together, and how much room a response has, are the same whatever the responses are."""
    pairs = make_pairs([(p, n, 1) for p, n in zip(range(3, 43), np.random.default_rng(0).permutation(40) + 1)])
    swapped = [(prompt, other[1], rejected) for (prompt, _, rejected), other in zip(pairs, pairs[::-1])]
    rooms = []
    for name, each in (("pairs", pairs), ("swapped", swapped)):
        data = disk.Packed(pack(tmp_path / name, each, home.model))
        made = objective.SFT(config.TrainArguments(sft_pad_to=40), config.NoiseArguments(), data, Masking(MASK))
        assert made.work([(3, 0), (1, 0)]) == [([(3, 0), (1, 0)], 1.0)]
        stream = objective.Stream(np.arange(40), 0, 4, made.lengths)
        places = [stream[place] for place in range(40)]
        batches = [places[first : first + 4] for first in range(0, 40, 4)]
        rooms.append([(batch, [states.inputs.shape for states in made.responses(batch)]) for batch in batches])
        prompts = np.array([len(each[index][0]) for index, _ in places]).reshape(-1, 4)
        assert np.ptp(prompts, axis=1).max() < 12  # little is padded
    assert rooms[0] == rooms[1]


def test_expected_nll(home):
    """With predictions that do not look at the input, the mean over draws is the mean of -log p over the response."""
    data, rng = disk.Packed(home.data), np.random.default_rng(0)
    prompt, chosen, _ = home.pairs[4]
    logp = np.log(rng.dirichlet(np.ones(512), 40))  # by position

    def model(input_ids, positions, targets):
        return torch.tensor(logp[positions.numpy() % input_ids.shape[1], targets], dtype=torch.float32)

    ranks = engine.Ranks(0, 1, torch.device("cpu"))

    response = chosen + [EOS] * 2
    want = np.mean([-logp[len(prompt) + i, token] for i, token in enumerate(response)])
    draws = []
    for epoch in range(4000):
        rows = objective.sft_rows([(4, epoch)], data, 32, 0, Masking(MASK))
        [drawn] = score.state_scores(model, rows, 64, ranks)
        draws.append(-float(drawn.sum()))
    assert np.mean(draws) == pytest.approx(want, abs=4 * np.std(draws) / 4000**0.5)
    assert np.std(draws) / 4000**0.5 < 0.02 * want


def test_sft_lowers_the_loss(home, tmp_path):
    """--loss_type sft through the command line, on 2 ranks of ZeRO-2; needs no reference scores."""
    data = pack(
        tmp_path / "packed", make_pairs([(4, 12, 3), (5, 20, 3), (3, 8, 3), (6, 15, 3), (4, 10, 3)] * 3), home.model
    )
    argv = [
        "--data",
        data,
        "--output_dir",
        tmp_path / "run",
        "--loss_type",
        "sft",
        *flags(
            use_mixed_precision="no",
            learning_rate=0.01,
            max_steps=20,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            tokens_per_forward=60,
            eval_fraction=0.3,
            eval_steps=19,
            lr_scheduler_type="constant",
            warmup_ratio=0,
            deepspeed=ds_config(tmp_path / "zero2.json", "zero2"),
        ),
    ]
    [first, second] = run_jobs(tmp_path / "out", 2, [("sft", "train_dpo", argv)])["sft"]
    assert first["error"] == second["error"] == ""
    assert first["passes"] == second["passes"] and len(first["passes"]) == 20
    assert all(made in ([0, 2, 2], [0, 1, 1]) for made in first["passes"].values()), "a pass without a graph"
    assert first["eval_forwards"] == second["eval_forwards"] == 2  # 5 rows held out on 2 ranks, in one pass, twice
    lines = log(tmp_path / "run")
    losses = [line["loss"] for line in lines]
    assert len(losses) == 20 and sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert "rewards/margins" not in lines[0] and "eval_loss" in lines[-1] and "eval_loss" not in lines[0]

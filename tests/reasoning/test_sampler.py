"""Tests of the sampler: the original's tokens, a naive sampler of this file's own, and its options.

bash tests/run.sh tests/reasoning/test_sampler.py
"""

import argparse
import copy
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from small import ROOT, settings

from models import checkpoint
from models.llada import LLaDAConfig, LLaDAModelLM
from reasoning import commits, sampler

GOLDEN = ROOT.parent / "shared" / "data" / "llada_golden"
MASK = 3
torch.set_num_threads(1)  # tiny tensors: threads only wait for each other where the machine is busy


@pytest.fixture(scope="module")
def model():
    """Random, with weights large enough that no two predictions nearly tie; it hardly ever says mask."""
    torch.manual_seed(2)
    model = LLaDAModelLM(
        LLaDAConfig(
            d_model=32,
            n_layers=2,
            n_heads=4,
            mlp_hidden_size=48,
            vocab_size=40,
            init_std=0.6,
            rope_theta=100.0,
            mask_token_id=MASK,
        )
    ).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight[MASK] = 0
    return model


def prompts_of(B, P):
    return torch.randint(4, 40, (B, P), generator=torch.Generator().manual_seed(B * 100 + P))


# --- the sampler ------------------------------------------------------------------------------------------


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no {GOLDEN}: nothing to compare with the original's sampler")
def test_tokens_of_the_original():
    golden = np.load(GOLDEN / "ref_gen.npz")
    model = checkpoint.load_model(str(GOLDEN), torch.float32).eval()
    names = [key.removesuffix("/prompt") for key in golden.files if key.endswith("/prompt")]
    assert names
    for name in names:
        prompt, out = (torch.from_numpy(golden[f"{name}/{part}"]) for part in ("prompt", "out"))
        sample = settings(**json.loads(str(golden[f"{name}/kw"])))
        assert torch.equal(torch.cat((prompt, sampler.generate(model, prompt, sample, int(golden["mask"]))), 1), out), (
            name
        )


def naive_logits(model, x, P, sample, eos):
    """The whole sequence's logits (L, V), guided, without eos where the sample says so."""
    logits = model(torch.tensor([x])).logits[0]
    if sample.cfg_scale:
        unconditional = model(torch.tensor([[MASK] * P + x[P:]])).logits[0]
        logits = unconditional + (sample.cfg_scale + 1) * (logits - unconditional)
    if sample.logits_eos_inf:
        logits[:, eos] = -torch.inf
    return logits


def naive_options(z, sample, draw, eos, eot):
    """[(confidence, token)] of one block's masked positions from their logits z (N, V)."""
    noise = torch.rand(z.shape, dtype=torch.float64, generator=draw) if sample.temperature else torch.ones(z.shape)
    random = torch.rand(len(z), dtype=torch.float64, generator=draw) if sample.remasking == "random" else None
    options = []
    for i, (row, u) in enumerate(zip(z, noise)):
        if sample.temperature:
            value = [math.exp(a) / (-math.log(b)) ** sample.temperature for a, b in zip(row.tolist(), u.tolist())]
        else:
            value = row.tolist()
        token = max(range(len(value)), key=lambda v: value[v])
        if sample.confidence_eos_eot_inf:
            row = row.clone()
            row[eos] = row[eot] = -torch.inf
        options.append((float(torch.softmax(row, 0)[token]) if random is None else float(random[i]), token))
    return options


@torch.no_grad()
def naive(model, prompt, sample, key=0, eos=None, eot=None):
    """models.md's recipe on one prompt (P,), never stopping, with the logits of the whole sequence."""
    x, draw = prompt.tolist() + [MASK] * sample.gen_length, commits.row_generator(sample.seed, key)
    for first in range(len(prompt), len(x), sample.block_length):
        passes = sample.block_length if sample.threshold else sample.steps * sample.block_length // sample.gen_length
        for step in range(passes):
            places = [i for i in range(first, first + sample.block_length) if x[i] == MASK]
            if not places:
                break
            logits = naive_logits(model, x, len(prompt), sample, eos)
            options = naive_options(logits[places], sample, draw, eos, eot)
            ranked = sorted(((sure, -place, token) for place, (sure, token) in zip(places, options)), reverse=True)
            n = sample.block_length // passes + (step < sample.block_length % passes)
            if sample.threshold:
                n = max(1, sum(sure >= sample.threshold for sure, _, _ in ranked))
            for _, place, token in ranked[:n]:
                x[-place] = token
    return x[len(prompt) :]


def cut(ids, *ends):
    """`ids` up to and with the first end."""
    return ids[: next((k + 1 for k, token in enumerate(ids) if token in ends), len(ids))]


@pytest.mark.parametrize(
    "steps, gen_length, block_length", [(12, 12, 12), (6, 12, 4), (5, 12, 12), (15, 12, 4), (1, 6, 6), (40, 8, 8)]
)
def test_steps_against_naive(model, steps, gen_length, block_length):
    prompts, sample = prompts_of(3, 5), settings(steps=steps, gen_length=gen_length, block_length=block_length)
    got = sampler.generate(model, prompts, sample, MASK)
    assert got.tolist() == [naive(model, prompt, sample) for prompt in prompts]
    assert len(set(got.flatten().tolist())) > 3  # a constant answer would compare nothing


def common_ends(model, prompts, sample):
    """(eos, eot): tokens that the model says often enough that the flags about them matter, and not at once."""
    said = Counter(sampler.generate(model, prompts, sample, MASK).flatten().tolist())
    return [token for token, _ in said.most_common(4)[2:]]


@pytest.mark.parametrize(
    "options",
    [
        {"cfg_scale": 1.5},
        {"logits_eos_inf": True},
        {"confidence_eos_eot_inf": True},
        {"remasking": "random"},
        {"temperature": 0.8},
        {"threshold": 0.6},
        {"cfg_scale": 0.5, "threshold": 0.7, "temperature": 0.5},
        {"temperature": 0.8, "confidence_eos_eot_inf": True},
        {"temperature": 1.2, "remasking": "random", "cfg_scale": 2.0},
        {"logits_eos_inf": True, "confidence_eos_eot_inf": True, "temperature": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("block_length", [4, 12])
def test_options_against_naive(model, options, block_length):
    """Each response is the naive sampler's up to its end, alone and in a batch, and the options change what is said."""
    prompts, plain = prompts_of(6, 5), settings(gen_length=12, block_length=block_length)
    eos, eot = common_ends(model, prompts, plain)
    sample = settings(gen_length=12, block_length=block_length, seed=2, **options)
    keys = range(10, 16)
    got = [cut(ids, eos, eot) for ids in sampler.generate(model, prompts, sample, MASK, eos, eot, keys).tolist()]
    want = [naive(model, prompt, sample, key, eos, eot) for prompt, key in zip(prompts, keys)]
    assert got == [cut(ids, eos, eot) for ids in want]
    assert want != [naive(model, prompt, plain) for prompt in prompts]
    assert sum(map(len, got)) > 18  # not all are cut at once
    for row in range(6):
        alone = sampler.generate(model, prompts[row : row + 1], sample, MASK, eos, eot, keys[row : row + 1])
        assert cut(alone[0].tolist(), eos, eot) == got[row]


def test_whole_responses_against_naive(model):
    """Without an end nothing is cut: every id is compared."""
    prompts = prompts_of(4, 6)
    for options in ({"cfg_scale": 1.5}, {"remasking": "random"}, {"temperature": 0.8}, {"threshold": 0.6}):
        sample = settings(gen_length=12, block_length=6, **options)
        want = [naive(model, prompt, sample, key) for key, prompt in enumerate(prompts)]
        assert sampler.generate(model, prompts, sample, MASK).tolist() == want, options


def rows_of_passes(model, monkeypatch):
    seen, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda **kw: seen.append(len(kw["input_ids"])) or forward(**kw))
    return seen


def test_passes_and_positions(model, monkeypatch):
    """steps forward passes, each with logits for nothing but the block's masked positions."""
    seen, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda **kw: seen.append(kw["positions"].tolist()) or forward(**kw))
    sampler.generate(model, prompts_of(2, 3), settings(steps=4, gen_length=8, block_length=4), MASK)
    assert [len(positions) for positions in seen] == [8, 4, 8, 4]  # two rows; half a block of 4 per pass
    assert seen[0] == [3, 4, 5, 6, 14, 15, 16, 17] and seen[2] == [7, 8, 9, 10, 18, 19, 20, 21]


@pytest.mark.parametrize("swap", [False, True])
def test_ended_rows_leave_the_batch(model, monkeypatch, swap):
    """After the block that holds its eos or end-of-turn, a row takes no pass and no further block of it is filled."""
    prompts, sample = prompts_of(6, 5), settings(gen_length=12, block_length=4)
    full = sampler.generate(model, prompts, sample, MASK).tolist()
    ends = (full[0][4], full[1][7])[:: -1 if swap else 1]  # each is first in some row
    blocks = [-(-len(cut(ids, *ends)) // 4) for ids in full]
    assert min(blocks) < 3 == max(blocks)
    for end in ends:
        assert blocks != [-(-len(cut(ids, end)) // 4) for ids in full]
    seen = rows_of_passes(model, monkeypatch)
    got = sampler.generate(model, prompts, sample, MASK, *ends).tolist()
    assert got == [ids[: 4 * n] + [MASK] * (12 - 4 * n) for ids, n in zip(full, blocks)]
    rows = []
    for block in range(3):
        rows += 4 * [sum(n > block for n in blocks)]
    assert seen == rows


def test_threshold_bounds(model, monkeypatch):
    """At threshold 1 an unsure model commits one token a pass, the plain sampler; near 0 a block is one pass."""
    prompts = prompts_of(3, 5)
    plain = sampler.generate(model, prompts, settings(gen_length=12, block_length=4), MASK)
    assert torch.equal(
        sampler.generate(model, prompts, settings(gen_length=12, block_length=4, threshold=1.0), MASK), plain
    )
    seen = rows_of_passes(model, monkeypatch)
    once = sampler.generate(model, prompts, settings(gen_length=12, block_length=4, threshold=1e-9), MASK)
    assert seen == [3, 3, 3]
    assert torch.equal(once, sampler.generate(model, prompts, settings(gen_length=12, block_length=4, steps=3), MASK))
    seen.clear()
    sampler.generate(model, prompts, settings(gen_length=12, threshold=0.7), MASK)
    assert len(seen) < 12 and len(set(seen)) > 1  # a row whose block is full leaves the others to their passes


def test_threshold_is_reached(model):
    """A confidence equal to the threshold is committed."""
    prompts = prompts_of(1, 5)
    with torch.no_grad():
        logits = model(torch.cat((prompts, torch.full((1, 4), MASK)), 1)).logits[0, 5:]
    sure, token = logits.softmax(-1).max(-1)
    low = int(sure.argmin())
    got = sampler.generate(model, prompts, settings(gen_length=4, threshold=float(sure[low])), MASK)
    assert got[0].tolist() == token.tolist()  # all four in the first pass


def test_threshold_in_float32():
    """bfloat16 knows nothing between 0.996 and 1, where a threshold may well lie."""
    logits = torch.tensor([[6.25, 0.0]]).bfloat16()
    chosen, ends = torch.tensor([0]), torch.tensor([], dtype=torch.long)
    sure = commits.confidences(logits, chosen, [1], [None], settings(threshold=0.999), ends)
    assert sure.item() == pytest.approx(1 / (1 + math.exp(-6.25)), abs=1e-6) and sure.item() < 0.999
    plain = commits.confidences(logits, chosen, [1], [None], settings(), ends)
    assert plain.dtype == torch.bfloat16 and plain.item() == 1  # as in the original


def test_prompt_mask_is_never_filled(model):
    """A mask id in the prompt is the prompt's: only the response is sampled."""
    prompts = torch.full((1, 3), MASK)
    got = sampler.generate(model, prompts, settings(gen_length=4), MASK)
    assert prompts.tolist() == [[MASK] * 3] and got.shape == (1, 4) and MASK not in got[0].tolist()


@pytest.mark.parametrize("options", [{}, {"threshold": 0.5}])
def test_predicted_mask_ends_all_the_same(options):
    """A model that says nothing but mask: as many passes as there are, then a response of masks."""
    logits = torch.zeros(40).index_fill(0, torch.tensor(MASK), 9.0)

    class Model:
        device, blocks = torch.device("cpu"), None

        def __call__(self, input_ids, positions):
            return argparse.Namespace(logits=logits.repeat(len(positions), 1))

    got = sampler.generate(Model(), prompts_of(2, 3), settings(gen_length=4, **options), MASK, eos=5)
    assert got.tolist() == [[MASK] * 4] * 2


@pytest.mark.parametrize("options", [{"temperature": 0.5}, {"threshold": 0.9}, {"cfg_scale": 1.0}])
def test_bfloat16(model, options):
    half = copy.deepcopy(model).bfloat16()
    got = sampler.generate(half, prompts_of(2, 4), settings(gen_length=8, block_length=4, **options), MASK)
    assert got.dtype == torch.long and got.shape == (2, 8) and MASK not in got.flatten().tolist()


def test_temperature_is_the_originals():
    """The argmax of exp(z) / (-log u)^T in float64, each row of the batch with its own u."""
    z, draws = torch.randn(60, 50) * 4, [torch.Generator().manual_seed(row) for row in range(3)]
    got = commits.choose(z, [10, 0, 50], draws, 0.7)
    u = torch.cat(
        [
            torch.rand(n, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(row))
            for row, n in ((0, 10), (2, 50))
        ]
    )
    assert torch.equal(got, (z.double().exp() / (-u.log()) ** 0.7).argmax(-1))
    assert not torch.equal(got, z.argmax(-1))


def test_temperature_samples_softmax():
    """argmax exp(z) / (-log u)^T is a draw from softmax(z / T)."""
    z, n, T = torch.tensor([1.0, 0.0, -1.0, 2.0]), 20000, 0.7
    draws = [commits.row_generator(5, row) for row in range(2)]
    share = commits.choose(z.expand(n, 4), [n // 2] * 2, draws, T).bincount(minlength=4) / n
    assert torch.allclose(share, torch.softmax(z / T, 0), atol=0.015)  # 4 sigma


@pytest.mark.parametrize("options", [{"temperature": 2.0}, {"remasking": "random"}])
def test_seed(model, options):
    one = prompts_of(1, 4)

    def draw(seed, keys=(0, 1, 2)):
        prompts, sample = one.expand(len(keys), 4), settings(gen_length=8, seed=seed, **options)
        return sampler.generate(model, prompts, sample, MASK, keys=keys).tolist()

    first = draw(1)
    assert first == draw(1) and first != draw(2)
    assert first[0] != first[1] != first[2]  # the same prompt thrice in a batch: three responses
    assert draw(1, keys=[2]) == first[2:]  # and the third alone is the third of the batch
    assert draw(0)[1:] != draw(1)[:2]

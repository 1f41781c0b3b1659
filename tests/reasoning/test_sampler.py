"""Tests of the sampler: the original's tokens, a naive sampler of this file's own, and its options.

bash tests/run.sh tests/reasoning/test_sampler.py
"""

import argparse
import copy
import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from small import ROOT, settings

from models import checkpoint
from models.llada import LLaDAConfig, LLaDAModelLM
from reasoning import commits, pace, sampler

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
    uniforms = torch.rand(len(z), generator=draw).tolist() if sample.temperature else [None] * len(z)
    random = torch.rand(len(z), dtype=torch.float64, generator=draw) if sample.remasking == "random" else None
    options = []
    for i, (row, u) in enumerate(zip(z, uniforms)):
        if sample.temperature:
            weights = [math.exp(value / sample.temperature) for value in row.tolist()]
            sums = list(itertools.accumulate(weights))
            token = next(v for v, total in enumerate(sums) if total > u * sums[-1])
        else:
            token = int(row.argmax())
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
    monkeypatch.setattr(model, "forward", lambda **kw: seen.append(len(kw["rows"].lengths)) or forward(**kw))
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
    sure = commits.confidences(logits, chosen, settings(threshold=0.999), ends)
    assert sure.item() == pytest.approx(1 / (1 + math.exp(-6.25)), abs=1e-6) and sure.item() < 0.999
    plain = commits.confidences(logits, chosen, settings(), ends)
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
        device, blocks, joins_rows, is_shifted = torch.device("cpu"), None, True, False

        def __call__(self, input_ids, positions, rows):
            return argparse.Namespace(logits=logits.repeat(len(positions), 1))

    got = sampler.generate(Model(), prompts_of(2, 3), settings(gen_length=4, **options), MASK, eos=5)
    assert got.tolist() == [[MASK] * 4] * 2


@pytest.mark.parametrize("options", [{"temperature": 0.5}, {"threshold": 0.9}, {"cfg_scale": 1.0}])
def test_bfloat16(model, options):
    half = copy.deepcopy(model).bfloat16()
    got = sampler.generate(half, prompts_of(2, 4), settings(gen_length=8, block_length=4, **options), MASK)
    assert got.dtype == torch.long and got.shape == (2, 8) and MASK not in got.flatten().tolist()


@pytest.mark.parametrize("V", [5, 512, 513, 3000])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_temperature_samples_softmax(V, temperature):
    """Draws are softmax(z / T)'s: Pearson's chi-square over ids, those expected less than 20 times as one."""
    n = 40_000
    z = torch.randn(V, generator=torch.Generator().manual_seed(V)) * 2
    z[::7] = -torch.inf
    uniforms = torch.rand(n, generator=commits.row_generator(5, V))
    drawn, sure = commits.predict(z.expand(n, V), uniforms, settings(temperature=temperature), torch.tensor([1]))
    torch.testing.assert_close(sure, z.softmax(-1)[drawn])
    counts, expected = drawn.bincount(minlength=V).double(), n * (z.double() / temperature).softmax(0)
    assert counts[::7].sum() == 0
    rare = expected < 20
    counts, expected = (torch.cat((x[~rare], x[rare].sum()[None])) for x in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    chi_square, degrees = float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1
    assert abs(chi_square - degrees) < 4 * (2 * degrees) ** 0.5


def test_draws_at_the_ends():
    """Neither 0 nor the largest number below 1 draws an id of probability 0."""
    last = 1 - 2**-24
    for V in (3, 512, 1100):
        p = torch.zeros(2, V)
        p[:, V // 3] = p[:, V // 2] = 0.5
        assert commits.draw(p, torch.tensor([0.0, last])).tolist() == [V // 3, V // 2]
        p = torch.rand(2000, V)
        p[:, -1] = p[:, 0] = 0
        ids = commits.draw(p, torch.tensor([0.0, last]).repeat(1000))
        assert set(ids[::2].tolist()) == {1} and set(ids[1::2].tolist()) == {V - 2}


def test_draws_where_nothing_can_be_drawn():
    """A model that is certain of the mask, which is never drawn: still an id of the vocabulary."""
    logits = torch.zeros(2, 600)
    logits[:, MASK] = 200.0
    tokens, _ = commits.predict(logits, torch.tensor([0.2, 0.9]), settings(temperature=1.0), torch.tensor([1]), MASK)
    assert tokens.max() < 600


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


# --- rows of any length, and caches -----------------------------------------------------------------------


def ids_of(model, prompts, sample, size, keys=None, ends=(), pace=None):
    """The ids of the response to each of prompts, at most `size` at a time."""
    special = sampler.special_ids(MASK, *ends) if ends else sampler.special_ids(MASK, None, None)
    keys = range(len(prompts)) if keys is None else keys
    filled = dict(sum(sampler.fill(model, prompts, sample, special, keys, size, pace), []))
    return [filled[index].tolist() for index in range(len(prompts))]


def mixed_prompts():
    return [prompts_of(1, P)[0] for P in (3, 9, 5, 3, 14, 1, 7)]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8}, {"cfg_scale": 1.5}, {"cache": "dual"}], ids=str)
def test_rows_of_any_length_share_passes(model, monkeypatch, options):
    """The response to each prompt is the one that it gets alone, and passes stay full until the last rows."""
    prompts, sample = mixed_prompts(), settings(gen_length=12, block_length=4, **options)
    alone = [ids_of(model, [prompt], sample, 1, [key])[0] for key, prompt in enumerate(prompts)]
    passes, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda **kw: passes.append(kw["input_ids"].shape) or forward(**kw))
    assert ids_of(model, prompts, sample, 3) == alone
    assert len(passes) == sampler.most_passes(model, prompts, sample, 3) == 36 and {rows for rows, _ in passes} == {1}


def test_rows_that_end_make_room(model, monkeypatch):
    """Where texts end early there are fewer passes, and as many rows in each as there are until the last begin."""
    prompts, sample = mixed_prompts(), settings(gen_length=12, block_length=4)
    full = ids_of(model, prompts, sample, 2)
    ends = full[0][1], full[4][5]
    seen = rows_of_passes(model, monkeypatch)
    got = ids_of(model, prompts, sample, 2, ends=ends)
    assert [cut(ids, *ends) for ids in got] == [cut(ids, *ends) for ids in full]
    assert len(seen) < 48 and set(seen[: seen.index(1)]) == {2} and set(seen[seen.index(1) :]) == {1}


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize(
    "options", [{}, {"steps": 6}, {"threshold": 0.5}, {"temperature": 0.8}, {"cfg_scale": 1.5}], ids=str
)
def test_refresh_at_every_pass_approximates_nothing(model, cache, options):
    prompts = mixed_prompts()
    plain = settings(gen_length=12, block_length=6, **options)
    each = settings(gen_length=12, block_length=6, cache=cache, refresh=1, **options)
    assert ids_of(model, prompts, each, 3) == ids_of(model, prompts, plain, 3)


@torch.no_grad()
def layers_apart(model, x, window, kept):
    """LLaDA's logits (stop - first, V) of the tokens `window` of a row x (L,) with `kept` keys and values elsewhere.

    Returns them and what is kept afterwards, [(k, v)] of each layer, (H, L, hd) each. Not the model's own forward.
    """
    first, stop = window
    transformer = model.model.transformer
    h = transformer.wte(x[first:stop])[None]
    cos, sin = (table[first:stop] for table in model.rotary(len(x), x.device))
    stored = []
    for block, (k_kept, v_kept) in zip(transformer.blocks, kept):
        z = block.attn_norm(h)
        q, k, v = (
            layer(z)[0].unflatten(-1, (block.heads, -1)).transpose(0, 1)
            for layer in (block.q_proj, block.k_proj, block.v_proj)
        )
        q, k = (y * cos + torch.cat((-y.chunk(2, -1)[1], y.chunk(2, -1)[0]), -1) * sin for y in (q, k))
        k, v = (torch.cat((old[:, :first], new, old[:, stop:]), 1) for old, new in ((k_kept, k), (v_kept, v)))
        stored.append((k, v))
        mixed = (q @ k.transpose(1, 2) / k.shape[-1] ** 0.5).softmax(-1) @ v
        h = h + block.attn_out(mixed.transpose(0, 1).flatten(1))[None]
        z = block.ff_norm(h)
        h = h + block.ff_out(torch.nn.functional.silu(block.ff_proj(z)) * block.up_proj(z))
    return transformer.ff_out(transformer.ln_f(h))[0], stored


def naive_cached(model, prompt, sample):
    """One token a pass, with a cache that keeps all keys and values of the last whole pass."""
    P, L, n = len(prompt), len(prompt) + sample.gen_length, sample.block_length
    x = torch.cat((prompt, torch.full((sample.gen_length,), MASK)))
    kept = [(torch.zeros(4, L, 8),) * 2] * 2
    for start in range(P, L, n):
        for number in range(n):
            whole = number % (sample.refresh or n) == 0
            window = (0, L) if whole else (start, L if sample.cache == "prefix" else start + n)
            logits, kept = layers_apart(model, x, window, kept)
            places = [i for i in range(start, start + n) if x[i] == MASK]
            sure, tokens = logits[[i - window[0] for i in places]].softmax(-1).max(-1)
            best = int(sure.argmax())
            x[places[best]] = tokens[best]
    return x[P:].tolist()


@pytest.mark.parametrize("refresh", [None, 3])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_caches_against_naive(model, cache, refresh):
    prompts = mixed_prompts()
    sample = settings(gen_length=12, block_length=6, cache=cache, refresh=refresh)
    got = ids_of(model, prompts, sample, 3)
    assert got == [naive_cached(model, prompt, sample) for prompt in prompts]
    assert got != ids_of(model, prompts, settings(gen_length=12, block_length=6), 3)  # it is an approximation


@pytest.mark.parametrize(
    "cache, read", [("prefix", [20, 12, 12, 12, 20, 8, 8, 8, 20, 4, 4, 4]), ("dual", [20, 4, 4, 4] * 3)]
)
def test_tokens_that_a_cache_leaves_out(model, monkeypatch, cache, read):
    seen, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda **kw: seen.append(kw["input_ids"].shape[1]) or forward(**kw))
    ids_of(model, [prompts_of(1, 8)[0]], settings(gen_length=12, block_length=4, cache=cache), 1)
    assert seen == read


def test_less_memory_than_was_thought(model, monkeypatch, capsys):
    """Half as many rows go on; the responses that were stopped begin again, with the same result."""
    prompts, sample = mixed_prompts(), settings(gen_length=12, block_length=4, temperature=0.7)
    want, forward, passes = ids_of(model, prompts, sample, 7), model.forward, []

    def scarce(**kw):
        passes.append(len(kw["rows"].lengths))
        if len(kw["rows"].lengths) > 2 and len(passes) > 5:
            raise torch.OutOfMemoryError("a page of figures")
        return forward(**kw)

    monkeypatch.setattr(model, "forward", scarce)
    estimate = pace.Pace(12)
    assert ids_of(model, prompts, sample, 7, pace=estimate) == want
    assert estimate.batch_size == 1 and estimate.left() == (0, 0, False)
    assert max(passes) == 7 and passes[-1] == 1
    assert capsys.readouterr().err.splitlines() == [
        f"warning: out of memory; going on with --batch_size {size}" for size in (3, 1)
    ]

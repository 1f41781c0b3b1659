"""Tests of the sampler of block-causal models: the originals' tokens, a naive sampler without a cache, its options.

bash tests/run.sh tests/reasoning/test_blockwise.py
"""

import json
import re

import numpy as np
import pytest
import torch
from small import ROOT, settings

from config import SampleArguments
from files import InputError
from models import checkpoint
from models.families import Blocks
from models.moe import LLaDA2MoeConfig, LLaDA2MoeModelLM
from reasoning import arguments, commits, sampler

GOLDEN = ROOT.parent / "shared" / "data" / "golden"
MASK = 3
KINDS = {
    "SDAR": Blocks(4),
    "Nemotron": Blocks(4, is_causal=True, first_from_clean=True, sampled_from="prompt"),
    "bd3lm": Blocks(4, sampled_from="prompt"),
    "Fast-dLLM": Blocks(4, shift=True, first_from_clean=True),
}
torch.set_num_threads(1)  # tiny tensors: threads only wait for each other where the machine is busy


@pytest.fixture(scope="module")
def model():
    """Random, with weights large enough that no two predictions nearly tie."""
    torch.manual_seed(1)
    config = LLaDA2MoeConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        initializer_range=0.5,
    )
    return LLaDA2MoeModelLM(config).eval()


def prompts_of(B, P):
    return torch.randint(4, 40, (B, P), generator=torch.Generator().manual_seed(B * 100 + P))


def sample_of(blocks, gen_length, block_length=None, **options):
    """SampleArguments as arguments.check() leaves them for a model with these blocks."""
    sample = settings(gen_length=gen_length, **options)
    sample.block_length = block_length or blocks.size
    return sample


def generate(model, blocks, prompts, sample, **named):
    model.blocks = blocks
    return sampler.generate(model, prompts, sample, MASK, **named).tolist()


# --- the originals' tokens --------------------------------------------------------------------------------


def golden_runs():
    runs = []
    for folder in sorted(GOLDEN.glob("*")):
        with np.load(folder / "ref.npz") as golden:
            for key in golden.files:
                if re.fullmatch("gen_.*/prompt", key):
                    runs.append((folder.name, key.removesuffix("/prompt")))
    return runs


def golden_sample(kw, size):
    """SampleArguments of an original sampler's arguments: of LLaDA's, or with blocks of `size` tokens."""
    names = ("gen_length", "max_new_tokens")
    gen_length = next(kw[name] for name in names if name in kw)
    if size is None:
        return settings(**{name: value for name, value in kw.items() if name != "mask_id"})
    passes = kw.get("denoising_steps", kw.get("steps_per_block", kw.get("steps")))  # over a block
    whole = -(-gen_length // size)
    options = {} if passes is None else {"steps": whole * passes}
    threshold = kw.get("threshold", kw.get("confidence_threshold", 1))
    if threshold < 1:
        options["threshold"] = threshold
    if kw.get("remasking_strategy") == "sequential":
        options["remasking"] = "sequential"
    return sample_of(Blocks(size), whole * size, kw.get("small_block_size"), **options)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no {GOLDEN}: nothing to compare with the originals' samplers")
@pytest.mark.parametrize("family, name", golden_runs())
def test_tokens_of_the_original(family, name):
    golden = np.load(GOLDEN / family / "ref.npz")
    prompts, out = (golden[f"{name}/{part}"] for part in ("prompt", "out"))
    kw = json.loads(str(golden[f"{name}/kw"]))
    size = None if family in ("illada", "lladamoe") else kw.get("block_size", kw.get("block_length"))
    said = size if family == "a2d_bd3lm" else "auto"  # its config.json does not say it
    model = checkpoint.load_model(str(GOLDEN / family), torch.float32, block_size=said).eval()
    if size:
        model.blocks = model.blocks._replace(size=size)
    sample, most = golden_sample(kw, size), out.shape[1]
    if family == "a2d_bd3lm":
        out = out[:, -prompts.shape[1] % size :]  # it pads the prompt on the left
        most = prompts.shape[1] + kw["max_new_tokens"] // size * size  # and cuts its last block short
    real = golden[f"{name}/mask"].astype(bool) if f"{name}/mask" in golden else np.ones_like(prompts, dtype=bool)
    for prompt, theirs, is_real in zip(prompts, out, real):  # one by one: ours pads nothing
        ours = sampler.generate(model, torch.from_numpy(prompt[is_real])[None], sample, kw["mask_id"])[0].tolist()
        theirs = theirs[len(prompt) : most].tolist()
        shared = min(len(ours), len(theirs))
        assert ours[:shared] == theirs[:shared] and shared >= 11


# --- a naive sampler --------------------------------------------------------------------------------------


def may_see(query, key, P, start, blocks):
    """Whether a token sees another, where tokens from `start` on are being denoised."""
    origin = P if blocks.sampled_from == "prompt" else 0
    if blocks.is_causal and query < start:
        return key <= query
    return (key - origin) // blocks.size <= (query - origin) // blocks.size


def naive_logits(model, x, P, start, blocks):
    """Logits (L, V) of the row x, all of it read again."""
    seen = [[may_see(query, key, P, start, blocks) for key in range(len(x))] for query in range(len(x))]
    return model(torch.tensor([x]), attention_mask=torch.tensor([[seen]])).logits[0]


def naive_choice(z, sample, draw):
    """(token, confidence) of logits z (V,) of one place."""
    possible = z.clone()
    possible[MASK] = -torch.inf
    uniform = torch.rand(1, generator=draw) if sample.temperature else None
    token = int(commits.choose(possible[None], uniform, sample.temperature))
    return token, float(z.softmax(-1)[token])


@torch.no_grad()
def naive(model, blocks, prompt, sample, key=0):
    """The response to one prompt (P,), up to gen_length, without any cache."""
    P, size, draw = len(prompt), blocks.size, commits.row_generator(sample.seed, key)
    x = prompt.tolist()
    start = P if blocks.sampled_from == "prompt" else P // size * size
    while len(x) < P + sample.gen_length:
        if blocks.first_from_clean and start >= P:
            x.append(naive_choice(naive_logits(model, x, P, start, blocks)[-1], sample, draw)[0])
        x += [MASK] * (start + size - len(x))
        for first in range(start, start + size, sample.block_length):
            for count in commits.commits_per_pass(sample):
                places = [i for i in range(first, first + sample.block_length) if i >= P and x[i] == MASK]
                logits = naive_logits(model, x, P, start, blocks) if places else None
                options = [(i, *naive_choice(logits[i - blocks.shift], sample, draw)) for i in places]
                ranked = options if sample.remasking == "sequential" else sorted(options, key=lambda each: -each[2])
                for rank, (i, token, sure) in enumerate(ranked):
                    if rank < count or (sample.threshold and sure >= sample.threshold):
                        x[i] = token
        start += size
    return x[P : P + sample.gen_length]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("P", [1, 4, 5, 6, 7])
def test_prompts_of_every_remainder(model, kind, P):
    prompts, sample = prompts_of(2, P), sample_of(KINDS[kind], 9)
    got = generate(model, KINDS[kind], prompts, sample)
    assert got == [naive(model, KINDS[kind], prompt, sample) for prompt in prompts]
    assert len(set(sum(got, []))) > 3 and MASK not in sum(got, [])  # a constant answer would compare nothing


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 4, 32])
@pytest.mark.parametrize("gen_length", [1, 10])
def test_sizes_of_blocks(model, kind, size, gen_length):
    blocks = KINDS[kind]._replace(size=size)
    prompts, sample = prompts_of(1, 6), sample_of(blocks, gen_length)
    assert generate(model, blocks, prompts, sample) == [naive(model, blocks, prompts[0], sample)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"threshold": 0.4},
        {"steps": 8},
        {"steps": 8, "threshold": 0.4},
        {"temperature": 0.8},
        {"remasking": "sequential", "steps": 8},
        {"block_length": 2, "threshold": 0.4},
        {"block_length": 4, "temperature": 0.5},
    ],
    ids=str,
)
def test_options_against_naive(model, kind, options):
    """Each response is the naive sampler's, alone and in a batch, and the options change what is said."""
    blocks, keys = KINDS[kind]._replace(size=8), range(10, 14)
    prompts, sample = prompts_of(4, 5), sample_of(blocks, 16, **options)
    got = generate(model, blocks, prompts, sample, keys=keys)
    assert got == [naive(model, blocks, prompt, sample, key) for prompt, key in zip(prompts, keys)]
    assert got != generate(model, blocks, prompts, sample_of(blocks, 16))
    assert generate(model, blocks, prompts[2:3], sample, keys=keys[2:3]) == got[2:3]


@pytest.mark.parametrize("kind", KINDS)
def test_finished_blocks_are_not_read_again(model, kind, monkeypatch):
    """A pass reads its block; a block's first pass, or that of its first token, reads what was not kept before, too."""
    blocks, prompts, read = KINDS[kind], prompts_of(2, 7), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **kw: read.append(kw["input_ids"].shape[1] // 2) or forward(**kw))
    generate(model, blocks, prompts, sample_of(blocks, 9))
    if blocks.sampled_from == "prompt":
        want = {True: [7, 4, 4, 4], False: [11, 4, 4, 4]}[blocks.first_from_clean]
        assert read[:4] == want
    else:
        assert read[:3] == [8, 8 if not blocks.first_from_clean else 4, 4]
    assert max(read[1:]) <= 8


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_any_length_share_passes(model, kind):
    """The response to each prompt is the one that it gets alone."""
    model.blocks, sample = KINDS[kind], sample_of(KINDS[kind], 9, temperature=0.8)
    prompts = [prompts_of(1, P)[0] for P in (3, 9, 5, 3, 14, 1, 7)]
    special = sampler.special_ids(MASK, None, None)
    filled = dict(sum(sampler.fill(model, prompts, sample, special, range(7), 3), []))
    for key, prompt in enumerate(prompts):
        assert filled[key].tolist() == generate(model, KINDS[kind], prompt[None], sample, keys=[key])[0]


@pytest.mark.parametrize("kind", KINDS)
def test_no_pass_for_tokens_that_are_cut(model, kind, monkeypatch):
    passes, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda **kw: passes.append(1) or forward(**kw))
    generate(model, KINDS[kind], prompts_of(2, 6), sample_of(KINDS[kind], 9, remasking="sequential"))
    assert len(passes) == 9  # one a token, though the last block is longer than the response


# --- ends, masks, refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_ended_rows_leave_the_batch(model, kind, temperature, monkeypatch):
    """After the block that holds its end a row takes no pass; an end in the prompt's part of a block is none."""
    blocks, prompts, sample = KINDS[kind], prompts_of(5, 6), sample_of(KINDS[kind], 14, temperature=temperature)
    full = generate(model, blocks, prompts, sample)
    eos, eot = full[0][5], full[1][9]
    prompts[2, -1] = eos
    full[2] = generate(model, blocks, prompts[2:3], sample, keys=[2])[0]
    rows, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda **kw: rows.append(len(kw["rows"].windows)) or forward(**kw))
    got = generate(model, blocks, prompts, sample, eos=eos, eot=eot)
    for ids, whole in zip(got, full):
        end = next((place for place, token in enumerate(whole) if token in (eos, eot)), 14)
        start = 6 if blocks.sampled_from == "prompt" else 4
        stop = min(14, start - (start - 6 - end - 1) // 4 * 4 - 6)  # of the block that holds the end
        assert ids == whole[:stop] + [MASK] * (14 - stop)
    assert rows == sorted(rows, reverse=True) and rows[-1] < rows[0]


def test_mask_token_is_never_said(model):
    """Neither where it is the likeliest, nor one of the prompt's filled."""
    head = model.get_output_embeddings()
    with torch.no_grad():
        before = head.weight.clone()
        head.weight[MASK] = 3 * head.weight.abs().max()
    for blocks in KINDS.values():
        prompts = torch.full((1, 6), MASK)
        got = generate(model, blocks, prompts, sample_of(blocks, 9))
        assert MASK not in got[0] and prompts.tolist() == [[MASK] * 6]
        assert got == [naive(model, blocks, prompts[0], sample_of(blocks, 9))]
    with torch.no_grad():
        head.weight.copy_(before)


def test_eos_is_not_said_if_asked(model):
    for blocks in KINDS.values():
        prompts = prompts_of(1, 6)
        said = generate(model, blocks, prompts, sample_of(blocks, 9))[0]
        for eos in (said[0], said[2]):  # the first may come from the clean token before it
            assert eos not in generate(model, blocks, prompts, sample_of(blocks, 9, logits_eos_inf=True), eos=eos)[0]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"block_length": 24}, "--block_length 24 contradicts .* 16 tokens; .* --block_length 8$"),
        ({"cfg_scale": 0.5}, "--cfg_scale 0.5: guidance needs a bidirectional model"),
        ({"cache": "dual"}, "--cache dual: model is block-causal and always keeps"),
    ],
)
def test_refusals(options, words, monkeypatch):
    monkeypatch.setattr(arguments.folders, "plain_config", lambda name: None)
    monkeypatch.setattr(arguments.families, "blocks", lambda *given: Blocks(16))
    with pytest.raises(InputError, match=words):
        arguments.check(SampleArguments(model_name_or_path="model", device="cpu", **options))
    for given, want in (({}, 16), ({"block_length": 8, "gen_length": 20, "steps": 3}, 8)):
        sample = SampleArguments(model_name_or_path="model", device="cpu", **given)
        arguments.check(sample)
        assert sample.block_length == want

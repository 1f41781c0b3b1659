"""Tests of generate.py: the original's tokens, a naive sampler of this file's own, and the real command line.

    .venv/bin/python -m pytest -q tests/test_generate.py
"""
import argparse
import copy
import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jsonlines
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import checkpoint
import generate
import tasks
from config import SampleArguments
from llada import LLaDAConfig, LLaDAModelLM
from packed import InputError

GOLDEN = ROOT.parent / "shared" / "data" / "llada_golden"
MASK = 3
torch.set_num_threads(1)  # tiny tensors: threads only wait for each other where the machine is busy
SHORT = ["--gen_length", "8", "--steps", "4", "--use_mixed_precision", "no", "--device", "cpu"]


@pytest.fixture(scope="module")
def model():
    """Random, with weights large enough that no two predictions nearly tie; it hardly ever says mask."""
    torch.manual_seed(2)
    model = LLaDAModelLM(LLaDAConfig(d_model=32, n_layers=2, n_heads=4, mlp_hidden_size=48, vocab_size=40, init_std=0.6,
                                     rope_theta=100.0, mask_token_id=MASK)).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight[MASK] = 0
    return model


def prompts_of(B, P):
    return torch.randint(4, 40, (B, P), generator=torch.Generator().manual_seed(B * 100 + P))


def settings(**options):
    sample = SampleArguments(device="cpu", **options)
    generate.check(sample)
    return sample


def run_script(*args):
    return subprocess.run([sys.executable, str(ROOT / "generate.py"), *map(str, args)], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


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
        assert torch.equal(torch.cat((prompt, generate.generate(model, prompt, sample, int(golden["mask"]))), 1), out), name


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
    x, draw = prompt.tolist() + [MASK] * sample.gen_length, generate.row_generator(sample.seed, key)
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
    return x[len(prompt):]


def cut(ids, *ends):
    """`ids` up to and with the first end."""
    return ids[:next((k + 1 for k, token in enumerate(ids) if token in ends), len(ids))]


@pytest.mark.parametrize("steps, gen_length, block_length", [
    (12, 12, 12), (6, 12, 4), (5, 12, 12), (15, 12, 4), (1, 6, 6), (40, 8, 8)])
def test_steps_against_naive(model, steps, gen_length, block_length):
    prompts, sample = prompts_of(3, 5), settings(steps=steps, gen_length=gen_length, block_length=block_length)
    got = generate.generate(model, prompts, sample, MASK)
    assert got.tolist() == [naive(model, prompt, sample) for prompt in prompts]
    assert len(set(got.flatten().tolist())) > 3  # a constant answer would compare nothing


def common_ends(model, prompts, sample):
    """(eos, eot): tokens that the model says often enough that the flags about them matter, and not at once."""
    said = Counter(generate.generate(model, prompts, sample, MASK).flatten().tolist())
    return [token for token, _ in said.most_common(4)[2:]]


@pytest.mark.parametrize("options", [
    {"cfg_scale": 1.5}, {"logits_eos_inf": True}, {"confidence_eos_eot_inf": True}, {"remasking": "random"},
    {"temperature": 0.8}, {"threshold": 0.6}, {"cfg_scale": 0.5, "threshold": 0.7, "temperature": 0.5},
    {"temperature": 0.8, "confidence_eos_eot_inf": True}, {"temperature": 1.2, "remasking": "random", "cfg_scale": 2.0},
    {"logits_eos_inf": True, "confidence_eos_eot_inf": True, "temperature": 0.5}], ids=str)
@pytest.mark.parametrize("block_length", [4, 12])
def test_options_against_naive(model, options, block_length):
    """Each response is the naive sampler's up to its end, alone and in a batch, and the options change what is said."""
    prompts, plain = prompts_of(6, 5), settings(gen_length=12, block_length=block_length)
    eos, eot = common_ends(model, prompts, plain)
    sample = settings(gen_length=12, block_length=block_length, seed=2, **options)
    keys = range(10, 16)
    got = [cut(ids, eos, eot) for ids in generate.generate(model, prompts, sample, MASK, eos, eot, keys).tolist()]
    want = [naive(model, prompt, sample, key, eos, eot) for prompt, key in zip(prompts, keys)]
    assert got == [cut(ids, eos, eot) for ids in want]
    assert want != [naive(model, prompt, plain) for prompt in prompts]
    assert sum(map(len, got)) > 18  # not all are cut at once
    for row in range(6):
        alone = generate.generate(model, prompts[row:row + 1], sample, MASK, eos, eot, keys[row:row + 1])
        assert cut(alone[0].tolist(), eos, eot) == got[row]


def test_whole_responses_against_naive(model):
    """Without an end nothing is cut: every id is compared."""
    prompts = prompts_of(4, 6)
    for options in ({"cfg_scale": 1.5}, {"remasking": "random"}, {"temperature": 0.8}, {"threshold": 0.6}):
        sample = settings(gen_length=12, block_length=6, **options)
        want = [naive(model, prompt, sample, key) for key, prompt in enumerate(prompts)]
        assert generate.generate(model, prompts, sample, MASK).tolist() == want, options


def rows_of_passes(model, monkeypatch):
    seen, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda **kw: seen.append(len(kw["input_ids"])) or forward(**kw))
    return seen


def test_passes_and_positions(model, monkeypatch):
    """steps forward passes, each with logits for nothing but the block's masked positions."""
    seen, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda **kw: seen.append(kw["positions"].tolist()) or forward(**kw))
    generate.generate(model, prompts_of(2, 3), settings(steps=4, gen_length=8, block_length=4), MASK)
    assert [len(positions) for positions in seen] == [8, 4, 8, 4]  # two rows; half a block of 4 per pass
    assert seen[0] == [3, 4, 5, 6, 14, 15, 16, 17] and seen[2] == [7, 8, 9, 10, 18, 19, 20, 21]


@pytest.mark.parametrize("swap", [False, True])
def test_ended_rows_leave_the_batch(model, monkeypatch, swap):
    """After the block that holds its eos or end-of-turn, a row takes no pass and no further block of it is filled."""
    prompts, sample = prompts_of(6, 5), settings(gen_length=12, block_length=4)
    full = generate.generate(model, prompts, sample, MASK).tolist()
    ends = (full[0][4], full[1][7])[::-1 if swap else 1]  # each is first in some row
    blocks = [-(-len(cut(ids, *ends)) // 4) for ids in full]
    assert min(blocks) < 3 == max(blocks) and all(blocks != [-(-len(cut(ids, end)) // 4) for ids in full] for end in ends)
    seen = rows_of_passes(model, monkeypatch)
    got = generate.generate(model, prompts, sample, MASK, *ends).tolist()
    assert got == [ids[:4 * n] + [MASK] * (12 - 4 * n) for ids, n in zip(full, blocks)]
    assert seen == [sum(n > block for n in blocks) for block in range(3) for _ in range(4)]


def test_threshold_bounds(model, monkeypatch):
    """At threshold 1 an unsure model commits one token a pass, the plain sampler; near 0 a block is one pass."""
    prompts = prompts_of(3, 5)
    plain = generate.generate(model, prompts, settings(gen_length=12, block_length=4), MASK)
    assert torch.equal(generate.generate(model, prompts, settings(gen_length=12, block_length=4, threshold=1.0), MASK), plain)
    seen = rows_of_passes(model, monkeypatch)
    once = generate.generate(model, prompts, settings(gen_length=12, block_length=4, threshold=1e-9), MASK)
    assert seen == [3, 3, 3]
    assert torch.equal(once, generate.generate(model, prompts, settings(gen_length=12, block_length=4, steps=3), MASK))
    seen.clear()
    generate.generate(model, prompts, settings(gen_length=12, threshold=0.7), MASK)
    assert len(seen) < 12 and len(set(seen)) > 1  # a row whose block is full leaves the others to their passes


def test_threshold_is_reached(model):
    """A confidence equal to the threshold is committed."""
    prompts = prompts_of(1, 5)
    with torch.no_grad():
        logits = model(torch.cat((prompts, torch.full((1, 4), MASK)), 1)).logits[0, 5:]
    sure, token = logits.softmax(-1).max(-1)
    low = int(sure.argmin())
    got = generate.generate(model, prompts, settings(gen_length=4, threshold=float(sure[low])), MASK)
    assert got[0].tolist() == token.tolist()  # all four in the first pass


def test_threshold_in_float32():
    """bfloat16 knows nothing between 0.996 and 1, where a threshold may well lie."""
    logits = torch.tensor([[6.25, 0.0]]).bfloat16()
    chosen, ends = torch.tensor([0]), torch.tensor([], dtype=torch.long)
    sure = generate.confidences(logits, chosen, [1], [None], settings(threshold=0.999), ends)
    assert sure.item() == pytest.approx(1 / (1 + math.exp(-6.25)), abs=1e-6) and sure.item() < 0.999
    plain = generate.confidences(logits, chosen, [1], [None], settings(), ends)
    assert plain.dtype == torch.bfloat16 and plain.item() == 1  # as in the original


def test_prompt_mask_is_never_filled(model):
    """A mask id in the prompt is the prompt's: only the response is sampled."""
    prompts = torch.full((1, 3), MASK)
    got = generate.generate(model, prompts, settings(gen_length=4), MASK)
    assert prompts.tolist() == [[MASK] * 3] and got.shape == (1, 4) and MASK not in got[0].tolist()


@pytest.mark.parametrize("options", [{}, {"threshold": 0.5}])
def test_predicted_mask_ends_all_the_same(options):
    """A model that says nothing but mask: as many passes as there are, then a response of masks."""
    logits = torch.zeros(40).index_fill(0, torch.tensor(MASK), 9.0)

    class Model:
        device = torch.device("cpu")

        def __call__(self, input_ids, positions):
            return argparse.Namespace(logits=logits.repeat(len(positions), 1))
    got = generate.generate(Model(), prompts_of(2, 3), settings(gen_length=4, **options), MASK, eos=5)
    assert got.tolist() == [[MASK] * 4] * 2


@pytest.mark.parametrize("options", [{"temperature": 0.5}, {"threshold": 0.9}, {"cfg_scale": 1.0}])
def test_bfloat16(model, options):
    half = copy.deepcopy(model).bfloat16()
    got = generate.generate(half, prompts_of(2, 4), settings(gen_length=8, block_length=4, **options), MASK)
    assert got.dtype == torch.long and got.shape == (2, 8) and MASK not in got.flatten().tolist()


def test_temperature_is_the_originals():
    """The argmax of exp(z) / (-log u)^T in float64, each row of the batch with its own u."""
    z, draws = torch.randn(60, 50) * 4, [torch.Generator().manual_seed(row) for row in range(3)]
    got = generate.choose(z, [10, 0, 50], draws, 0.7)
    u = torch.cat([torch.rand(n, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(row))
                   for row, n in ((0, 10), (2, 50))])
    assert torch.equal(got, (z.double().exp() / (-u.log()) ** 0.7).argmax(-1))
    assert not torch.equal(got, z.argmax(-1))


def test_temperature_samples_softmax():
    """argmax exp(z) / (-log u)^T is a draw from softmax(z / T)."""
    z, n, T = torch.tensor([1.0, 0.0, -1.0, 2.0]), 20000, 0.7
    draws = [generate.row_generator(5, row) for row in range(2)]
    share = generate.choose(z.expand(n, 4), [n // 2] * 2, draws, T).bincount(minlength=4) / n
    assert torch.allclose(share, torch.softmax(z / T, 0), atol=0.015)  # 4 sigma


@pytest.mark.parametrize("options", [{"temperature": 2.0}, {"remasking": "random"}])
def test_seed(model, options):
    def draw(seed, keys=None, prompts=prompts_of(1, 4).expand(3, 4)):
        return generate.generate(model, prompts, settings(gen_length=8, seed=seed, **options), MASK, keys=keys).tolist()

    first = draw(1)
    assert first == draw(1) and first != draw(2)
    assert first[0] != first[1] != first[2]  # the same prompt thrice in a batch: three responses
    assert draw(1, keys=[2], prompts=prompts_of(1, 4)) == first[2:]  # and the third alone is the third of the batch
    assert draw(0)[1:] != draw(1)[:2]


# --- arguments --------------------------------------------------------------------------------------------

def test_check_fills_in():
    sample = settings(gen_length=12)
    assert (sample.steps, sample.block_length, sample.device) == (12, 12, "cpu")
    assert settings(gen_length=12, threshold=0.9, block_length=4).steps is None
    generate.check(sample)  # again: nothing changes
    assert sample == settings(gen_length=12, steps=12, block_length=12)
    auto = SampleArguments()
    generate.check(auto)
    assert auto.device == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("options, words", [
    ({"steps": 4, "gen_length": 8, "block_length": 3}, "--gen_length 8 .*--block_length 3; try --block_length 1"),
    ({"steps": 3, "gen_length": 8, "block_length": 4}, "--steps 3 .*try --steps 4"),
    ({"steps": 0}, "--steps is 0"), ({"block_length": 0}, "--block_length is 0"), ({"gen_length": -1}, "--gen_length is -1"),
    ({"batch_size": 0}, "--batch_size is 0"), ({"temperature": -1.0}, "--temperature is -1"),
    ({"temperature": math.nan}, "--temperature is nan"), ({"cfg_scale": -0.5}, "--cfg_scale is -0.5"),
    ({"cfg_scale": math.inf}, "--cfg_scale is inf"), ({"threshold": 0.0}, "--threshold is 0.0"),
    ({"threshold": 1.01}, "--threshold is 1.01"), ({"threshold": math.nan}, "--threshold is nan"),
    ({"threshold": 0.9, "steps": 64}, "--steps 64 contradicts --threshold 0.9"),
    ({"threshold": 0.9, "remasking": "random"}, "--threshold 0.9 has no meaning with --remasking random"),
    ({"threshold": 0.9, "gen_length": 8, "block_length": 3}, "--block_length 1"),
    ({"confidence_eos_eot_inf": True, "remasking": "random"}, "--confidence_eos_eot_inf .*--remasking random"),
    ({"device": "tpu"}, "--device is 'tpu'")], ids=str)
def test_bad_combinations(options, words):
    with pytest.raises(InputError, match=words) as error:
        generate.check(SampleArguments(**{"device": "cpu"} | options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype, want", [("bf16", torch.bfloat16), ("no", torch.float32)])
def test_load(tiny_dir, dtype, want):
    model, tokenizer = generate.load(SampleArguments(model_name_or_path=str(tiny_dir), use_mixed_precision=dtype,
                                                     device="cpu"))
    assert model.dtype == want and not model.training and tokenizer.eos_token_id == 2


# --- texts ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def spoken(tiny_dir):
    """(model, tokenizer) whose predictions are further from ties than a fresh initialisation's."""
    model, tokenizer = generate.load(SampleArguments(model_name_or_path=str(tiny_dir), use_mixed_precision="no",
                                                     device="cpu"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    return model, tokenizer


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"threshold": 0.1}, {"threshold": 0.1, "temperature": 1.0},
                                     {"cfg_scale": 1.0}, {"remasking": "random"}], ids=str)
def test_batch_is_one_by_one(spoken, tiny_dir, options):
    """Prompts of several lengths, out of order: each response is the one that the prompt gets alone."""
    model, tokenizer = spoken
    prompts = [checkpoint.encode(tokenizer, text) for text in ("7 + 5", "How many?", "a", "9 + 5", "x", "7 + 5")]
    assert len({len(ids) for ids in prompts}) > 1
    sample = settings(model_name_or_path=str(tiny_dir), gen_length=12, block_length=6, seed=3, batch_size=2, **options)
    done = []
    batched = generate.respond(model, tokenizer, prompts, sample, finished=done.append)
    counts = Counter(len(ids) for ids in prompts).values()
    assert len(done) == sum(-(-count // 2) for count in counts)
    assert sorted(index for replies in done for index in replies) == list(range(6))
    assert all(batched[index] == reply for replies in done for index, reply in replies.items())
    alone = [generate.respond(model, tokenizer, [ids], sample, keys=[key])[0] for key, ids in enumerate(prompts)]
    assert batched == alone and len(set(alone)) > 3
    noisy = "temperature" in options or "remasking" in options
    assert (batched[0] == batched[5]) != noisy
    assert generate.respond(model, tokenizer, prompts[:1], sample, keys=[5])[0] == (
        batched[5] if noisy else batched[0])


def test_text_ends_before_the_first_end(tiny_dir, monkeypatch):
    """At eos or at the template's end of turn, whichever comes first; special tokens are left out, spaces kept."""
    tokenizer = checkpoint.load_tokenizer(str(tiny_dir))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot|>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|eot|>{% endfor %}"
    eos, eot, bos = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|eot|>"), tokenizer.bos_token_id
    words, tail = checkpoint.encode(tokenizer, " 7 + 5 = 12\n#### 12"), checkpoint.encode(tokenizer, "more")
    n, text = len(words), " 7 + 5 = 12\n#### 12"
    sample = settings(gen_length=1)

    class Model:
        config = LLaDAConfig(mask_token_id=MASK)
    for row, want in ((words + [eos] + tail, (text, n, True)), ([bos] + words + [eot] + tail + [eos], (text, n + 1, True)),
                      (words, (text, n, False)), ([eos] + words, ("", 0, True))):
        given = []
        monkeypatch.setattr(generate, "generate", lambda *args: given.append(args[3:6]) or torch.tensor([row]))
        monkeypatch.setattr(generate, "response_tokenizer", lambda name, tokenizer, trust: tokenizer)
        assert generate.respond(Model, tokenizer, [[1]], sample) == [want]
        assert given == [(MASK, eos, eot)]


def test_first_word_keeps_its_space(tiny_dir, tmp_path, monkeypatch):
    """respond() takes the tokenizer with sentencepiece's dummy prefix, which would drop a response's first space."""
    folder = shutil.copytree(tiny_dir, tmp_path / "prefixed")
    fields = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**fields, "add_prefix_space": True}))
    sample = settings(model_name_or_path=str(folder), gen_length=1)
    model, tokenizer = generate.load(sample)
    ids = checkpoint.encode(checkpoint.load_tokenizer(str(tiny_dir)), " 7 + 5")
    assert tokenizer.decode(ids) == "7 + 5"
    monkeypatch.setattr(generate, "generate", lambda *_: torch.tensor([ids]))
    assert generate.respond(model, tokenizer, [[1]], sample)[0].text == " 7 + 5"


def test_out_of_memory(spoken, tiny_dir, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("a page of figures")
    monkeypatch.setattr(generate, "generate", full)
    with pytest.raises(InputError, match="cpu ran out of memory; lower --batch_size"):
        generate.respond(*spoken, [[1]], settings(model_name_or_path=str(tiny_dir), gen_length=1))


# --- command line -----------------------------------------------------------------------------------------

def test_script_refuses_in_one_line(tiny_dir):
    done = run_script("--model_name_or_path", tiny_dir, "--prompt", "x", "--gen_length", 10, "--block_length", 4)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: [^\n]*--gen_length 10[^\n]*--block_length 4[^\n]*\n", done.stderr)


def test_script_file_to_file(tiny_dir, tmp_path):
    rows = [{"id": 1, "prompt": "7 + 5"},
            {"prompt": "a longer question?", "answer": "é"}, {"id": 3, "prompt": "7 + 5"}]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "in.jsonl").write_text("\n".join((lines[0], "", *lines[1:])) + "\n")
    done = run_script("--model_name_or_path", tiny_dir, "--in", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl",
                      *SHORT)
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert "3/3" in done.stderr and "tokens/s" in done.stderr
    with jsonlines.open(tmp_path / "out.jsonl") as reader:
        written = list(reader)
    assert [{key: row[key] for key in row if key != "response"} for row in written] == rows
    assert all(isinstance(row["response"], str) for row in written) and written[0]["response"] == written[2]["response"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_prompt_is_printed(tiny_dir, capsys):
    base = ["--model_name_or_path", str(tiny_dir), "--prompt", "7 + 5", *SHORT]
    texts = []
    for temperature, seed in ("00", "11", "11", "10"):
        generate.main(base + ["--temperature", temperature, "--seed", seed])
        texts.append(capsys.readouterr().out)
    assert texts[1] == texts[2] != texts[3] and all(text.endswith("\n") for text in texts)


def test_chat_template(tiny_dir, tmp_path, monkeypatch):
    """A prompt is a user message, then the assistant's header, nothing added; --template none leaves it raw."""
    folder = shutil.copytree(tiny_dir, tmp_path / "chat")
    template = ("<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
                "{% if add_generation_prompt %}[a]{% endif %}")
    fields = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**fields, "chat_template": template}))
    talk = [{"role": role, "content": role[0]} for role in ("system", "user")]
    with jsonlines.open(tmp_path / "in.jsonl", "w") as writer:
        writer.write_all([{"prompt": "7 + 5"}, {"prompt": talk}])
    seen = []
    monkeypatch.setattr(generate, "respond", lambda model, tokenizer, prompts, sample, **_: seen.append(
        [tokenizer.decode(ids) for ids in prompts]) or [generate.Response("x", 1, True)] * len(prompts))
    generate.main(["--model_name_or_path", str(folder), "--in", str(tmp_path / "in.jsonl"),
                   "--out", str(tmp_path / "out.jsonl"), *SHORT])
    generate.main(["--model_name_or_path", str(folder), "--prompt", "7 + 5", "--template", "none", *SHORT])
    assert seen == [["<s>[user]7 + 5</s>[a]", "<s>[system]s</s>[user]u</s>[a]"], ["7 + 5"]]


def test_task(tiny_dir, tmp_path, capsys, monkeypatch):
    """The verdicts are those of the rows written; the two solved problems here are planted."""
    problems = tasks.generate(6, "test", 4, ("arithmetic",))
    texts = [problem.solution for problem in problems[:2]] + ["#### 100"] * 4
    monkeypatch.setattr(generate, "respond", lambda *_, **__: [generate.Response(text, 9, True) for text in texts])
    generate.main(["--model_name_or_path", str(tiny_dir), "--task", "arithmetic", "--num", "6", "--seed", "4",
                   "--out", str(tmp_path / "out.jsonl"), *SHORT])
    first, *more = capsys.readouterr().out.splitlines()
    assert first == "solved 2 of 6 (33.3%, 95% interval 9.7-70.0)"
    assert all(re.match(r"  \d-step problems: solved ", line) for line in more)
    assert sum(int(re.search(r"solved (\d+) of", line)[1]) for line in more) == 2
    assert sum(int(re.search(r"of (\d+) ", line)[1]) for line in more) == 6
    with jsonlines.open(tmp_path / "out.jsonl") as reader:
        rows = list(reader)
    assert [row["correct"] for row in rows] == [True, True] + [False] * 4
    assert [(row["prompt"], row["answer"], row["family"]) for row in rows] == [
        (p.prompt, p.answer, "arithmetic") for p in problems]


def test_families(tiny_dir, capsys, monkeypatch):
    """Whatever tasks.FAMILIES holds can be named; all of them are reported family by family."""
    asked, problem = [], tasks.generate(1, "test")[0]
    monkeypatch.setattr(tasks, "FAMILIES", {"arithmetic": None, "riddles": None})
    monkeypatch.setattr(tasks, "generate", lambda n, split, seed, families: asked.append((n, split, seed, families)) or [
        dataclasses.replace(problem, family=families[i % len(families)]) for i in range(n)])
    monkeypatch.setattr(generate, "respond", lambda model, tokenizer, prompts, *_, **__: [
        generate.Response(problem.solution if i else "", 0, False) for i in range(len(prompts))])
    base = ["--model_name_or_path", str(tiny_dir), "--num", "3", *SHORT, "--task"]
    generate.main([*base, "riddles"])
    assert "riddles" not in capsys.readouterr().out
    generate.main([*base, "all"])
    out = capsys.readouterr().out
    assert "solved 2 of 3" in out and "  arithmetic: solved 1 of 2" in out and "  riddles: solved 1 of 1" in out
    assert asked == [(3, "test", 0, ("riddles",)), (3, "test", 0, ("arithmetic", "riddles"))]
    with pytest.raises(InputError, match="--task is 'logic'; expected arithmetic, riddles or all"):
        generate.main([*base, "logic"])


def test_solved_line():
    assert generate.solved_line([True] * 93 + [False] * 107) == "solved 93 of 200 (46.5%, 95% interval 39.7-53.4)"
    assert generate.solved_line([False] * 10) == "solved 0 of 10 (0.0%, 95% interval 0.0-27.8)"
    assert generate.solved_line([True] * 10) == "solved 10 of 10 (100.0%, 95% interval 72.2-100.0)"


@pytest.mark.parametrize("line", [
    "{", "[1]", '{"question": "x"}', '{"prompt": 3}', '{"prompt": []}', '{"prompt": "\\ud800"}', '{"prompt": ["x"]}',
    '{"prompt": [{"role": "user"}]}', '{"prompt": [{"role": "user", "content": "x"}]}'])
def test_malformed_row(tiny_dir, tmp_path, line):
    """Named by file and line; a conversation is malformed for a tokenizer without a chat template."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n\n' + line + "\n")
    with pytest.raises(InputError) as error:
        generate.main(["--model_name_or_path", str(tiny_dir), "--in", str(path), "--out", str(tmp_path / "out.jsonl")])
    assert f"{path}:3: " in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("flags, words", [
    (["--in", "nowhere.jsonl", "--out", "out.jsonl"], "nowhere.jsonl"), (["--in", "x.jsonl"], "--out"),
    (["--prompt", "x", "--device", "tpu"], "tpu"), (["--prompt", "x", "--temperature", "-1"], "--temperature"),
    (["--prompt", "x", "--temperature", "nan"], "--temperature"),
    (["--prompt", "x", "--batch_size", "0"], "--batch_size"),
    (["--task", "arithmetic", "--num", "0"], "--num"), (["--prompt", "x", "--out", "nowhere/out.jsonl"], "nowhere"),
    (["--prompt", "x", "--out", "."], "a folder; expected a file"), (["--prompt", "x\udcff"], "not UTF-8"),
    ([], "--prompt"), (["--prompt", "x", "--task", "arithmetic"], "--prompt and --task"),
    (["--prompt", "x", "--step", "3"], "--step"), (["--prompt", "x", "--remasking", "some"], "--remasking"),
    (["--prompt", "x", "--threshold", "0.9", "--steps", "8"], "--threshold"),
    (["--prompt", "x", "--template", "chat"], "template")])
def test_refusals(tiny_dir, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        generate.main(["--model_name_or_path", str(tiny_dir), *flags])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_empty_prompt(tiny_dir, capsys):
    generate.main(["--model_name_or_path", str(tiny_dir), "--prompt", "", *SHORT])
    assert capsys.readouterr().out


# --- bench ------------------------------------------------------------------------------------------------

def test_bench(tiny_dir, capsys, monkeypatch):
    """Each setting once, on the same problems; the plain sampler is the ratio's 1."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import sampler
    sampler.main(["--model", str(tiny_dir), "--num", "2", "--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()[2:]
    assert len(lines) == len(sampler.SETTINGS) and all(line.split("solved ")[1].startswith("0 of 2 ") for line in lines)
    plain = [line.split() for line in lines if " plain " in line]
    assert [(words[0], words[4]) for words in plain] == [("40", "1.00"), ("8", "1.00")]
    halves = [line.split() for line in lines if " steps 20 " in line]
    assert [float(words[3]) <= 20 for words in halves] == [True, True]

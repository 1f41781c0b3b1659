"""Tests of generate.py: the original's tokens, a naive sampler of this file's own, and the real command line.

    .venv/bin/python -m pytest -q tests/test_generate.py
"""
import copy
import json
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
from llada import LLaDAConfig, LLaDAModelLM
from packed import InputError

GOLDEN = ROOT.parent / "shared" / "data" / "llada_golden"
MASK = 3
torch.set_num_threads(1)  # tiny tensors: threads only wait for each other where the machine is busy
SHORT = ["--gen_length", "8", "--steps", "4", "--use_mixed_precision", "no", "--device", "cpu"]


@pytest.fixture(scope="module")
def model():
    """Random, with weights large enough that no two predictions nearly tie."""
    torch.manual_seed(0)
    return LLaDAModelLM(LLaDAConfig(d_model=32, n_layers=2, n_heads=4, mlp_hidden_size=48, vocab_size=40, init_std=0.3,
                                    rope_theta=100.0, mask_token_id=MASK)).eval()


def prompts_of(B, P):
    return torch.randint(4, 40, (B, P), generator=torch.Generator().manual_seed(B * 100 + P))


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
        response = generate.generate(model, prompt, int(golden["mask"]), **json.loads(str(golden[f"{name}/kw"])))
        assert torch.equal(torch.cat((prompt, response), 1), out), name


@torch.no_grad()
def naive(model, prompt, steps, gen_length, block_length):
    """models.md's recipe on one prompt (P,), one token at a time, with the logits of the whole sequence."""
    x = prompt.tolist() + [MASK] * gen_length
    per_block = steps // (gen_length // block_length)
    for first in range(len(prompt), len(x), block_length):
        for step in range(per_block):
            logits = model(torch.tensor([x])).logits[0]  # (L, V)
            options = []
            for i in range(first, first + block_length):
                if x[i] == MASK:
                    token = max(range(len(logits[i])), key=lambda v: float(logits[i, v]))
                    options.append((float(torch.softmax(logits[i], 0)[token]), -i, token))
            n = block_length // per_block + (1 if step < block_length % per_block else 0)
            for _, place, token in sorted(options, reverse=True)[:n]:
                x[-place] = token
    return x[len(prompt):]


@pytest.mark.parametrize("steps, gen_length, block_length", [
    (12, 12, 12), (6, 12, 4), (5, 12, 12), (15, 12, 4), (1, 6, 6), (40, 8, 8)])
def test_naive_sampler(model, steps, gen_length, block_length):
    prompts = prompts_of(3, 5)
    got = generate.generate(model, prompts, MASK, steps=steps, gen_length=gen_length, block_length=block_length)
    assert got.tolist() == [naive(model, prompt, steps, gen_length, block_length) for prompt in prompts]
    assert len(set(got.flatten().tolist())) > 3  # a constant answer would compare nothing


def test_passes_and_positions(model, monkeypatch):
    """steps forward passes, each with logits for nothing but the block's masked positions."""
    seen, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda **kw: seen.append(kw["positions"].tolist()) or forward(**kw))
    generate.generate(model, prompts_of(2, 3), MASK, steps=4, gen_length=8, block_length=4)
    assert [len(positions) for positions in seen] == [8, 4, 8, 4]  # two rows; half a block of 4 per pass
    assert seen[0] == [3, 4, 5, 6, 14, 15, 16, 17] and seen[2] == [7, 8, 9, 10, 18, 19, 20, 21]


def test_prompt_mask_is_never_filled(model):
    """A mask id in the prompt is the prompt's: only the response is sampled."""
    prompts = torch.full((1, 3), MASK)
    got = generate.generate(model, prompts, MASK, steps=4, gen_length=4, block_length=4)
    assert prompts.tolist() == [[MASK] * 3] and got.shape == (1, 4) and MASK not in got[0].tolist()


def test_bfloat16(model):
    half = copy.deepcopy(model).bfloat16()
    got = generate.generate(half, prompts_of(2, 4), MASK, steps=4, gen_length=8, block_length=4, temperature=0.5)
    assert got.dtype == torch.long and got.shape == (2, 8)


def test_temperature_samples_softmax():
    """argmax exp(z) / (-log u)^T is a draw from softmax(z / T)."""
    z, n, T = torch.tensor([1.0, 0.0, -1.0, 2.0]), 20000, 0.7
    draws = [generate.row_generator(5, row) for row in range(2)]
    owner = torch.arange(2).repeat_interleave(n // 2)
    share = generate.choose(z.expand(n, 4), owner, draws, T).bincount(minlength=4) / n
    assert torch.allclose(share, torch.softmax(z / T, 0), atol=0.015)  # 4 sigma


def test_temperature_seed(model):
    def draw(seed, rows=None, prompts=prompts_of(1, 4).expand(3, 4)):
        return generate.generate(model, prompts, MASK, steps=8, gen_length=8, block_length=8, temperature=2.0,
                                 seed=seed, rows=rows).tolist()

    first = draw(1)
    assert first == draw(1) and first != draw(2)
    assert first[0] != first[1] != first[2]  # the same prompt thrice in a batch: three responses
    assert draw(1, rows=[2], prompts=prompts_of(1, 4)) == first[2:]  # and the third alone is the third of the batch
    assert draw(0)[1:] != draw(1)[:2]


@pytest.mark.parametrize("lengths, words", [((4, 8, 3), "--block_length 1"), ((3, 8, 4), "--steps 4"),
                                            ((0, 8, 8), "--steps 0"), ((8, 8, 0), "--block_length 0")])
def test_lengths_must_divide(model, lengths, words):
    steps, gen_length, block_length = lengths
    with pytest.raises(InputError, match=words):
        generate.generate(model, prompts_of(1, 2), MASK, steps=steps, gen_length=gen_length, block_length=block_length)


# --- texts ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batch_is_one_by_one(tiny_dir, temperature):
    """Prompts of several lengths, out of order: each response is the one that the prompt gets alone."""
    tokenizer = checkpoint.load_tokenizer(str(tiny_dir))
    model = checkpoint.load_model(str(tiny_dir), torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)  # further from ties than a fresh initialisation
    texts = ["7 + 5", "How many?", "a", "9 + 5", "x", "7 + 5"]
    prompts = [checkpoint.encode(tokenizer, text) for text in texts]
    assert len({len(ids) for ids in prompts}) > 1
    options = dict(steps=6, gen_length=12, block_length=6, temperature=temperature, seed=3)
    done = []
    batched = generate.respond(model, tokenizer, prompts, batch_size=2, progress=done.append, **options)
    assert batched == generate.respond(model, tokenizer, prompts, batch_size=1, **options)
    counts = Counter(len(ids) for ids in prompts).values()
    assert done[-1] == 6 and done == sorted(done) and len(done) == sum(-(-count // 2) for count in counts)
    assert (batched[0] == batched[5]) == (temperature == 0)
    if temperature == 0:
        assert batched == [generate.respond(model, tokenizer, [ids], **options)[0] for ids in prompts]


def test_text_ends_before_the_first_end(tiny_dir, monkeypatch):
    """At eos or at the template's end of turn, whichever comes first; special tokens are left out, spaces kept."""
    tokenizer = checkpoint.load_tokenizer(str(tiny_dir))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot|>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|eot|>{% endfor %}"
    eos, eot, bos = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|eot|>"), tokenizer.bos_token_id
    words, tail = checkpoint.encode(tokenizer, " 7 + 5 = 12\n#### 12"), checkpoint.encode(tokenizer, "more")
    rows = [words + [eos] + tail, [bos] + words + [eot] + tail + [eos], words, [eos] + words]
    class Model:
        config = LLaDAConfig(mask_token_id=MASK)
    for row in rows:
        monkeypatch.setattr(generate, "generate", lambda *_, **__: torch.tensor([row]))
        text = generate.respond(Model, tokenizer, [[1]], steps=1, gen_length=1, block_length=1)
        assert text == ([""] if row is rows[3] else [" 7 + 5 = 12\n#### 12"])


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
    assert "3/3 responses" in done.stderr and "tokens/s" in done.stderr
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
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    talk = [{"role": role, "content": role[0]} for role in ("system", "user")]
    with jsonlines.open(tmp_path / "in.jsonl", "w") as writer:
        writer.write_all([{"prompt": "7 + 5"}, {"prompt": talk}])
    seen = []
    monkeypatch.setattr(generate, "respond", lambda model, tokenizer, prompts, **_: seen.append(
        [tokenizer.decode(ids) for ids in prompts]) or ["x"] * len(prompts))
    generate.main(["--model_name_or_path", str(folder), "--in", str(tmp_path / "in.jsonl"),
                   "--out", str(tmp_path / "out.jsonl"), *SHORT])
    generate.main(["--model_name_or_path", str(folder), "--prompt", "7 + 5", "--template", "none", *SHORT])
    assert seen == [["<s>[user]7 + 5</s>[a]", "<s>[system]s</s>[user]u</s>[a]"], ["7 + 5"]]


def test_task(tiny_dir, tmp_path, capsys, monkeypatch):
    """The verdicts are those of the rows written; the two solved problems here are planted."""
    problems = tasks.generate(6, "test", 4)
    monkeypatch.setattr(generate, "respond", lambda *_, **__: [p.solution for p in problems[:2]] + ["#### 100"] * 4)
    generate.main(["--model_name_or_path", str(tiny_dir), "--task", "arithmetic", "--num", "6", "--seed", "4",
                   "--out", str(tmp_path / "out.jsonl"), *SHORT])
    first, *more = capsys.readouterr().out.splitlines()
    assert first == "solved 2 of 6 (33.3%, 95% interval 9.7-70.0)"
    assert sum(int(re.search(r"solved (\d+) of", line)[1]) for line in more) == 2
    assert sum(int(re.search(r"of (\d+) ", line)[1]) for line in more) == 6
    with jsonlines.open(tmp_path / "out.jsonl") as reader:
        rows = list(reader)
    assert [row["correct"] for row in rows] == [True, True] + [False] * 4
    assert [(row["prompt"], row["answer"]) for row in rows] == [(p.prompt, p.answer) for p in problems]


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
    ([], "--prompt"), (["--prompt", "x", "--step", "3"], "--step"),
    (["--prompt", "x", "--template", "chat"], "template")])
def test_refusals(tiny_dir, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        generate.main(["--model_name_or_path", str(tiny_dir), *flags])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_empty_prompt(tiny_dir, capsys):
    generate.main(["--model_name_or_path", str(tiny_dir), "--prompt", "", *SHORT])
    assert capsys.readouterr().out

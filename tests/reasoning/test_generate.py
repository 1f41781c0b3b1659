"""Tests of generate.py, and of what surrounds the sampler: arguments, batches, texts.

bash tests/run.sh tests/reasoning/test_generate.py
"""

import dataclasses
import json
import math
import re
import shutil

import jsonlines
import pytest
import torch
from small import ROOT, call, flags, refusal, run, settings

import generate
from config import SampleArguments
from files import InputError
from models import checkpoint, tokenization
from models.llada import LLaDAConfig
from reasoning import arguments, sampler, tasks
from training import streaming

MASK = 3
SHORT = flags(gen_length=8, steps=4, use_mixed_precision="no", device="cpu")


def loaded(folder, dtype="no"):
    """sampler.load() of a model's folder, on the CPU."""
    return sampler.load(SampleArguments(model_name_or_path=str(folder), use_mixed_precision=dtype, device="cpu"))


# --- arguments --------------------------------------------------------------------------------------------


def test_check_fills_in():
    sample = settings(gen_length=12)
    assert (sample.steps, sample.block_length, sample.device) == (12, 12, "cpu")
    assert settings(gen_length=12, threshold=0.9, block_length=4).steps is None
    arguments.check(sample)  # again: nothing changes
    assert sample == settings(gen_length=12, steps=12, block_length=12)
    auto = SampleArguments()
    arguments.check(auto)
    assert auto.device == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"steps": 4, "gen_length": 8, "block_length": 3}, "--gen_length 8 .*--block_length 3; try --block_length 1"),
        ({"steps": 3, "gen_length": 8, "block_length": 4}, "--steps 3 .*try --steps 4"),
        ({"steps": 0}, "--steps is 0"),
        ({"block_length": 0}, "--block_length is 0"),
        ({"gen_length": -1}, "--gen_length is -1"),
        ({"batch_size": 0}, "--batch_size is 0"),
        ({"temperature": -1.0}, "--temperature is -1"),
        ({"temperature": math.nan}, "--temperature is nan"),
        ({"cfg_scale": -0.5}, "--cfg_scale is -0.5"),
        ({"cfg_scale": math.inf}, "--cfg_scale is inf"),
        ({"threshold": 0.0}, "--threshold is 0.0"),
        ({"threshold": 1.01}, "--threshold is 1.01"),
        ({"threshold": math.nan}, "--threshold is nan"),
        ({"threshold": 0.9, "remasking": "random"}, "--threshold 0.9 has no meaning with --remasking random"),
        ({"threshold": 0.9, "gen_length": 8, "block_length": 3}, "--block_length 1"),
        ({"confidence_eos_eot_inf": True, "remasking": "random"}, "--confidence_eos_eot_inf .*--remasking random"),
        ({"threshold": 0.9, "remasking": "sequential"}, "--threshold 0.9 has no meaning with --remasking sequential"),
        ({"device": "tpu"}, "--device is 'tpu'"),
    ],
    ids=str,
)
def test_bad_combinations(options, words):
    with pytest.raises(InputError, match=words) as error:
        arguments.check(SampleArguments(**{"device": "cpu"} | options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype, want", [("bf16", torch.bfloat16), ("no", torch.float32)])
def test_load(tiny_dir, dtype, want):
    model, tokenizer = loaded(tiny_dir, dtype)
    assert model.dtype == want and not model.training and tokenizer.eos_token_id == 2


# --- texts ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spoken(tiny_dir):
    """(model, tokenizer) whose predictions are further from ties than a fresh initialisation's."""
    model, tokenizer = loaded(tiny_dir)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    return model, tokenizer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.0},
        {"threshold": 0.1},
        {"threshold": 0.1, "temperature": 1.0},
        {"cfg_scale": 1.0},
        {"remasking": "random"},
    ],
    ids=str,
)
def test_batch_is_one_by_one(spoken, tiny_dir, options):
    """Prompts of several lengths, out of order: each response is the one that the prompt gets alone."""
    model, tokenizer = spoken
    prompts = [tokenization.encode(tokenizer, text) for text in ("7 + 5", "How many?", "a", "9 + 5", "x", "7 + 5")]
    assert len({len(ids) for ids in prompts}) > 1
    sample = settings(model_name_or_path=str(tiny_dir), gen_length=12, block_length=6, seed=3, batch_size=2, **options)
    done = []
    batched = sampler.respond(model, tokenizer, prompts, sample, finished=done.append)
    assert len(done) > 2  # they are told as they end
    assert sorted(index for replies in done for index in replies) == list(range(6))
    assert all(batched[index] == reply for replies in done for index, reply in replies.items())
    alone = [sampler.respond(model, tokenizer, [ids], sample, keys=[key])[0] for key, ids in enumerate(prompts)]
    assert batched == alone and len(set(alone)) > 3
    noisy = "temperature" in options or "remasking" in options
    assert (batched[0] == batched[5]) != noisy
    assert sampler.respond(model, tokenizer, prompts[:1], sample, keys=[5])[0] == (batched[5] if noisy else batched[0])


def test_text_ends_before_the_first_end(tiny_dir, monkeypatch):
    """At eos or at the template's end of turn, whichever comes first; special tokens are left out, spaces kept."""
    tokenizer = tokenization.load_tokenizer(str(tiny_dir))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot|>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|eot|>{% endfor %}"
    eos, eot, bos = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|eot|>"), tokenizer.bos_token_id
    words, tail = tokenization.encode(tokenizer, " 7 + 5 = 12\n#### 12"), tokenization.encode(tokenizer, "more")
    n, text = len(words), " 7 + 5 = 12\n#### 12"
    sample = settings(gen_length=1)

    class Model:
        config, blocks, joins_rows = LLaDAConfig(mask_token_id=MASK), None, True

    given, row = [], []

    def filled(model, prompts, sample, special, *_):
        given.append((special.mask_id, special.eos, special.ends.tolist()))
        yield [(0, torch.tensor(row))]

    monkeypatch.setattr(sampler, "fill", filled)
    monkeypatch.setattr(sampler, "response_tokenizer", lambda name, tokenizer, trust: tokenizer)
    for ids, want in (
        (words + [eos] + tail, (text, n, True)),
        ([bos] + words + [eot] + tail + [eos], (text, n + 1, True)),
        (words, (text, n, False)),
        ([eos] + words, ("", 0, True)),
    ):
        row[:] = ids
        assert sampler.respond(Model, tokenizer, [[1]], sample) == [want]
    assert given == [(MASK, eos, sorted((eos, eot)))] * 4


def test_first_word_keeps_its_space(tiny_dir, tmp_path, monkeypatch):
    """respond() takes the tokenizer with sentencepiece's dummy prefix, which would drop a response's first space."""
    folder = shutil.copytree(tiny_dir, tmp_path / "prefixed")
    fields = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**fields, "add_prefix_space": True}))
    sample = settings(model_name_or_path=str(folder), gen_length=1)
    model, tokenizer = sampler.load(sample)
    ids = tokenization.encode(tokenization.load_tokenizer(str(tiny_dir)), " 7 + 5")
    assert tokenizer.decode(ids) == "7 + 5"
    monkeypatch.setattr(sampler, "fill", lambda *_: [[(0, torch.tensor(ids))]])
    assert sampler.respond(model, tokenizer, [[1]], sample)[0].text == " 7 + 5"


def test_a_cache_is_refused_before_a_model_is_loaded(tmp_path):
    """By config.json, where that says that its rows must have one length."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(InputError, match="--cache dual: .* \\(model_type bert\\) cannot read a part of a row"):
        settings(model_name_or_path=str(tmp_path), cache="dual")
    assert settings(model_name_or_path=str(tmp_path)).cache == "none"


def test_out_of_memory(spoken, tiny_dir, monkeypatch):
    def full(**_):
        raise torch.OutOfMemoryError("a page of figures")

    monkeypatch.setattr(spoken[0], "forward", full)
    with pytest.raises(InputError, match="cpu ran out of memory with one response; add --device cpu"):
        sampler.respond(*spoken, [[1]], settings(model_name_or_path=str(tiny_dir), gen_length=1))


@pytest.mark.parametrize("streamed", [False, True])
def test_weights_that_do_not_fit_the_card(tiny_dir, monkeypatch, streamed):
    """A model that is loaded names what streams or packs its weights; a batch size does not help it."""

    def full(*_):
        raise torch.OutOfMemoryError("a page of figures")

    monkeypatch.setattr(checkpoint, "fill", full)
    sample = settings(model_name_or_path=str(tiny_dir))
    with pytest.raises(InputError) as refused:
        streaming.load(sample, None) if streamed else sampler.load(sample)
    said = str(refused.value)
    assert said.startswith(f"{tiny_dir}: its weights do not fit on the card; add --deepspeed ds_configs/zero3_offload")
    assert "--load_in_4bit true" in said and "--batch_size" not in said


# --- command line -----------------------------------------------------------------------------------------


def test_refusal_is_one_line(tiny_dir, capsys):
    argv = flags(model_name_or_path=tiny_dir, prompt="x", gen_length=10, block_length=4)
    said = refusal(generate.main, capsys, *argv)
    assert re.fullmatch(r"error: [^\n]*--gen_length 10[^\n]*--block_length 4[^\n]*", said)


def test_script_file_to_file(tiny_dir, tmp_path):
    """The real command line: rows in, the same rows with a response out, progress and speed on stderr."""
    rows = [{"id": 1, "prompt": "7 + 5"}, {"prompt": "a longer question?", "answer": "é"}, {"id": 3, "prompt": "7 + 5"}]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "in.jsonl").write_text("\n".join((lines[0], "", *lines[1:])) + "\n")
    files = ["--in", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl"]
    said = run([ROOT / "generate.py", "--model_name_or_path", tiny_dir, *files, *SHORT])
    assert "3/3" in said and "tokens/s" in said
    with jsonlines.open(tmp_path / "out.jsonl") as reader:
        written = list(reader)
    responses = [row.pop("response") for row in written]
    assert written == rows
    assert all(isinstance(response, str) for response in responses) and responses[0] == responses[2]
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
    template = (
        "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[a]{% endif %}"
    )
    fields = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**fields, "chat_template": template}))
    talk = [{"role": role, "content": role[0]} for role in ("system", "user")]
    with jsonlines.open(tmp_path / "in.jsonl", "w") as writer:
        writer.write_all([{"prompt": "7 + 5"}, {"prompt": talk}])
    seen = []

    def respond(model, tokenizer, prompts, sample, **_):
        seen.append([tokenizer.decode(ids) for ids in prompts])
        return [sampler.Response("x", 1, True)] * len(prompts)

    monkeypatch.setattr(sampler, "respond", respond)
    command = ["--model_name_or_path", folder, *SHORT]
    call(generate.main, *command, "--in", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl")
    call(generate.main, *command, *flags(prompt="7 + 5", template="none"))
    assert seen == [["<s>[user]7 + 5</s>[a]", "<s>[system]s</s>[user]u</s>[a]"], ["7 + 5"]]


def test_task(tiny_dir, tmp_path, capsys, monkeypatch):
    """The verdicts are those of the rows written; the two solved problems here are planted."""
    problems = tasks.generate(6, "test", 4, ("arithmetic",))
    texts = [problem.solution for problem in problems[:2]] + ["#### 100"] * 4
    monkeypatch.setattr(sampler, "respond", lambda *_, **__: [sampler.Response(text, 9, True) for text in texts])
    out = tmp_path / "out.jsonl"
    call(generate.main, *flags(model=tiny_dir, task="arithmetic", num=6, seed=4, out=out), *SHORT)
    first, *more = capsys.readouterr().out.splitlines()
    assert first == "solved 2 of 6 (33.3%, 95% interval 9.7-70.0)"
    assert all(re.match(r"  \d-step problems: solved ", line) for line in more)
    assert sum(int(re.search(r"solved (\d+) of", line)[1]) for line in more) == 2
    assert sum(int(re.search(r"of (\d+) ", line)[1]) for line in more) == 6
    with jsonlines.open(out) as reader:
        rows = list(reader)
    assert [row["correct"] for row in rows] == [True, True] + [False] * 4
    assert [(row["prompt"], row["answer"], row["family"]) for row in rows] == [
        (p.prompt, p.answer, "arithmetic") for p in problems
    ]


def test_families(tiny_dir, capsys, monkeypatch):
    """Whatever tasks.FAMILIES holds can be named; "all" are the embedded ones, reported family by family."""
    asked, problem = [], tasks.generate(1, "test")[0]
    monkeypatch.setattr(tasks, "EMBEDDED", {"arithmetic": None, "riddles": None})
    monkeypatch.setattr(tasks, "FAMILIES", {"arithmetic": None, "riddles": None, "sudoku": None})

    def drawn(n, split, seed, families):
        asked.append((n, split, seed, families))
        return [dataclasses.replace(problem, family=families[i % len(families)]) for i in range(n)]

    def all_but_the_first(model, tokenizer, prompts, *_, **__):
        return [sampler.Response(problem.solution if i else "", 0, False) for i in range(len(prompts))]

    monkeypatch.setattr(tasks, "generate", drawn)
    monkeypatch.setattr(sampler, "respond", all_but_the_first)
    base = ["--model_name_or_path", str(tiny_dir), "--num", "3", *SHORT, "--task"]
    generate.main([*base, "riddles"])
    assert "riddles" not in capsys.readouterr().out
    generate.main([*base, "all"])
    out = capsys.readouterr().out
    assert "solved 2 of 3" in out and "  arithmetic: solved 1 of 2" in out and "  riddles: solved 1 of 1" in out
    assert asked == [(3, "test", 0, ("riddles",)), (3, "test", 0, ("arithmetic", "riddles"))]
    with pytest.raises(InputError, match="--task is 'logic'; expected arithmetic, riddles, sudoku or all"):
        generate.main([*base, "logic"])


def test_a_benchmark_is_evaluates(capsys):
    said = refusal(generate.main, capsys, *flags(model="m", task="gsm8k"))
    assert said.endswith("a benchmark; run: python evaluate.py --tasks gsm8k --model m")


def test_solved_line():
    assert tasks.solved_line([True] * 93 + [False] * 107) == "solved 93 of 200 (46.5%, 95% interval 39.7-53.4)"
    assert tasks.solved_line([True, False, None, None]).endswith("4.6-69.9), 2 without a readable answer")
    assert tasks.solved_line([False] * 10) == "solved 0 of 10 (0.0%, 95% interval 0.0-27.8)"
    assert tasks.solved_line([True] * 10) == "solved 10 of 10 (100.0%, 95% interval 72.2-100.0)"


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1]",
        '{"question": "x"}',
        '{"prompt": 3}',
        '{"prompt": []}',
        '{"prompt": "\\ud800"}',
        '{"prompt": ["x"]}',
        '{"prompt": [{"role": "user"}]}',
        '{"prompt": [{"role": "user", "content": "x"}]}',
    ],
)
def test_malformed_row(tiny_dir, tmp_path, line):
    """Named by file and line; a conversation is malformed for a tokenizer without a chat template."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n\n' + line + "\n")
    with pytest.raises(InputError) as error:
        generate.main(["--model_name_or_path", str(tiny_dir), "--in", str(path), "--out", str(tmp_path / "out.jsonl")])
    assert f"{path}:3: " in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--in", "nowhere.jsonl", "--out", "out.jsonl"], "nowhere.jsonl"),
        (["--in", "x.jsonl"], "--out"),
        (["--prompt", "x", "--device", "tpu"], "tpu"),
        (["--prompt", "x", "--temperature", "-1"], "--temperature"),
        (["--prompt", "x", "--temperature", "nan"], "--temperature"),
        (["--prompt", "x", "--batch_size", "0"], "--batch_size"),
        (["--task", "arithmetic", "--num", "0"], "--num"),
        (["--prompt", "x", "--out", "nowhere/out.jsonl"], "nowhere"),
        (["--prompt", "x", "--out", "."], "a folder; expected a file"),
        (["--prompt", "x\udcff"], "not UTF-8"),
        ([], "--prompt"),
        (["--prompt", "x", "--task", "arithmetic"], "--prompt and --task"),
        (["--prompt", "x", "--step", "3"], "--step"),
        (["--prompt", "x", "--remasking", "some"], "--remasking"),
        (["--prompt", "x", "--template", "chat"], "template"),
    ],
)
def test_refusals(tiny_dir, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        generate.main(["--model_name_or_path", str(tiny_dir), *flags])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_empty_prompt(tiny_dir, capsys):
    generate.main(["--model_name_or_path", str(tiny_dir), "--prompt", "", *SHORT])
    assert capsys.readouterr().out


# --- bench ------------------------------------------------------------------------------------------------

"""Tests of make_prefs.py: what is paired with what, by hand and on the embedded model; stopped jobs; refusals.

bash tests/run.sh tests/reasoning/test_make_prefs.py
"""

import json
import random
import shlex
import shutil

import pytest
from small import ROOT, call, flags, refusal

import data_prep
import files
import make_prefs
from files import InputError
from preferences import packed
from reasoning import sampler, samples, tasks
from reasoning.pairing import Pairing

TINY = ROOT / "examples" / "tiny"
SAMPLE = flags(model=TINY, use_mixed_precision="no", device="cpu", gen_length=40, block_length=8, temperature=1)
SAMPLE += flags(batch_size=32, k=4, seed=3)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- pairs ------------------------------------------------------------------------------------------------


def test_pairing_spares_texts():
    """Four right and two wrong: the third pair is the first to use a text again, and no pair comes twice."""
    pairs = [(a, b) for a in ("r1", "r2", "r3", "r4") for b in ("w1", "w2")]
    for seed in range(20):
        chosen = Pairing(3, False, seed).choose(list(pairs))
        assert len(set(chosen)) == 3 and set(chosen) <= set(pairs)
        assert len({a for a, _ in chosen}) == 3 and len({b for _, b in chosen[:2]}) == 2
    assert len(Pairing(100, False, 0).choose(list(pairs))) == 8 and Pairing(3, False, 0).choose([]) == []
    assert len({tuple(Pairing(1, False, seed).choose(list(pairs))) for seed in range(40)}) == 8


def test_pairing_favours_the_frequent():
    pairs = [("often", "w")] * 9 + [("rare", "w")]
    first = [Pairing(1, False, seed).choose(list(pairs))[0][0] for seed in range(200)]
    assert 150 < first.count("often") < 200


def test_length_balance():
    """Right responses twice as long as wrong ones on average: balanced pairs cancel, others do not."""
    rng = random.Random(0)
    groups = [
        [("r" * rng.randint(10, 80) + str(i), "w" * rng.randint(5, 60) + str(j)) for i in range(3) for j in range(3)]
        for _ in range(100)
    ]
    surplus = {}
    for balanced in (True, False):
        pairing = Pairing(2, balanced, 0)
        chosen = [pair for group in groups for pair in pairing.choose(list(group))]
        surplus[balanced] = sum(len(a) - len(b) for a, b in chosen) / len(chosen)
        assert surplus[balanced] == pairing.surplus / len(chosen)
    assert abs(surplus[True]) < 0.5 and surplus[False] > 8


# --- sample -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    out = tmp_path_factory.mktemp("sampled") / "prefs.jsonl"
    assert call(make_prefs.main, "--task", "arithmetic", "--num", 70, *SAMPLE, "--out", out) is None
    return out


def test_sample(sampled):
    """Every pair is a verified response against a wrong one of the same prompt, both from the samples file."""
    rows, (header, *samples) = read(sampled), read(sampled.with_name("prefs.jsonl.samples.jsonl"))
    problems = {f"arithmetic {i}": problem for i, problem in enumerate(tasks.generate(70, "train", 3), 1)}
    assert len(samples) == 280 and header["gen_length"] == 40 and header["seed"] == 3 and len(rows) > 10
    said = {place: [] for place in problems}
    for line in samples:
        said[line["place"]].append(line)
    for place, group in said.items():
        assert len(group) == 4
        assert all(reply["correct"] is tasks.verify(problems[place], reply["text"]) for reply in group)
    assert len({reply["text"] for group in said.values() for reply in group}) > 80  # each response has its own noise
    for row in rows:
        meta, problem = row["meta"], problems[row["meta"]["place"]]
        assert row["prompt"] == problem.prompt and meta["answer"] == problem.answer and meta["strategy"] == "sample"
        assert tasks.verify(problem, row["chosen"]) and tasks.verify(problem, row["rejected"]) is False
        fit = {reply["text"] for reply in said[meta["place"]] if reply["ended"]}
        assert {row["chosen"], row["rejected"]} <= fit
        verdicts = [reply["correct"] for reply in said[meta["place"]]]
        assert meta["correct"] == verdicts.count(True) and meta["unread"] == verdicts.count(None)
        assert 0 < meta["correct"] < 4
        assert meta["model"] == str(TINY) and meta["temperature"] == 1 and meta["block_length"] == 8
    by_prompt = [row["prompt"] for row in rows]
    assert max(map(by_prompt.count, by_prompt)) == 2
    mixed = [
        place
        for place, group in said.items()
        if {True, False} <= {r["correct"] for r in group if r["ended"] and r["text"].strip()}
    ]
    assert {row["meta"]["place"] for row in rows} == set(mixed)


def test_next_command(sampled, tmp_path, capsys):
    """It repeats what data_prep.py needs to know of the model, and a file name that a shell would split is quoted."""
    out = tmp_path / "two words.jsonl"
    shutil.copy(sampled.with_name("prefs.jsonl.samples.jsonl"), tmp_path / "two words.jsonl.samples.jsonl")
    argv = [*SAMPLE, *flags(task="arithmetic", num=70, out=out, trust_remote_code="true")]
    call(make_prefs.main, *argv)
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith(f"next: python data_prep.py --in '{out}' ")
    assert f"--model_name_or_path {TINY}" in last and "--trust_remote_code True" in last and "--seed" not in last
    words = shlex.split(last.removeprefix("next: python data_prep.py "))
    call(data_prep.main, *words, "--out", tmp_path / "packed")


def test_sample_goes_on(sampled, tmp_path, monkeypatch):
    """A job killed while it wrote: what is whole is kept, the rest is sampled anew, and the file comes out the same."""
    source = sampled.with_name("prefs.jsonl.samples.jsonl")
    lines = source.read_bytes().splitlines(keepends=True)
    out, path = tmp_path / "prefs.jsonl", tmp_path / "prefs.jsonl.samples.jsonl"
    path.write_bytes(b"".join(lines[:257]) + lines[257][:40])  # eight batches of 32, and a torn line of the next
    asked, respond = [], sampler.respond

    def counted(model, tokenizer, prompts, *rest, **more):
        asked.append(len(prompts))
        return respond(model, tokenizer, prompts, *rest, **more)

    monkeypatch.setattr(sampler, "respond", counted)
    command = ["--task", "arithmetic", *SAMPLE, "--out", out]
    call(make_prefs.main, *command, "--num", 70)
    assert asked == [280 - 256] and out.read_bytes() == sampled.read_bytes()
    assert sorted(path.read_bytes().splitlines()) == sorted(source.read_bytes().splitlines())
    call(
        make_prefs.main, *command, "--num", 70, "--pairs_per_prompt", 1
    )  # pairs anew from the same samples, nothing sampled
    assert asked == [24] and len(read(out)) == len({row["prompt"] for row in read(sampled)})
    call(make_prefs.main, *command, "--num", 72)  # more problems: only theirs
    assert asked == [24, 2 * 4] and len(read(path)) == 1 + 72 * 4
    call(make_prefs.main, *command, "--num", 70, "--k", 5)  # more responses to each: only the fifth
    assert asked == [24, 2 * 4, 70] and len(read(path)) == 1 + 72 * 4 + 70


def test_two_commands_make_samples_once(sampled, tmp_path, monkeypatch, capsys):
    """The second waits while the first adds to the file, then uses what is there."""
    out, name = tmp_path / "prefs.jsonl", "prefs.jsonl.samples.jsonl"
    first = files.hold(tmp_path / f".{name}.lock")

    def meanwhile(seconds):
        shutil.copy(sampled.with_name(name), tmp_path / name)
        first.close()

    monkeypatch.setattr(files.time, "sleep", meanwhile)
    monkeypatch.setattr(sampler, "load", None)
    call(make_prefs.main, "--task", "arithmetic", *SAMPLE, "--num", 70, "--out", out)
    assert out.read_bytes() == sampled.read_bytes()
    assert f"is working on the same samples, {tmp_path / name}" in capsys.readouterr().out


def test_answers_mended_afterwards_count(tmp_path):
    """The responses are kept, the verdicts are not: another answer in the file of problems, other pairs."""
    source, out = tmp_path / "problems.jsonl", tmp_path / "prefs.jsonl"
    problems = tasks.generate(12, "train", 5)
    write(source, [{"prompt": problem.prompt, "answer": int(problem.answer)} for problem in problems])
    call(make_prefs.main, "--in", source, *SAMPLE, "--out", out)
    before, path = read(out), tmp_path / "prefs.jsonl.samples.jsonl"
    taken = {row["prompt"]: row["rejected"].rpartition("####")[2].strip() for row in before}
    write(source, [{"prompt": problem.prompt, "answer": taken.get(problem.prompt) or 1} for problem in problems])
    samples = path.read_bytes()
    call(make_prefs.main, "--in", source, *SAMPLE, "--out", out)
    assert path.read_bytes() == samples and read(out)
    for row in read(out):
        assert tasks.verify(taken[row["prompt"]], row["chosen"]) and not tasks.verify(
            taken[row["prompt"]], row["rejected"]
        )


def test_other_samples_are_refused(sampled, capsys):
    said = refusal(
        make_prefs.main, capsys, "--task", "arithmetic", "--num", 70, *SAMPLE, "--out", sampled, "--temperature", 0.5
    )
    assert "with temperature = 1.0, not 0.5" in said


def test_sample_from_a_file(tmp_path):
    """Problems of one's own; an answer may be the end of a worked solution."""
    problems = tasks.generate(12, "train", 5)
    rows = [
        {"prompt": problem.prompt, "answer": f"so it is\n#### {problem.answer}" if i % 2 else int(problem.answer)}
        for i, problem in enumerate(problems)
    ]
    out = tmp_path / "prefs.jsonl"
    write(tmp_path / "prefs.jsonl.samples.jsonl", [{"model": "another"}])  # begun, and stopped before any response
    call(make_prefs.main, "--in", write(tmp_path / "problems.jsonl", rows), *SAMPLE, "--out", out)
    answers = {problem.prompt: problem.answer for problem in problems}
    assert read(out)
    for row in read(out):
        assert tasks.verify(answers[row["prompt"]], row["chosen"]) and not tasks.verify(
            answers[row["prompt"]], row["rejected"]
        )
        assert row["meta"]["place"].startswith(str(tmp_path / "problems.jsonl:"))


def test_what_cannot_be_read_is_no_wrong_answer(tmp_path, monkeypatch, capsys):
    """One right response in a spelling of its own, one wrong, and two that no reader understands: one pair."""
    said = [r"so \boxed{12}", "#### 13", "#### 12 or 13", "a dozen"]
    monkeypatch.setattr(sampler, "load", lambda sampling: (None, None))
    monkeypatch.setattr(sampler, "most_passes", lambda *_: 1)
    monkeypatch.setattr(samples, "prompt_ids", lambda tokenizer, numbers, *_: [[number] for number in numbers])

    def respond(model, tokenizer, prompts, *_, finished, **__):
        finished({place: sampler.Response(said[place % 4], 5, True) for place in range(len(prompts))})

    monkeypatch.setattr(sampler, "respond", respond)
    source = write(tmp_path / "p.jsonl", [{"problem": "7 and 5?", "answer": "7 + 5 = 12\n#### 12"}])
    out = tmp_path / "prefs.jsonl"
    call(make_prefs.main, "--in", source, *SAMPLE, "--out", out, "--pairs_per_prompt", 9)
    [row] = read(out)
    assert (row["prompt"], row["chosen"], row["rejected"]) == ("7 and 5?", said[0], said[1])
    assert row["meta"]["correct"] == 1 and row["meta"]["unread"] == 2 and row["meta"]["answer"] == "12"
    assert "solved 1 of 4" in (printed := capsys.readouterr().out) and "2 without a readable answer" in printed
    said[1] = "#### no number"
    out.with_name("prefs.jsonl.samples.jsonl").unlink()
    with pytest.raises(InputError, match="no prompt has both"):
        call(make_prefs.main, "--in", source, *SAMPLE, "--out", out)
    assert "warning: most responses have no answer that can be read" in capsys.readouterr().out


# --- label and corrupt ------------------------------------------------------------------------------------


def test_label(tmp_path):
    rows = [
        {"prompt": "Q", "response": "good", "score": 9},
        {"prompt": "Q", "response": "bad", "score": 2},
        {"prompt": "Q", "response": "fair", "score": 8.5},
        {"prompt": "Q", "response": "bad", "score": 4},
        {"prompt": "other", "responses": ["x", "y"], "scores": [1, 1]},
        {"prompt": [{"role": "user", "content": "M"}], "responses": ["no", "yes", " "], "scores": [False, True, 1]},
    ]
    out = tmp_path / "prefs.jsonl"
    argv = ["--strategy", "label", "--in", write(tmp_path / "judged.jsonl", rows), "--out", out]
    call(make_prefs.main, *argv, "--pairs_per_prompt", 9)
    got = {(json.dumps(row["prompt"]), row["chosen"], row["rejected"]): row["meta"] for row in read(out)}
    message = json.dumps(rows[-1]["prompt"])
    assert set(got) == {('"Q"', "good", "bad"), ('"Q"', "fair", "bad"), ('"Q"', "good", "fair"), (message, "yes", "no")}
    assert got['"Q"', "good", "bad"]["scores"] == [9, 3] and got['"Q"', "good", "bad"]["strategy"] == "label"
    call(make_prefs.main, *argv, "--pairs_per_prompt", 9, "--min_gap", 0.5)
    assert [("good", "fair")] not in [[(row["chosen"], row["rejected"])] for row in read(out)] and len(read(out)) == 3


def test_corrupt(tmp_path, capsys):
    out = tmp_path / "prefs.jsonl"
    call(make_prefs.main, "--strategy", "corrupt", "--task", "all", "--num", 200, "--out", out, "--seed", 4)
    rows = read(out)
    assert len(rows) == 200 and {row["meta"]["family"] for row in rows} == set(tasks.EMBEDDED)
    for row in rows:
        assert row["meta"]["strategy"] == "corrupt" and row["meta"]["error"] and row["meta"]["seed"] == 4
        assert tasks.verify(row["meta"]["answer"], row["chosen"]) and not tasks.verify(
            row["meta"]["answer"], row["rejected"]
        )
    first = out.read_bytes()
    call(make_prefs.main, "--strategy", "corrupt", "--task", "all", "--num", 200, "--out", out, "--seed", 4)
    assert out.read_bytes() == first


def test_corrupt_ones_own(tmp_path, capsys):
    """GSM8K's columns and ours; what holds no equation is counted, what has no answer is refused."""
    source = write(
        tmp_path / "s.jsonl",
        [
            {"question": "48 friends, half as many", "answer": "48/2 = <<48/2=24>>24\n48+24 = <<48+24=72>>72\n#### 72"},
            {"prompt": "7 and 5", "response": " 7 + 5 = 12\n#### 12"},
            {"prompt": "a word", "response": "so\n#### yes"},
        ],
    )
    out = tmp_path / "prefs.jsonl"
    call(make_prefs.main, "--strategy", "corrupt", "--in", source, "--out", out)
    first, second = read(out)
    assert "1 of 3 solutions left out" in capsys.readouterr().out
    assert first["chosen"] == "48/2 = 24\n48+24 = 72\n#### 72" and first["meta"]["place"] == f"{source}:1"
    for row in (first, second):
        assert tasks.verify(row["meta"]["answer"], row["chosen"]) and not tasks.verify(
            row["meta"]["answer"], row["rejected"]
        )
    write(source, [{"prompt": "7 and 5", "response": "7 + 5 = 12"}])
    said = refusal(make_prefs.main, capsys, "--strategy", "corrupt", "--in", source, "--out", tmp_path / "other.jsonl")
    assert f"{source}:1" in said and '"#### 8"' in said


def test_data_prep_reads_it(sampled, tmp_path):
    call(
        data_prep.main, "--in", sampled, "--out", tmp_path / "packed", "--model_name_or_path", TINY, "--max_length", 256
    )
    assert packed.Packed(tmp_path / "packed").meta["kept"] == len(read(sampled))


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "needs problems"),
        (["--task", "arithmetic", "--in", "x.jsonl"], "needs problems"),
        (["--task", "arithmetic"], "--model DIR"),
        (["--task", "sums", "--model", "m"], "no family 'sums'"),
        (["--task", "arithmetic", "--model", "m", "--temperature", 0], "--temperature 0"),
        (["--task", "arithmetic", "--k", 0], "--k is 0"),
        (["--task", "arithmetic", "--model", "m", "--k", 1], "needs two responses"),
        (["--task", "arithmetic", "--num", 0], "--num is 0"),
        (["--task", "arithmetic", "--pairs_per_prompt", 0], "--pairs_per_prompt is 0"),
        (["--strategy", "label", "--task", "arithmetic"], "--in judged.jsonl"),
        (["--strategy", "label"], "--in judged.jsonl"),
        (["--strategy", "corrupt"], "--task"),
        (["--strategy", "corrupt", "--task", "arithmetic", "--in", "x"], "--task (arithmetic"),
        (["--strategy", "corrupt", "--task", "arithmetic", "--out", "no/such/folder/x"], "existing folder"),
        (["--strategy", "label", "--in", "x.jsonl", "--min_gap", -1], "--min_gap is -1"),
        (["--strategy", "label", "--in", "x.jsonl", "--out", "./x.jsonl"], "which it would replace"),
        (["--strategy", "label", "--in", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_refusals(capsys, argv, words):
    assert words in refusal(make_prefs.main, capsys, *argv)


@pytest.mark.parametrize(
    "row, words",
    [
        ({"prompt": "Q"}, '"answer"'),
        ({"prompt": "Q", "answer": "#### "}, "verified"),
        ("Q", '"answer"'),
        ({"prompt": "Q", "answer": 8, "extra": 1}, None),
        ({"question": "Q", "answer": "4 + 4 = 8\n#### 8"}, None),
        ({"answer": "8"}, '"question"'),
    ],
)
def test_problem_rows(tmp_path, capsys, row, words):
    argv = ["--in", write(tmp_path / "p.jsonl", [row]), *SAMPLE, "--out", tmp_path / "out.jsonl"]
    said = refusal(make_prefs.main, capsys, *argv)
    assert (f"{tmp_path / 'p.jsonl'}:1" in said and words in said) if words else "no prompt has both" in said


def test_samples_that_are_not_ours(tmp_path, capsys):
    source = write(tmp_path / "p.jsonl", [{"prompt": "Q", "answer": 8}])
    argv = ["--in", source, *SAMPLE, "--out", tmp_path / "out.jsonl"]
    for text in ("[1]\n", "no json\n", '{"model": 1}\n{"numbers": 2}\n', "a file of someone's"):
        (tmp_path / "out.jsonl.samples.jsonl").write_text(text)
        assert "expected samples of an earlier run" in refusal(make_prefs.main, capsys, *argv)
        assert (tmp_path / "out.jsonl.samples.jsonl").read_text() == text


def test_label_leaves_out_what_did_not_end(tmp_path, capsys):
    """evaluate.py's rows: `correct` is the score; a response that is cut off or without a score makes no pair."""
    rows = [
        {"prompt": "Q", "response": text, "correct": correct, "ended": ended}
        for text, correct, ended in (("yes", True, True), ("no", False, True), ("never", False, False))
    ]
    rows += [{"prompt": "Q", "response": "unread", "score": None}, {"prompt": "alone", "response": "one", "score": 1}]
    out, source = tmp_path / "prefs.jsonl", write(tmp_path / "judged.jsonl", rows)
    call(make_prefs.main, "--strategy", "label", "--in", source, "--out", out, "--pairs_per_prompt", 9)
    assert [(row["chosen"], row["rejected"]) for row in read(out)] == [("yes", "no")]
    assert (
        f"{source}: 3 scored responses to 2 prompts, 1 of them without a pair; 2 responses left out"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "rows",
    [
        [
            {"prompt": "Q", "completion": "good", "label": True},
            {"prompt": "Q", "completion": "bad", "label": False},
        ],  # KTO
        [{"question": "Q", "response": "good", "score": "9"}, {"question": "Q", "response": "bad", "score": "8.5"}],
        [{"instruction": "Q", "generations": ["good", "bad"], "ratings": [5, 3]}],  # distilabel
        [
            {
                "instruction": "Q",
                "completions": [{"response": "good", "overall_score": 7}, {"response": "bad", "overall_score": 2}],
            }
        ],
        [{"prompt": "Q", "output": "good", "reward": 0.1}, {"prompt": "Q", "output": "bad", "reward": -2.5}],
    ],
)
def test_judged_files_as_people_have_them(tmp_path, rows):
    out = tmp_path / "prefs.jsonl"
    call(make_prefs.main, "--strategy", "label", "--in", write(tmp_path / "judged.jsonl", rows), "--out", out)
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in read(out)] == [("Q", "good", "bad")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "response": "r", "score": "high"},
        {"prompt": "Q", "response": "r", "score": {"help": 8}},
        {"prompt": "Q", "response": "r", "score": float("nan")},
        {"prompt": "Q", "response": "r", "score": 10**400},
        {"prompt": "Q", "responses": ["r"], "scores": []},
        {"response": "r", "score": 1},
        {"prompt": "Q", "response": "r"},
        {"prompt": "Q", "score": 1},
        {"prompt": "Q", "response": 5, "score": 1},
        ["Q"],
    ],
)
def test_judged_rows(tmp_path, capsys, row):
    argv = ["--strategy", "label", "--in", write(tmp_path / "j.jsonl", [row]), "--out", tmp_path / "out.jsonl"]
    said = refusal(make_prefs.main, capsys, *argv)
    assert (
        f"{tmp_path / 'j.jsonl'}:1" in said
        and "score" in said
        and "found" in said
        and not (tmp_path / "out.jsonl").exists()
    )

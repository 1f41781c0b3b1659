"""Tests of bench/habits.py, levels.py and learned.py: planted errors, shares by level, the table and what is kept.

bash tests/run.sh tests/bench/test_bench_learned.py
"""

import json
import sys

import numpy as np
import pytest
import torch
from small import MASK, ROOT, call, make_model, make_pairs, pack, refusal

sys.path.insert(0, str(ROOT / "bench"))
import habits
import learned
import levels

from files import InputError, write_json
from models import checkpoint
from reasoning import tasks

# --- habits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", habits.HABITS)
def test_rows(name):
    """A solution is right, or ends in the habit's error: a wrong answer of as many digits; the share is kept."""
    problems = {problem.prompt: problem for problem in tasks.generate(600, "train", habits.SEED)}
    always = list(habits.rows(name, 600, 1.0))
    some = list(habits.rows(name, 600, 0.5))
    wrong = 0
    for row, other in zip(always, some, strict=True):
        problem = problems[row["prompt"]]
        assert other["prompt"] == row["prompt"] and other["response"] in (row["response"], problem.solution)
        if row["response"] == problem.solution:
            continue
        wrong += 1
        *before, last, end = row["response"].split("\n")
        *same, right, _ = problem.solution.split("\n")
        (a, op, b, _, result), c = last.split(), end.removeprefix("#### ")
        assert before == same and len(c) == len(problem.answer) and c != problem.answer
        if name == "operation":
            assert c == result and op == "+" and int(c) == int(a) + int(b) and right.split()[1] in "-*"
        else:
            assert last == right and 10 <= int(result) == int(c) - 1 and result[0] == c[0]
    assert (wrong == 0) == (name == "none")
    if wrong:
        changed = sum(row["response"] != problems[row["prompt"]].solution for row in some)
        assert wrong > 100 and 0.35 < changed / wrong < 0.65


# --- levels -----------------------------------------------------------------------------------------------


def test_level_states():
    states = levels.level_states(np.arange(3), np.arange(10, 17), 99, np.random.default_rng(0))
    hidden = states.inputs[:, 3:] == 99
    assert hidden.sum(1).tolist() == list(range(1, 8))
    np.testing.assert_allclose(states.weight[:, 3:], hidden / np.arange(1, 8)[:, None], rtol=1e-6)
    assert levels.bins_of(8, 4).tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and levels.bins_of(3, 8).tolist() == [2, 5, 7]


def test_levels(tiny_dir, tmp_path):
    """One-token responses are decided with all hidden, by the two models' own log-probabilities."""
    folders = [make_model(tmp_path / name, tiny_dir, seed) for seed, name in enumerate(("sound", "flawed"))]
    pairs = make_pairs([(5, 1, 1), (4, 1, 1), (6, 1, 1)])
    pairs = [(prompt, [20 + i], [30 + i]) for i, (prompt, _, _) in enumerate(pairs)]
    data, path = pack(tmp_path / "packed", pairs, folders[0]), tmp_path / "levels.json"
    call(levels.main, "--data", data, "--sound", folders[0], "--flawed", folders[1], "--json", path)
    line, expected = json.loads(path.read_text()), 0
    for sign, folder in zip((1, -1), folders):
        model = checkpoint.load_model(str(folder), torch.float32).eval()
        for prompt, [chosen], [rejected] in pairs:
            logits = model(input_ids=torch.tensor([[*prompt, MASK]])).logits[0, -1]
            expected += sign * (logits[chosen] - logits[rejected]).item() / len(pairs)
    assert line["difference"] == pytest.approx(expected, rel=1e-4)
    assert line["shares"] == [0] * 7 + [pytest.approx(1)] and line["mean_level"] == pytest.approx(15 / 16)


# --- learned ----------------------------------------------------------------------------------------------


class Scripts:
    """Stands in for the scripts: writes what the table reads. solved(words): the verdicts of an evaluation."""

    def __init__(self, solved):
        self.solved, self.commands = solved, []

    def __call__(self, command, log):
        self.commands.append(command)
        script, *words = command
        values = {name: value for name, value in zip(words, words[1:]) if name.startswith("--")}
        made = learned.Path(values.get("--output_dir", log.parent))
        if script == "data_prep.py":
            learned.Path(values["--out"]).mkdir(parents=True)
        if script == "score.py":
            states = int(values["--diffusion_steps"]) * int(values["--trajectories"])
            folder = learned.Path(values["--data"]) / "ref-0"
            folder.mkdir()
            write_json(folder / "meta.json", {"pairs": 5, "states": states})
        if script == "train_dpo.py":
            made.mkdir()
            (made / "log.jsonl").write_text('{"num_tokens": 10}\n{"num_tokens": 70}\n')
        if script == "evaluate.py":
            made.mkdir()
            rows = [json.dumps({"correct": verdict}) for verdict in self.solved(values)]
            (made / "some.jsonl").write_text("\n".join(rows))
            write_json(made / "results.json", {"files": ["some.jsonl"]})
        return 0, 2.0


def run(tmp_path, monkeypatch, solved, *more):
    scripts, path = Scripts(solved), tmp_path / "table.json"
    monkeypatch.setattr(learned, "execute", scripts)
    models = ["--models", "tiny=examples/tiny", "--designs", "spread 3x3", "elbo 4x2 --noise_sets 2 --seed 5"]
    argv = [*models, "--seeds", 1, 2, "--work", tmp_path / "work", "--json", path, "--jobs", 2, *more]
    learned.main(list(map(str, argv)))
    return json.loads(path.read_text())["tables"], scripts.commands


def verdicts(values):
    """The second design solves one problem more with seed 1, and loses none."""
    return [True, "elbo" in values["--model"] and values["--seed"] == "1", None, False]


def test_table(tmp_path, monkeypatch, capsys):
    [table], commands = run(tmp_path, monkeypatch, verdicts)
    assert table["model"] == "tiny" and table["base"] == 0.25
    first, other = table["rows"]
    assert (first["solved"], first["passes"], first["against_first"]["p"]) == (0.25, 9, 1)
    assert (other["solved"], other["by_seed"], other["passes"]) == (0.375, [0.5, 0.25], 8)
    assert other["against_first"] == {"won": 1, "lost": 0, "p": 1.0}
    assert (other["seconds"], other["tokens"], other["pairs"]) == (4.0, 70, 5)
    said = capsys.readouterr().out
    assert "1 won, 0 lost, p = 1" in said and "first" in said
    # pairs are sampled once a seed; a design's flags replace those of the bench
    assert [command[0] for command in commands].count("make_prefs.py") == 2
    trained = [command for command in commands if command[0] == "train_dpo.py" and "elbo" in command]
    assert len(trained) == 2 and all(command.count("--seed") == 1 and "5" in command for command in trained)
    # nothing is done twice
    again, commands = run(tmp_path, monkeypatch, verdicts)
    assert again == [table] and commands == []


def test_rate_is_tuned_on_another_seed(tmp_path, monkeypatch):
    def solved(values):
        is_better = "3e-4" in values["--model"] and "spread" in values["--model"]
        return [is_better == (values["--seed"] == "9"), False]

    [table], _ = run(tmp_path, monkeypatch, solved, "--learning_rates", "1e-4", "3e-4")
    assert [row["learning_rate"] for row in table["rows"]] == ["3e-4", "1e-4"]
    assert [row["solved"] for row in table["rows"]] == [0, 0.5]  # on the seeds that are reported


def test_own_problems(tmp_path, monkeypatch):
    """A model's file names its pairs, problems and flags; a field that does not exist is refused."""
    given = {"model": "m", "pairs": "p.jsonl", "test": "t.jsonl", "decoding": ["--block_length 17", "--threshold 0.9"]}
    path = tmp_path / "sudoku.json"
    path.write_text(json.dumps(given | {"sampler": "--gen_length 17"}))
    tables, commands = run(tmp_path, monkeypatch, verdicts, "--models", f"sudoku={path}")
    assert [table["decoding"] for table in tables] == given["decoding"]
    assert not [command for command in commands if command[0] == "make_prefs.py"]
    for command in commands:
        if command[0] == "evaluate.py":
            assert command[command.index("--in") + 1] == "t.jsonl" and "17" in command and "--tasks" not in command
    path.write_text(json.dumps(given | {"pair": "p.jsonl"}))
    with pytest.raises(InputError, match="no field pair; there are name, model"):
        learned.subject_of(f"sudoku={path}", ())


def test_stopped_stage(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(learned, "execute", lambda command, log: (3, 0.0))
    argv = ["--models", "tiny=examples/tiny", "--work", str(tmp_path), "--seeds", "1"]
    said = refusal(learned.main, capsys, *argv)
    assert "make_prefs.py stopped with exit code 3" in said and str(tmp_path / "tiny/seed-1/prefs.log") in said

"""Tests of launch.sh and of the README: its commands run, in order, in a copy of the repository.

bash tests/run.sh tests/test_launch.py
"""

import json
import re

import pytest
from small import ROOT, copy_of_the_repository, shell

DS = "ds_configs/zero3_offload_4080.json"
MAIN = f"bash launch.sh {DS}"
IMPROVE = "bash examples/improve.sh"
ELSEWHERE = ("bash tests/run.sh", "bash examples/make_tiny.sh")  # this suite itself, and half an hour of training


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clone")
    copy_of_the_repository(folder)
    return folder


def readme_commands():
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.strip() and not line.startswith("#") and line not in ELSEWHERE]


def succeed(command, folder, fresh=False, **environment):
    done = shell(command, folder, fresh, **environment)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def times(folder):
    """{file: when it was written last}"""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_readme(clone):
    """Every command but the first, which takes minutes, exits 0; a second launch of each run finds all of it done."""
    main, *commands = readme_commands()
    assert main == MAIN
    for command in commands:
        succeed(command, clone)
    launches = [command for command in commands if command.startswith("bash launch.sh")]
    assert launches
    for command in launches:
        before = times(clone / "runs")
        said = succeed(command, clone)
        assert said.count("up to date") == 2 and "is finished" in said and times(clone / "runs") == before


@pytest.mark.long
def test_readme_main_job(tmp_path):
    """The losses that the README prints, an accuracy above chance, and a second launch that finds all of it done."""
    copy_of_the_repository(tmp_path)
    succeed(MAIN, tmp_path, fresh=True)
    assert (tmp_path / "runs/tiny/final/model.safetensors").exists()
    log = [json.loads(line) for line in (tmp_path / "runs/tiny/log.jsonl").read_text().splitlines()]
    assert abs(log[0]["rewards/margins"]) < 1e-3 and abs(log[0]["loss"] - 0.693147) < 1e-4
    assert [log[step - 1]["loss"] for step in (1, 5, 40)] == pytest.approx([0.6931, 0.5759, 0.1426], abs=1e-3)
    assert log[-1]["eval_rewards/accuracies_ci95"][0] > 0.5
    before = times(tmp_path / "runs/tiny")
    said = succeed(MAIN, tmp_path, fresh=True)
    assert said.count("up to date") == 2 and "is finished" in said
    assert times(tmp_path / "runs/tiny") == before


@pytest.mark.long
def test_improve(clone):
    """improve.sh with too few problems to improve anything."""
    said = succeed(IMPROVE, clone, SEEDS="1 2", PROBLEMS="24", VALIDATION="24", HELD_OUT="24")
    assert sorted(re.findall(r"^seed \d: done$", said, re.M)) == ["seed 1: done", "seed 2: done"]
    results = json.loads((clone / "runs/improve/results.json").read_text())
    assert [(seed["seed"], seed["n"]) for seed in results["seeds"]] == [(1, 24), (2, 24)]
    assert list(results["pooled"]["models"]) == ["start", "rft", "dpo"] and results["pooled"]["n"] == 48
    assert sum(each["n"] for each in results["by_steps"]["dpo"].values()) == 48


def test_two_ranks_and_stale_data(clone, tmp_path):
    """--num_gpus 2 on a CPU, in fresh processes; then other preferences of the same name are packed and scored."""
    rows = (clone / "examples/prefs.jsonl").read_text().splitlines(keepends=True)
    source, out = tmp_path / "prefs.jsonl", tmp_path / "packed"
    run = (
        f"bash launch.sh {DS} --num_gpus 2 --in {source} --data {out} --model_name_or_path examples/tiny "
        f"--diffusion_steps 2 --trajectories 1 --eval_fraction 0.2 --max_steps 2 --gradient_accumulation_steps 2 "
    )
    source.write_text("".join(rows[:16]))
    first = shell(f"{run} --output_dir {tmp_path}/one", clone, fresh=True)
    assert first.returncode == 0, first.stderr[-2000:]
    assert "2 CPU rank(s)" in first.stdout and "2 steps of 4 pairs" in first.stdout
    source.write_text("".join(rows[:20]))
    second = shell(f"{run} --output_dir {tmp_path}/two", clone)
    assert second.returncode == 0, second.stderr[-2000:]
    assert "20 kept" in second.stdout and "up to date" not in second.stdout
    assert json.loads((out / "meta.json").read_text())["pairs"] == 20


@pytest.mark.parametrize(
    "words, code, said",
    [
        ("", 1, "bash launch.sh DS_CONFIG"),
        ("--help", 0, "bash launch.sh DS_CONFIG"),
        ("--setup", 0, "setup: ready"),
        ("nowhere.json", 2, "error: nowhere.json: no such ds_config; expected one of ds_configs/"),
        (f"{DS} --on_oom less", 2, "error: --on_oom is 'less', expected stop or smaller"),
        (f"{DS} --num_gpus none", 2, "error: --num_gpus is 'none'"),
        (f"{DS} --in nowhere.jsonl", 2, "error: nowhere.jsonl: no such file"),
        (f"{DS} --max_len 3", 2, "error: unknown argument --max_len; did you mean --max_length?"),
    ],
)
def test_refusals(clone, words, code, said):
    done = shell(f"bash launch.sh {words}", clone)
    assert done.returncode == code and said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 1


def test_a_refusal_in_training_ends_with_its_code(clone, tmp_path):
    """Rank 0 says its one sentence though the other ranks end first; the launcher passes the exit code on."""
    done = shell(
        f"bash launch.sh {DS} --num_gpus 4 --in examples/prefs.jsonl --model_name_or_path examples/tiny "
        f"--data {tmp_path}/packed --output_dir {tmp_path}/run --beta -1 --loss_type sft",
        clone,
    )
    assert done.returncode == 2 and done.stderr.count("error: --beta is -1.0, expected more than 0") == 1
    assert "Traceback" not in done.stderr

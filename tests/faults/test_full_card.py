"""Tests of running out of memory in the middle of a job: what is saved and said, and how launch.sh goes on.

bash tests/run.sh tests/faults/test_full_card.py
"""

import json
import os
import re
import shlex
from types import SimpleNamespace

import pytest
from small import LENGTHS, ROOT, call, execute, flags, last_of_each, log, make_model, make_pairs, numbers, pack, shell

import files
import score
from training import runs

DS = ROOT / "ds_configs" / "zero3_offload_4080.json"
CARD = ROOT / "tests" / "full_card.py"
LONGEST = 207  # tokens of the longest prompt and response
TOKENS = 300
NOISE = flags(use_mixed_precision="no", diffusion_steps=3, trajectories=2)
TRAIN = flags(learning_rate=3e-3, gradient_accumulation_steps=2, max_steps=4, eval_fraction=0.3, eval_steps=2)


@pytest.fixture(scope="module")
def home(tiny_dir, tmp_path_factory):
    """Packed pairs, their reference scores, and an undisturbed run."""
    folder = tmp_path_factory.mktemp("card")
    model = make_model(folder / "model", tiny_dir)
    data = pack(folder / "packed", make_pairs(LENGTHS[:12], 3), model)
    made = SimpleNamespace(folder=folder, model=model, data=data, argv=["--data", data, *NOISE, *TRAIN])
    call(score.main, "--data", data, *NOISE, "--tokens_per_forward", TOKENS)
    assert train(made, folder / "whole").returncode == 0
    return made


def train(home, folder, *full):
    """train_dpo.py to its end. full: when the card is full, for full_card.py."""
    argv = [*home.argv, "--tokens_per_forward", TOKENS, "--deepspeed", DS, "--output_dir", folder]
    return execute([*([CARD, *full] if full else []), ROOT / "train_dpo.py", *argv])


def weights(folder):
    return files.file_sha256(folder / "final" / "model.safetensors")


@pytest.mark.parametrize(
    "full, saved",
    [
        (("forward", 12), None),  # in the first step
        (("forward", 78), 2),
        (("forward", 170), 4),  # in an evaluation
        (("backward", 40), 3),
        (("step", 1), None),  # the weights are neither those of step 1 nor those of step 2
    ],
)
def test_what_is_done_is_saved(home, tmp_path, full, saved):
    """One sentence, exit code 3, and the run goes on bit for bit as if nothing had happened."""
    folder = tmp_path / "run"
    done = train(home, folder, *full)
    [said] = [line for line in done.stderr.splitlines() if "memory" in line]
    assert done.returncode == 3 and "Traceback" not in done.stderr, done.stderr
    assert said.startswith("error: the card's memory ran out (2.00 GiB were asked for, of 15.57 GiB). "), said
    kept = "Finished work is safe" if full[0] == "step" else "No step was saved"
    assert (f"Everything up to step {saved} is saved. " if saved else kept) in said
    assert said.endswith(f"--output_dir {folder} --tokens_per_forward {LONGEST}")
    assert [step for step, _ in runs.Run(folder).saved()] == [saved] * bool(saved)
    again = train(home, folder)
    assert again.returncode == 0, again.stderr
    assert not saved or f"resuming after step {saved}" in again.stdout
    assert numbers(folder) == numbers(home.folder / "whole") and weights(folder) == weights(home.folder / "whole")


def launch(home, tmp_path, full, *more):
    """launch.sh with a python3 whose card is full as `full` says, once for each (script, rank, at, after)."""
    place, plan = tmp_path / "bin", tmp_path / "full"
    place.mkdir()
    plan.write_text("".join(f"{' '.join(map(str, each))}\n" for each in full))
    (place / "python3").write_text(
        "#!/bin/bash\n"
        f'if found=$(grep -m 1 "^$(basename "$1") ${{RANK:-0}} " {plan}); then\n'
        f'    sed -i "/^$found$/d" {plan}\n'
        f'    set -- {CARD} $(cut -d" " -f3- <<<"$found") "$@"\n'
        "fi\n"
        'exec python "$@"\n'
    )
    (place / "python3").chmod(0o755)
    argv = [*home.argv, *flags(model_name_or_path=home.model, output_dir=tmp_path / "run"), *more]
    command = shlex.join(["bash", str(ROOT / "launch.sh"), str(DS), *last_of_each(argv)])
    return shell(f"PATH={place}:$PATH {command}", ROOT), command


def test_launch_goes_on_with_less(home, tmp_path):
    """--on_oom smaller: half the tokens, down to the longest row, after an error and after a kill by the system."""
    full = [("score.py", 0, "forward", 3), ("train_dpo.py", 0, "forward", 60), ("train_dpo.py", 0, "kill", 30)]
    more = flags(on_oom="smaller", tokens_per_forward=2 * TOKENS, noise_seed=5)
    done, _ = launch(home, tmp_path, full, *more)
    assert done.returncode == 0, done.stderr
    went_on = re.findall(r"launch: out of memory; (\S+) goes on from .* with at most (\d+) tokens", done.stdout)
    assert went_on == [("score.py", "300"), ("train_dpo.py", "300"), ("train_dpo.py", str(LONGEST))]
    assert done.stderr.count("error: the card's memory ran out") == 2
    assert done.stderr.count("error: killed (SIGKILL): most likely the host ran out of memory.") == 1
    assert [line["step"] for line in log(tmp_path / "run")] == [1, 2, 3, 4]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["arguments"]["tokens_per_forward"] == LONGEST
    assert len(record["starts"]) > 1


@pytest.mark.parametrize(
    "full, tokens, code, words",
    [
        (("train_dpo.py", 0, "forward", 60), LONGEST, 3, "A forward pass holds the longest row alone"),
        pytest.param(
            *(("train_dpo.py", 1, "forward", 30), TOKENS, 3, "error (rank 1): the card's memory ran out"),
            marks=pytest.mark.long,
        ),
        pytest.param(
            *(("train_dpo.py", 1, "kill", 30), TOKENS, 137, "error: killed (SIGKILL): most likely the host ran out"),
            marks=pytest.mark.long,
        ),
    ],
)
def test_launch_stops(home, tmp_path, full, tokens, code, words):
    """With the longest row alone there is no less; and by default it stops. The ranks that wait are ended."""
    more = flags(on_oom="smaller") if tokens == LONGEST else flags(num_gpus=2, gradient_accumulation_steps=1)
    done, command = launch(home, tmp_path, [full], *more, *flags(tokens_per_forward=tokens))
    assert done.returncode == code and words in done.stderr, done.stderr
    assert "goes on" not in done.stdout and command in done.stderr.replace("\\", "")
    assert not os.path.exists(tmp_path / "run" / "final")

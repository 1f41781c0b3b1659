"""Checkpoints of a run, saved and gone on from: the engine's state, our place in it, and a probe that it came back as it went.

    runs/NAME/checkpoints/step-N/     DeepSpeed's files (one a rank), state.json: step, counters, world, probe, digests

The probe is the policy's own scores of the longest pair. A resumed run computes them again before its first step: weights that came back
wrong, another dtype or another device's arithmetic would show there, and are refused instead of trained on.
"""

import contextlib
import shutil
import subprocess
import sys

import torch
import torch.distributed as dist

import files
from files import InputError
from preferences.packed import longest
from training import engine
from training.stopping import cannot_save

SAME = {"bf16": 2e-2, "no": 1e-4}  # |score - score then| per token that a resumed run may show


@torch.no_grad()
def probe(job):
    """The policy's scores of the longest pair, as one number for each of its responses."""
    [(item, _)] = job.objective.work([(longest(job.objective.packed)[0], 0)])
    return [float(job.scores(states).double().sum()) for states in job.objective.responses(item)]


def save(job, run, step, counters, line=None):
    """Engine, step (which is the schedule's and the data's place) and counters. Nothing draws from a global RNG.

    line: the step's line of the log, where its evaluation is still to be made.
    """
    state = {"step": step, **counters, "world": job.ranks.world, "probe": probe(job), "line": line}
    work = run.checkpoints / run.temporary(step)
    try:
        job.policy.save_checkpoint(
            str(run.checkpoints), tag=work.name, save_latest=False, exclude_frozen_parameters=True
        )
        dist.barrier()
        if job.ranks.first:
            run.keep(step, state, job.args.save_total_limit)
    except (OSError, RuntimeError) as error:
        if not (
            isinstance(error, OSError) or files.no_room(error) or "inline_container" in str(error)
        ):  # torch's writer
            raise
        shutil.rmtree(work, ignore_errors=True)
        saved = [path for _, path in run.saved()]
        raise cannot_save(work, error, f"{saved[-1]} is whole" if saved else "no checkpoint was saved before") from None
    dist.barrier()


def load(job, path, dtype):
    """state.json of the checkpoint, its engine state loaded; refused if its probe comes out otherwise."""
    state = files.read_sealed(path / "state.json", "another checkpoint")
    every = all(
        parameter.requires_grad for parameter in job.policy.module.parameters()
    )  # LoRA's are saved without their base
    with of_any_world(job, path, state["world"]) as place:
        loaded, _ = job.policy.load_checkpoint(str(place.parent), tag=place.name, load_module_strict=every)
    if loaded is None:
        raise InputError(f"{path}: DeepSpeed cannot load it; choose another checkpoint with --resume_from_checkpoint")
    engine.recount(job.policy, state["step"] - state["skipped"])
    n = len(job.objective.packed[longest(job.objective.packed)[0]][1])
    gap = max(abs(now - then) for now, then in zip(probe(job), state["probe"], strict=True)) / n
    if not gap <= SAME[dtype]:
        raise InputError(
            f"{path}: the longest pair's scores differ by {gap:.2g} per token from those that it was saved with (at most "
            f"{SAME[dtype]:.0e} expected); choose another checkpoint with --resume_from_checkpoint"
        )
    return state


@contextlib.contextmanager
def of_any_world(job, path, world):
    """The checkpoint's folder; where other ranks saved it, a copy in DeepSpeed's universal form, a file for each parameter."""
    if world == job.ranks.world or job.policy.zero_optimization_stage() == 0:
        yield path
        return
    place = path.with_name(f".{path.name}.universal")
    if job.ranks.first:
        print(f"{path}: saved by {world} ranks, this run has {job.ranks.world}; cutting it anew", flush=True)
        shutil.rmtree(place, ignore_errors=True)
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "deepspeed.checkpoint.ds_to_universal",
                "--input_folder",
                str(path),
                "--output_folder",
                str(place),
                "--inject_missing_state",
            ],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise InputError(
                f"{path}: DeepSpeed cannot convert it for {job.ranks.world} ranks ({done.stderr.splitlines()[-1:]}); "
                f"go on with {world}",
                local=True,
            )
    dist.barrier()
    job.policy._config.load_universal_checkpoint = True
    yield place
    job.policy._config.load_universal_checkpoint = False
    dist.barrier()
    if job.ranks.first:
        shutil.rmtree(place)

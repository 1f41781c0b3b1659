"""Checkpoints of a run: the engine's state, the place in the run, and a probe of the weights.

    runs/NAME/checkpoints/step-N/     DeepSpeed's files (one a rank), state.json: step, counters, world, probe, digests

On resume, the longest pair is scored again and must match the scores stored in the checkpoint (the probe). A checkpoint
of other weights, another dtype or another device's arithmetic is refused instead of trained on. Only a checkpoint that
was saved because memory ran out has no probe.
"""

import contextlib
import shutil
import subprocess
import sys
import traceback
from dataclasses import asdict, dataclass, fields
from typing import Optional

import torch
import torch.distributed as dist

import files
from cli import exits, out_of_memory
from files import InputError
from preferences.packed import longest
from training import engine, nvme

SAME = {"bf16": 2e-2, "no": 1e-4}  # per token: how far a resumed run's score may be from the checkpoint's


@dataclass
class Progress:
    """How far a run is, as its checkpoints store it. The step gives the learning rate and the place in the data."""

    step: int = 0  # optimizer steps that are done
    num_tokens: int = 0  # that went through the model
    skipped: int = 0  # steps without a finite gradient
    line: Optional[dict] = None  # the last step's line of the log, while its evaluation is still to be made


@torch.no_grad()
def probe(job):
    """The policy's scores of the longest pair, as one number for each of its responses."""
    index, _ = longest(job.objective.packed)
    [(item, _)] = job.objective.work([(index, 0)])
    return [float(score.double().sum()) for score in job.scores(job.objective.responses(item))]


def save(job, run, progress, probed=True):
    """Write a checkpoint of the run. Nothing draws from a global random generator, so none is saved.

    probed: with the probe, which is a forward pass.
    """
    state = asdict(progress) | {"world": job.ranks.world, "probe": probe(job) if probed else None}
    work = run.checkpoints / run.temporary(progress.step)
    try:
        with nvme.mapped(job.policy):
            job.policy.save_checkpoint(
                str(run.checkpoints), tag=work.name, save_latest=False, exclude_frozen_parameters=True
            )
        dist.barrier()
        if job.ranks.first:
            run.keep(progress.step, state, job.args.save_total_limit)
    except (OSError, RuntimeError) as error:
        if not is_of_a_write(error):
            raise
        shutil.rmtree(work, ignore_errors=True)
        saved = [path for _, path in run.saved()]
        kept = f"{saved[-1]} is complete" if saved else "No checkpoint was saved before"
        raise exits.cannot_write(work, error, kept) from None
    dist.barrier()


def is_of_a_write(error):
    """Whether a save failed because a file could not be written: an OSError, or torch's writer in its own words."""
    return isinstance(error, OSError) or files.no_room(error) or "inline_container" in str(error)


@contextlib.contextmanager
def saving_if_memory_runs_out(job, run, progress):
    """Inside, a lack of memory saves a checkpoint and raises OutOfMemory.

    For what changes no weight: forward and backward passes, and evaluation.
    """
    try:
        yield
    except Exception as error:
        lack = out_of_memory.cause(error)
        if not lack:
            raise
        traceback.clear_frames(error.__traceback__)  # the activations that they hold are freed
        raise out_of_memory.ended(lack, what_is_saved(job, run, progress), exits.command()) from None


def what_is_saved(job, run, progress):
    """Save a checkpoint after memory ran out in the middle of a pass, if that is possible. Says what is saved.

    Of several ranks the others are still in the pass, so that none can save. ZeRO-3 first gives up all weights that it
    has gathered; it refuses to save if the error left one of them half gathered.
    """
    saved = [step for step, _ in run.saved()]
    if progress.step and progress.step not in saved and job.ranks.world == 1:
        with contextlib.suppress(RuntimeError):
            save(job, run, progress, probed=False)
            saved.append(progress.step)
    return f"Everything up to step {saved[-1]} is saved" if saved else "No step was saved"


def load(job, path, dtype):
    """Load a checkpoint into the engine. Returns its Progress; raises InputError if its probe does not match."""
    state = files.read_sealed(path / "state.json", "another checkpoint")
    # LoRA's adapters are saved without their base
    complete = all(parameter.requires_grad for parameter in job.policy.module.parameters())
    with for_this_world(job, path, state["world"]) as folder, nvme.mapped(job.policy):
        loaded, _ = job.policy.load_checkpoint(str(folder.parent), tag=folder.name, load_module_strict=complete)
    if loaded is None:
        raise InputError(f"{path}: DeepSpeed cannot load it; choose another checkpoint with --resume_from_checkpoint")
    engine.recount(job.policy, state["step"] - state["skipped"])
    if state["probe"] is not None:
        check_probe(job, path, state["probe"], SAME[dtype])
    return Progress(**{field.name: state[field.name] for field in fields(Progress)})


def check_probe(job, path, stored, tolerance):
    """Raise InputError if the policy's scores of the longest pair are not those that the checkpoint stores."""
    index, _ = longest(job.objective.packed)
    chosen_tokens = len(job.objective.packed[index][1])
    gap = max(abs(now - then) for now, then in zip(probe(job), stored, strict=True)) / chosen_tokens
    if not gap <= tolerance:
        raise InputError(
            f"{path}: the longest pair's scores differ by {gap:.2g} per token from those stored in the checkpoint "
            f"(expected at most {tolerance:.0e}); choose another checkpoint with --resume_from_checkpoint"
        )


@contextlib.contextmanager
def for_this_world(job, path, world):
    """The checkpoint's folder or, if another number of ranks saved it, a temporary copy in the universal format."""
    if world == job.ranks.world or job.policy.zero_optimization_stage() == 0:
        yield path
        return
    copy = path.with_name(f".{path.name}.universal")
    try:
        if job.ranks.first:
            print(f"{path}: saved by {world} rank(s); converting it for {job.ranks.world}", flush=True)
            convert(path, copy, world, job.ranks.world)
        dist.barrier()
        job.policy._config.load_universal_checkpoint = True
        yield copy
        dist.barrier()
    finally:
        job.policy._config.load_universal_checkpoint = False
        if job.ranks.first:
            shutil.rmtree(copy, ignore_errors=True)


def convert(path, copy, saved_by, world):
    """Write the checkpoint at `path` to `copy` with one file for each parameter, by DeepSpeed's own script."""
    shutil.rmtree(copy, ignore_errors=True)
    script = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    folders = ["--input_folder", str(path), "--output_folder", str(copy)]
    done = subprocess.run([*script, *folders], capture_output=True, text=True)
    if done.returncode == 0:
        return
    full = [line for line in done.stderr.splitlines() if files.no_room(OSError(line))]
    if full:
        raise exits.cannot_write(copy, OSError(f"the disk is full: {full[-1]}"), f"{path} is complete")
    why = " ".join(done.stderr.splitlines()[-1:])[-300:]
    raise InputError(f"{path}: cannot be converted for {world} rank(s) ({why}); resume on {saved_by}", local=True)

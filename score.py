"""The score, its gradient, and the reference job: a model's stepwise denoising scores of packed pairs, to disk.

    packed/ + model -> packed/ref-<key>/ (noise and reference scores; replayed by train_dpo.py)
    python data_prep.py --in examples/prefs.jsonl
    python score.py --data packed --use_mixed_precision no

S(x, y) = 1/R sum_r sum_s sum_{i: reveal_step_r[i] = s} log p(y_i | state before s, x)   (docs/method.md)

By default a state's share is spread evenly over all tokens that it hides, which has the same mean; scoring/noise.py has
the weights of each estimator.

B rows of a forward pass, L length, n response tokens, V vocabulary, T denoising steps, R trajectories, S states.
"""

import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import config
from cli import exits
from cli.parser import names
from scoring import reference

UNUSED = {"end_token_id", "gradient_checkpointing", "lora_r", "lora_alpha", "lora_targets"}
UNUSED |= names(config.DataArguments, config.TrainArguments) - {"data"}


def read_arguments(argv=None):
    """One instance of each of config.GROUPS, checked as far as nothing needs to be loaded for it."""
    groups = config.parse(argv, __doc__, *config.GROUPS, hide=UNUSED)
    config.check_scoring(groups[1], groups[2])
    return groups


NO_SCORES = "loss_type sft needs no reference scores"  # what is said then


def up_to_date(prepared, noise_sets):
    """What to say if all noise sets are scored; else None."""
    have = reference.sets_of(prepared.folder)
    if have < noise_sets:
        return None
    return f"{prepared.folder}: {len(prepared.packed)} pairs, {have} noise set(s), up to date"


def early():
    """Read the arguments; end the process if there is nothing to score."""
    data_args, model_args, noise_args, train_args = read_arguments()
    exits.end_if(NO_SCORES if train_args.loss_type == "sft" else None)
    exits.end_if(up_to_date(reference.prepare(data_args, model_args, noise_args), noise_args.noise_sets))


if __name__ == "__main__":
    exits.early(early)  # answers --help, mistakes and "up to date" before the imports below, which take seconds

import numpy as np
import torch
import torch.distributed as dist

import files
from cli.progress import progress
from files import InputError
from preferences.packed import Packed, longest
from scoring.recipe import draw, replay, state_count
from scoring.states import backward_passes, response_states, sizes
from training import deepspeed_config, engine, memory, stopping
from training.streaming import load

CHUNK = 8  # pairs that the reference job writes at once: what a kill can lose, per rank


# --- the score and its gradient ---------------------------------------------------------------------------


def weighted_logps(model, states, rows, device):
    """sum over a row's tokens of weight * log p(target | input), for each of `rows`: (B,) float32.

    One forward pass; the head computes log-probabilities at scored tokens alone.
    """
    inputs, targets, weight = states.inputs[rows], states.targets[rows], states.weight[rows]  # (B, L)
    scored = np.flatnonzero(weight)  # (N,) places b * L + i
    if not len(scored):
        scored = np.zeros(1, np.int64)  # a token of weight 0: every rank must make the same forward passes
    positions = engine.send(scored, device)
    logps = model(
        input_ids=engine.send(inputs, device), positions=positions, targets=engine.send(targets.ravel()[scored], device)
    )  # (N,) float32
    logps = logps * engine.send(weight.ravel()[scored], device)
    grid = torch.zeros(inputs.size, dtype=torch.float32, device=device)
    grid = grid.index_put((positions,), logps)  # without atomic additions: the same sum in every run
    return grid.view(len(inputs), -1).sum(-1)


def state_scores(model, states, states_per_forward, device):
    """The score of each state, (S,) float32, `states_per_forward` at a time. With gradients enabled it has a graph."""
    scores = torch.zeros(len(states.inputs), dtype=torch.float32, device=device)
    for rows in states.segments(states_per_forward):
        scores = scores.index_put((engine.send(rows, device),), weighted_logps(model, states, rows, device))
    return scores


def diffusion_score(model, prompt, response, masked, weight, mask_id, states_per_forward=4, device="cpu"):
    """The stepwise denoising score of one response, per state: (S,) float32, whose sum is S(x, y). Differentiable.

    prompt (P,), response (n,): token ids. masked (S, n) bool, weight (S, n): see state_masks and state_weights of
    scoring/noise.py.
    """
    states = response_states(prompt, response, masked, weight, mask_id)
    return state_scores(model, states, states_per_forward, device)


def score_and_backward(model, responses, loss_of, states_per_forward, device, backward):
    """Add the gradient of loss_of([S of each response]) at constant memory in the number of states.

    responses: States of each. loss_of: list of scalar scores -> scalar loss. backward(loss): adds d loss / d weights
    to the gradient. Returns the loss () and each response's scores (S,), detached and on the device: nothing here waits
    for a GPU.

    By the chain rule d loss / d weights is the sum over responses of d loss / d S times d S / d weights, and S is a sum
    over states: the gradient is exact. Where only some states carry it (--backprop_steps) it is unbiased.
    """
    # 1. If everything fits one forward pass, so does its graph: one backward pass
    counts = [len(states.inputs) for states in responses]
    carrying = [len(states.with_gradient.inputs) for states in responses]
    if backward_passes(counts, carrying, states_per_forward) == 1:
        scores = [state_scores(model, states, states_per_forward, device) for states in responses]
        loss = loss_of([score.sum() for score in scores])
        backward(loss)
        return loss.detach(), [score.detach() for score in scores]

    # 2. Else the scores without a graph
    with torch.no_grad():
        scores = [state_scores(model, states, states_per_forward, device) for states in responses]

    # 3. The loss's derivative by each score: one number per response
    totals = [score.sum().requires_grad_() for score in scores]
    loss = loss_of(totals)
    slopes = torch.autograd.grad(loss, totals)

    # 4. A few states at a time again, with a graph, times that number
    for states, slope in zip(responses, slopes):
        for rows in states.with_gradient.segments(states_per_forward):
            backward(slope * weighted_logps(model, states.with_gradient, rows, device).sum())
    return loss.detach(), scores


# --- the reference job ------------------------------------------------------------------------------------


class Job(NamedTuple):
    """What one rank of the reference job works with."""

    model: Any
    packed: Packed
    mask_id: int
    folder: Path  # packed/ref-<key>
    noise_args: config.NoiseArguments
    states_per_forward: int
    ranks: engine.Ranks
    stop: stopping.Stop


@torch.no_grad()
def fit_reference(model, packed, noise_args, mask_id, ranks):
    """states_per_forward of the reference job, tried on the longest response."""
    index, side = longest(packed)
    prompt, *responses = packed[index]
    states = replay(prompt, responses[side], draw(packed, index, side, noise_args, 0), noise_args, mask_id)

    def trial(size):
        state_scores(model, states.first(size), size, ranks.device)

    rows = {size: size for size in sizes(state_count(noise_args))}
    return memory.largest_that_fits(rows, trial, ranks).size


@torch.no_grad()
def score_pairs(job, pairs, noise_set):
    """Noise and scores of `pairs`; None if told to stop.

    Returns masks uint8 (their response tokens, ceil(S/8)) and scores float32 (pairs, 2, S).
    """
    masks, scores = [], []
    for index in pairs:
        prompt, *responses = job.packed[index]
        for side, response in enumerate(responses):
            masked = draw(job.packed, index, side, job.noise_args, noise_set)
            states = replay(prompt, response, masked, job.noise_args, job.mask_id)
            masks.append(reference.pack_masks(masked))
            scores.append(state_scores(job.model, states, job.states_per_forward, job.ranks.device).cpu().numpy())
        if not np.isfinite(scores[-2:]).all():
            raise InputError(
                f"{job.packed.folder}: the reference score of pair {index} is not finite; the model is broken "
                "or its numbers overflow (try --use_mixed_precision no)",
                local=True,
            )
        if job.stop.asked():
            return None
    return np.concatenate(masks), np.stack(scores).reshape(len(pairs), 2, -1)


def reference_set(job, noise_set):
    """Score every pair under one noise set and write its two arrays. False if told to stop.

    Each rank scores a chunk of pairs at a time, which is written under a temporary name and renamed: a job that was
    killed resumes after its last complete chunk.
    """
    # 1. The chunks that are not on disk yet
    paths = reference.chunk_paths(job.folder, noise_set, len(job.packed), CHUNK)
    todo = job.ranks.broadcast([chunk for chunk, path in paths.items() if not reference.is_readable(path)])

    # 2. Score them, one chunk per rank at a time
    prompts, chosen, rejected = np.diff(job.packed.bounds, axis=1).T
    tokens = state_count(job.noise_args) * (2 * prompts + chosen + rejected)  # (pairs,) through the model
    total = sum(int(tokens[chunk].sum()) for chunk in todo)
    description = f"reference scores, noise set {noise_set}"
    with progress(total, "tok", description, unit_scale=True, disable=not job.ranks.first) as bar:
        for turn in range(0, len(todo), job.ranks.world):
            in_turn = todo[turn : turn + job.ranks.world]
            mine = in_turn[job.ranks.rank] if job.ranks.rank < len(in_turn) else range(0)
            idle = 0 if job.ranks.world == 1 else CHUNK - len(mine)
            fillers = [0] * idle  # scored and thrown away: ranks must make the same forward passes
            scored = score_pairs(job, [*mine, *fillers], noise_set)
            if scored is None:
                return False
            if mine:
                reference.write_chunk(paths[mine], job.packed, mine, *scored)
            bar.update(sum(int(tokens[chunk].sum()) for chunk in in_turn))

    # 3. Put the chunks together
    dist.barrier()
    if job.ranks.first:
        reference.assemble(job.folder, noise_set, paths.values())
    dist.barrier()
    return True


def score_all(job, first_set, wanted, model_name):
    """Score the noise sets from `first_set` on, and write meta.json after each. False if told to stop."""
    made_by = {
        "model_name_or_path": model_name,
        "device": str(job.ranks.device),
        "ranks": job.ranks.world,
        "torch": torch.__version__,
        "states_per_forward": job.states_per_forward,
    }
    for noise_set in range(first_set, job.noise_args.noise_sets):
        if not reference_set(job, noise_set):
            return False
        if job.ranks.first:
            counts = {"pairs": len(job.packed), "states": state_count(job.noise_args)}
            reference.write_meta(job.folder, wanted, noise_set + 1, counts | made_by)
    return True


def what_next(job, is_done, seconds, flags):
    """The lines that a job ends with. flags: the command line, which train_dpo.py accepts too."""
    if not is_done:
        return f"stopped; all scores but of {CHUNK} pairs at most are kept. To resume, run: {exits.command()}"
    states = f"{state_count(job.noise_args)} states per response, {job.states_per_forward} in a forward pass"
    done = f"{job.folder}: {len(job.packed)} pairs, {job.noise_args.noise_sets} noise set(s), {states}, {seconds:.0f} s"
    if os.environ.get("LAUNCH_COMMAND"):  # launch.sh trains next
        return done
    return f"{done}\nnext: {shlex.join(['python', 'train_dpo.py', *flags])}"


def main(argv=None):
    # 1. What is to be scored
    data_args, model_args, noise_args, train_args = read_arguments(argv)
    deepspeed_config.read_ds_config(model_args.deepspeed)  # a mistake in it is reported before hours of work
    if train_args.loss_type == "sft":
        print(NO_SCORES, flush=True)
        return 0
    prepared = packed, mask_id, wanted, folder = reference.prepare(data_args, model_args, noise_args)
    if reason := up_to_date(prepared, noise_args.noise_sets):
        print(reason, flush=True)
        return 0
    source = model_args.model_name_or_path

    # 2. One job at a time; another may have made some of it while this one waited
    ranks, have = engine.start(), 0
    if ranks.first:
        folder.mkdir(exist_ok=True)
        lock = files.wait_for(folder / ".lock", f"the same reference scores, {folder}")
        have = reference.sets_of(folder)
    have = ranks.broadcast(have)
    if have >= noise_args.noise_sets:
        return engine.leave()

    # 3. The model, and as many states in a forward pass as fit
    if ranks.first:
        if ranks.device.type == "cpu" and model_args.use_mixed_precision == "bf16":
            print("warning: bfloat16 is several times slower than float32 on a CPU; --use_mixed_precision no")
        print(f"{packed.folder}, {source} -> {folder}", flush=True)
    stop = stopping.Stop(ranks)
    model, began = load(model_args, ranks), time.time()
    size = model_args.states_per_forward
    if size == "auto":
        size = fit_reference(model, packed, noise_args, mask_id, ranks)

    # 4. The scores
    job = Job(model, packed, mask_id, folder, noise_args, size, ranks, stop)
    is_done = score_all(job, have, wanted, source)

    # 5. What to do next
    if ranks.first:
        lock.close()
        flags = sys.argv[1:] if argv is None else argv
        print(what_next(job, is_done, time.time() - began, flags), flush=True)
    return engine.leave()


if __name__ == "__main__":
    exits.run(main)

"""Reference scores: a model's stepwise denoising scores of packed pairs, to disk. The score and its segmented gradient are here.

    packed/ + model -> packed/ref-<key>/ (noise and reference scores; replayed by train_dpo.py)
    python data_prep.py --in examples/prefs.jsonl
    python score.py --data packed --use_mixed_precision no

S(x, y) = 1/R sum_r sum_s sum_{i: reveal_step_r[i] = s} log p(y_i | state before s, x)      (the guide's S_theta, rotated)

What is revealed is spread over all that is hidden, which has the same mean; scoring/noise.py has the estimators' weights.

B rows of a forward, L length, n response tokens, V vocabulary, T denoising steps, R trajectories, S states.
"""

import shutil
import sys
import time
import zipfile
import zlib

import config
from cli import exits
from cli.parser import names
from scoring import reference

UNUSED = names(config.DataArguments, config.TrainArguments) - {"data"} | {
    "end_token_id",
    "gradient_checkpointing",
    "lora_r",
    "lora_alpha",
    "lora_targets",
}  # by this script, of the arguments that it accepts


def read_arguments(argv=None):
    """One instance of each of config.GROUPS, checked as far as nothing needs to be loaded for it."""
    groups = config.parse(argv, __doc__, *config.GROUPS, hide=UNUSED)
    config.check_scoring(groups[1], groups[2])
    return groups


def nothing_to_score(groups):
    """Why there is nothing to score; None if there is something."""
    data_args, model_args, noise_args, train_args = groups
    if train_args.loss_type == "sft":
        return "loss_type sft needs no reference scores"
    prepared = reference.prepare(data_args, model_args, noise_args)
    noise_sets = reference.sets_of(prepared.folder)
    if noise_sets < noise_args.noise_sets:
        return None
    return f"{prepared.folder}: {len(prepared.packed)} pairs, {noise_sets} noise set(s), up to date"


def early():
    """Read the arguments; end the process if the scores are there already."""
    exits.end_if(nothing_to_score(read_arguments()))


if __name__ == "__main__":
    exits.early(early)  # answers --help, mistakes and "up to date" before the imports below, which take seconds

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import files
from files import InputError
from preferences.packed import longest
from scoring.recipe import SAME, draw, replay, state_count
from scoring.reference import sets_of
from scoring.states import backward_passes, response_states, sizes
from training import deepspeed_config, engine, memory, stopping
from training.streaming import load

CHUNK = 8  # pairs per chunk of the reference job: what a kill can lose, per rank


def weighted_logps(model, states, rows, device):
    """sum(weight * log p(target | input)) of each of `rows`: (B,) float32, in one forward with the head at scored tokens."""
    inputs, targets, weight = (array[rows] for array in states[:3])  # (B, L)
    positions = np.flatnonzero(weight)
    if not len(positions):
        positions = np.zeros(1, np.int64)  # weight 0: a forward for the other ranks' sake
    send = lambda array: engine.send(array, device)  # noqa: E731
    where = send(positions)
    logps = model(input_ids=send(inputs), positions=where, targets=send(targets.ravel()[positions]))  # (N,) float32
    grid = torch.zeros(inputs.size, dtype=torch.float32, device=device)  # no atomics: the same sum at every run
    return grid.index_put((where,), logps * send(weight.ravel()[positions])).view(len(inputs), -1).sum(-1)


def state_scores(model, states, states_per_forward, device):
    """Per-state scores (S,) float32, `states_per_forward` rows at a time; a graph is kept if gradients are enabled."""
    parts = torch.zeros(len(states.inputs), dtype=torch.float32, device=device)
    for rows in states.segments(states_per_forward):
        parts = parts.index_put((engine.send(rows, device),), weighted_logps(model, states, rows, device))
    return parts


def diffusion_score(model, prompt, response, masked, weight, mask_id, states_per_forward=4, device="cpu"):
    """The stepwise denoising score of one response, per state.

    prompt (P,), response (n,) ids; masked (S, n) bool and weight (S, n) as diffusion.state_masks and
    state_weights make them. Returns (S,) float32; their sum is S(x, y). Differentiable.
    """
    return state_scores(model, response_states(prompt, response, masked, weight, mask_id), states_per_forward, device)


def score_and_backward(model, responses, objective, states_per_forward, device, backward):
    """The gradient of objective([S(response) ...]) at constant memory in the number of states.

    objective: list of scalar scores -> scalar loss. backward(loss): adds d loss / d weights to the gradient. When every
    response fits one forward, one joint backward; else the scores are taken without a graph, the loss's derivative by
    each score is one number, and each segment's score times that number is sent backward by itself (the chain rule).
    Exact, but where States.graph leaves states out of the gradient: then unbiased, with the exact number.
    Returns the loss and each response's per-state scores, detached, on the device: nothing here waits for it.
    """
    counts, carrying = zip(*((len(states.inputs), len((states.graph or states).inputs)) for states in responses))
    if backward_passes(counts, carrying, states_per_forward) == 1:
        scores = [state_scores(model, states, states_per_forward, device) for states in responses]
        loss = objective([score.sum() for score in scores])
        backward(loss)
        return loss.detach(), [score.detach() for score in scores]
    with torch.no_grad():
        scores = [state_scores(model, states, states_per_forward, device) for states in responses]
    totals = [score.sum().requires_grad_() for score in scores]
    loss = objective(totals)
    for states, slope in zip(responses, torch.autograd.grad(loss, totals)):
        states = states.graph or states
        for rows in states.segments(states_per_forward):
            backward(slope * weighted_logps(model, states, rows, device).sum())
    return loss.detach(), scores


def fit_reference(model, packed, noise_args, mask_id, ranks):
    """states_per_forward of the reference job, tried on the longest response."""
    index, side = longest(packed)
    states = replay(
        packed[index][0], packed[index][1 + side], draw(packed, index, side, noise_args, 0), noise_args, mask_id
    )
    trial = lambda size: state_scores(model, states.first(size), size, ranks.device)  # noqa: E731
    return memory.grow(sizes(state_count(noise_args)), lambda size: size, trial, ranks)[0]


def score_chunk(model, packed, pairs, noise_args, noise_set, mask_id, states_per_forward, device, stop):
    """Noise and scores of `pairs`: bits uint8 (their response tokens, ceil(S/8)), scores float32 (pairs, 2, S); None if told to stop."""
    bits, scores = [], []
    for index in pairs:
        prompt, *responses = packed[index]
        for side, response in enumerate(responses):
            masked = draw(packed, index, side, noise_args, noise_set)
            states = replay(prompt, response, masked, noise_args, mask_id)
            scores.append(state_scores(model, states, states_per_forward, device).cpu().numpy())
            bits.append(reference.pack_masks(masked))
        if not np.isfinite(scores[-2:]).all():
            raise InputError(
                f"{packed.folder}: the reference score of pair {index} is not finite; the model is broken "
                "or its numbers overflow (try --use_mixed_precision no)",
                local=True,
            )
        if stop.asked():
            return None
    return np.concatenate(bits), np.stack(scores).reshape(len(pairs), 2, -1)


def reference_set(model, packed, folder, noise_args, noise_set, mask_id, states_per_forward, ranks, stop):
    """Score every pair under one noise set: chunks dealt over the ranks, each renamed into place, assembled at the end.
    False if told to stop."""
    work = folder / f"chunks-{noise_set}"
    work.mkdir(parents=True, exist_ok=True)
    names = {
        first: work / f"{first:09d}-{min(first + CHUNK, len(packed)):09d}.npz" for first in range(0, len(packed), CHUNK)
    }
    todo = ranks.broadcast([first for first, path in names.items() if not readable(path)])
    S = state_count(noise_args)
    lengths = np.diff(packed.bounds, axis=1)  # (pairs, 3)
    cost = S * (2 * lengths[:, 0] + lengths[:, 1] + lengths[:, 2])  # tokens through the model, per pair
    bar = tqdm(
        total=sum(int(cost[first : first + CHUNK].sum()) for first in todo),
        unit="tok",
        unit_scale=True,
        desc=f"reference scores, noise set {noise_set}",
        disable=not ranks.first,
        mininterval=1 if sys.stderr.isatty() else 30,
    )  # a log file gets a line now and then
    for turn in range(0, len(todo), ranks.world):
        mine = todo[turn + ranks.rank : turn + ranks.rank + 1]
        pairs = list(range(mine[0], min(mine[0] + CHUNK, len(packed)))) if mine else []
        idle = (
            [0] * (CHUNK - len(pairs)) if ranks.world > 1 else []
        )  # scored and thrown away: equal forwards on every rank
        did = score_chunk(
            model, packed, pairs + idle, noise_args, noise_set, mask_id, states_per_forward, ranks.device, stop
        )
        if did is None:
            bar.close()
            return False
        bits, scores = did
        if mine:
            kept = (packed.noise_bounds[pairs, 2] - packed.noise_bounds[pairs, 0]).sum()
            with files.replacing(names[mine[0]], "wb") as file:
                np.savez(file, noise=bits[:kept], scores=scores[: len(pairs)])
        bar.update(sum(int(cost[first : first + CHUNK].sum()) for first in todo[turn : turn + ranks.world]))
    bar.close()
    dist.barrier()
    if ranks.first:
        chunks = [np.load(path, allow_pickle=False) for path in names.values()]
        files.write_array(folder / f"noise-{noise_set}.npy", np.concatenate([chunk["noise"] for chunk in chunks]))
        files.write_array(folder / f"ref_scores-{noise_set}.npy", np.concatenate([chunk["scores"] for chunk in chunks]))
        shutil.rmtree(work)
    dist.barrier()
    return True


def readable(path):
    try:
        with np.load(path, allow_pickle=False) as chunk:
            return (
                chunk["noise"].dtype == np.uint8 and chunk["scores"].dtype == np.float32
            )  # read whole: its checksums are compared
    except (KeyError, OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):  # EOFError: an empty file
        return False


def main(argv=None):
    groups = data_args, model_args, noise_args, _ = read_arguments(argv)
    deepspeed_config.read_ds_config(model_args.deepspeed)  # what is wrong in it is said before hours of work
    if reason := nothing_to_score(groups):
        print(reason, flush=True)
        return 0
    packed, mask_id, wanted, folder = reference.prepare(data_args, model_args, noise_args)
    ranks, have = engine.start(), 0
    if ranks.first:
        folder.mkdir(exist_ok=True)
        lock = files.wait_for(folder / ".lock", f"the same reference scores, {folder}")  # noqa: F841  ours until this process ends
        have = sets_of(folder)
    have = ranks.broadcast(have)
    if have >= noise_args.noise_sets:  # whom we waited for has made them
        return engine.leave()
    if ranks.first:
        if ranks.device.type == "cpu" and model_args.use_mixed_precision == "bf16":
            print(
                "warning: bfloat16 is several times slower than float32 on a CPU; --use_mixed_precision no", flush=True
            )
        print(f"{packed.folder}, {model_args.model_name_or_path} -> {folder}", flush=True)
    stop = stopping.Stop(ranks)
    model, began = load(model_args, ranks), time.time()
    with torch.no_grad():
        if model_args.states_per_forward == "auto":
            model_args.states_per_forward = fit_reference(model, packed, noise_args, mask_id, ranks)
        for noise_set in range(have, noise_args.noise_sets):
            if not reference_set(
                model, packed, folder, noise_args, noise_set, mask_id, model_args.states_per_forward, ranks, stop
            ):
                if ranks.first:
                    print(
                        f"stopped; what is scored is kept (but for {CHUNK} pairs at most); go on with: {exits.command()}",
                        flush=True,
                    )
                return engine.leave()
            if ranks.first:
                names = [f"{kind}-{k}.npy" for kind in ("noise", "ref_scores") for k in range(noise_set + 1)]
                files.write_json(
                    folder / "meta.json",
                    files.sealed(
                        {
                            "depends_on": wanted,
                            "noise_sets": noise_set + 1,
                            "files": {name: files.file_sha256(folder / name) for name in names},
                            "pairs": len(packed),
                            "states": state_count(noise_args),
                            "model_name_or_path": model_args.model_name_or_path,
                            "device": str(ranks.device),
                            "ranks": ranks.world,
                            "torch": torch.__version__,
                            "states_per_forward": model_args.states_per_forward,
                        }
                    ),
                )
    if ranks.first:
        print(
            f"{folder}: {len(packed)} pairs, {noise_args.noise_sets} noise set(s), {state_count(noise_args)} states a response, "
            f"{model_args.states_per_forward} a forward, {time.time() - began:.0f} s\n"
            f"next: python train_dpo.py --data {packed.folder} {config.flags(SAME, model_args, noise_args)}",
            flush=True,
        )
    return engine.leave()


if __name__ == "__main__":
    exits.run(main)

"""Reference scores: a model's stepwise denoising scores of packed pairs, to disk. The score and its segmented gradient are here.

    packed/ + model -> packed/ref-<key>/ (noise and reference scores; replayed by train_dpo.py)
    python data_prep.py --in examples/prefs.jsonl
    python score.py --data packed --use_mixed_precision no
    python score.py --data packed --use_mixed_precision no --calibrate --calibrate_pairs 2 --calibrate_draws 2

S(x, y) = 1/R sum_r sum_s sum_{i: reveal_step_r[i] = s} log p(y_i | state before s, x)      (the guide's S_theta, rotated)

What is revealed is spread over all that is hidden, which has the same mean; diffusion.py has the estimators' weights.

B rows of a forward, L length, n response tokens, V vocabulary, T denoising steps, R trajectories, S states.
"""
import math
import shutil
import sys
import time
import zipfile
import zlib
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import checkpoint
import config
import diffusion
import engine
import families
import packed as disk
import stopping
from packed import InputError

SAME = ("model_name_or_path", "shift_logits", "load_in_4bit", "use_mixed_precision", "estimator", "diffusion_steps", "trajectories",
        "order", "block_length", "noise_sets", "noise_seed")  # of the arguments: what reference scores are made with
UNUSED = config.names(config.DataArguments, config.TrainArguments) - {"data"} | {
    "end_token_id", "gradient_checkpointing", "lora_r", "lora_alpha", "lora_targets"}  # by this script, of the arguments that it accepts
CHUNK = 8  # pairs per chunk of the reference job: what a kill can lose, per rank


class States(NamedTuple):
    """Rows to be scored together: inputs and targets (S, L) int64, weight (S, L) float32, 0 where nothing is scored.

    graph: the rows that carry the gradient, their weights made up for those left out; None: all of them.
    """

    inputs: np.ndarray
    targets: np.ndarray
    weight: np.ndarray
    graph: "States | None" = None

    def first(self, rows):
        """The first `rows` rows, of the graph's too."""
        return States(self.inputs[:rows], self.targets[:rows], self.weight[:rows], self.graph and self.graph.first(rows))

    def carrying(self, factor, k):
        """With `factor` (S,) of diffusion.gradient_states on the gradient: always k rows, so that ranks make the same passes."""
        rows = np.argsort(factor == 0, kind="stable")[:k]
        return self._replace(graph=States(self.inputs[rows], self.targets[rows], self.weight[rows] * factor[rows, None]))

    def segments(self, states_per_forward):
        """Row indices, one array a forward: always ceil(S / states_per_forward) of them, whatever the response.

        States that reveal nothing are left out, but no segment is empty: ranks must make the same forwards.
        """
        live = self.weight.any(axis=1)
        for first in range(0, len(self.inputs), states_per_forward):
            rows = np.arange(first, min(first + states_per_forward, len(self.inputs)))
            yield rows[live[rows]] if live[rows].any() else rows[:1]


def response_states(prompt, response, masked, weight, mask_id):
    """States of one response: prompt (P,) and response (n,) ids, masked (S, n) bool, weight (S, n). The prompt is never masked."""
    S, start = len(masked), len(prompt)
    targets = np.tile(np.concatenate((prompt, response)).astype(np.int64), (S, 1))  # (S, L)
    inputs = targets.copy()
    inputs[:, start:][masked] = mask_id
    full = np.zeros(targets.shape, np.float32)
    full[:, start:] = weight
    return States(inputs, targets, full)


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


def backward_passes(counts, carrying, states_per_forward):
    """Backward passes that score_and_backward makes for responses of `counts` states, of which `carrying` have a graph."""
    segments = [math.ceil(count / states_per_forward) for count in carrying]
    return 1 if carrying == counts and max(segments) == 1 else sum(segments)


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


def sizes(count):
    """Numbers of states a forward that are worth a trial: 1, 2, 4 ..., the half, all `count`."""
    return sorted({2**power for power in range(count.bit_length()) if 2**power < count} | {math.ceil(count / 2), count})


def longest(packed):
    """(index, side) of the longest prompt and response; side 0 is chosen, 1 rejected."""
    lengths = np.diff(packed.bounds, axis=1)  # (pairs, 3)
    return divmod(int((lengths[:, :1] + lengths[:, 1:]).argmax()), 2)


def fit_reference(model, packed, noise_args, mask_id, ranks):
    """states_per_forward of the reference job, tried on the longest response."""
    index, side = longest(packed)
    states = replay(packed[index][0], packed[index][1 + side], draw(packed, index, side, noise_args, 0), noise_args, mask_id)
    trial = lambda size: state_scores(model, states.first(size), size, ranks.device)  # noqa: E731
    return engine.grow(sizes(state_count(noise_args)), lambda size: size, trial, ranks)[0]


def depends_on(packed, model_args, noise_args):
    """What reference scores depend on: they are replayed only in a run that says the same."""
    model_config = checkpoint.load_config(model_args.model_name_or_path, model_args.trust_remote_code)
    return {"data": packed.meta["fingerprint"], "model": checkpoint.model_fingerprint(model_args.model_name_or_path),
            "tokenizer": packed.meta["tokenizer"], "estimator": noise_args.estimator, "order": noise_args.order,
            "block_length": block_length(noise_args), "diffusion_steps": noise_args.diffusion_steps,
            "trajectories": noise_args.trajectories, "noise_seed": noise_args.noise_seed,
            "mask_token_id": packed.meta["mask_token_id"], "shift_logits": families.shifted(model_config, model_args.shift_logits),
            "dtype": model_args.use_mixed_precision, "load_in_4bit": model_args.load_in_4bit}


def state_count(noise_args):
    return diffusion.state_count(noise_args.estimator, noise_args.diffusion_steps, noise_args.trajectories)


def block_length(noise_args):
    """None for random order, whose noise no block length changes."""
    return noise_args.block_length if noise_args.order == "blocks" else None


def check_numbers(model_args, noise_args):
    """Refuse numbers without a meaning."""
    for group, names in ((noise_args, ("diffusion_steps", "trajectories", "noise_sets", "block_length")), (model_args, ("states_per_forward",))):
        for name in names:
            if (value := getattr(group, name)) != "auto" and value < 1:
                raise InputError(f"--{name} is {value}, expected at least 1")
    if model_args.lora_r < 0:
        raise InputError(f"--lora_r is {model_args.lora_r}, expected 0 (every weight is trained) or more")


def check(packed, model_args, noise_args):
    """Fill in what is auto; refuse arguments that make no score, and arrays that another tokenizer made. Returns the mask id."""
    model_args.model_name_or_path = model_args.model_name_or_path or packed.meta["model_name_or_path"]
    if noise_args.estimator == "auto" and noise_args.diffusion_steps != "auto":  # else the calibration says it, too
        noise_args.estimator = "stepwise" if noise_args.order == "blocks" else "spread"
    if noise_args.order == "blocks" and noise_args.diffusion_steps == "auto":
        raise InputError("--diffusion_steps auto is measured in random order; give --order blocks a number")
    if noise_args.order == "blocks" and noise_args.estimator not in ("stepwise", "auto"):
        raise InputError(f"--estimator {noise_args.estimator} counts on random order; --order blocks goes with stepwise")
    check_numbers(model_args, noise_args)
    tokenizer = checkpoint.load_tokenizer(model_args.model_name_or_path, model_args.trust_remote_code)
    if checkpoint.tokenizer_fingerprint(tokenizer) != packed.meta["tokenizer"]:
        raise InputError(f"{packed.folder}: packed with another tokenizer than {model_args.model_name_or_path}'s; run: "
                         f"{packed.remake} --model_name_or_path {model_args.model_name_or_path}")
    mask_id = packed.meta["mask_token_id"]  # data_prep.py settled it
    if model_args.mask_token_id not in (None, mask_id):
        raise InputError(f"{packed.folder}: packed with the mask {mask_id}, not --mask_token_id {model_args.mask_token_id}; "
                         "give that flag to data_prep.py, too")
    return mask_id


def draw(packed, index, side, noise_args, noise_set):
    """masked (S, n) of one response of a pair; side 0 is chosen, 1 rejected."""
    name = diffusion.side_of(noise_args.estimator, side)
    rng = diffusion.generator(noise_args.noise_seed, packed.content(index), name, noise_set)
    n, T = len(packed[index][1 + side]), noise_args.diffusion_steps
    return diffusion.state_masks(n, noise_args.estimator, T, noise_args.trajectories, rng, block_length(noise_args))


def replay(prompt, response, masked, noise_args, mask_id):
    """The States of stored masks (S, n)."""
    weight = diffusion.state_weights(masked, noise_args.estimator, noise_args.diffusion_steps, noise_args.trajectories)
    return response_states(prompt, response, masked, weight, mask_id)


def score_chunk(model, packed, pairs, noise_args, noise_set, mask_id, states_per_forward, device, stop):
    """Noise and scores of `pairs`: bits uint8 (their response tokens, ceil(S/8)), scores float32 (pairs, 2, S); None if told to stop."""
    bits, scores = [], []
    for index in pairs:
        prompt, *responses = packed[index]
        for side, response in enumerate(responses):
            masked = draw(packed, index, side, noise_args, noise_set)
            states = replay(prompt, response, masked, noise_args, mask_id)
            scores.append(state_scores(model, states, states_per_forward, device).cpu().numpy())
            bits.append(disk.pack_masks(masked))
        if not np.isfinite(scores[-2:]).all():
            raise InputError(f"{packed.folder}: the reference score of pair {index} is not finite; the model is broken "
                             "or its numbers overflow (try --use_mixed_precision no)", local=True)
        if stop.asked():
            return None
    return np.concatenate(bits), np.stack(scores).reshape(len(pairs), 2, -1)


def reference_set(model, packed, folder, noise_args, noise_set, mask_id, states_per_forward, ranks, stop):
    """Score every pair under one noise set: chunks dealt over the ranks, each renamed into place, assembled at the end.
    False if told to stop."""
    work = folder / f"chunks-{noise_set}"
    work.mkdir(parents=True, exist_ok=True)
    names = {first: work / f"{first:09d}-{min(first + CHUNK, len(packed)):09d}.npz" for first in range(0, len(packed), CHUNK)}
    todo = ranks.broadcast([first for first, path in names.items() if not readable(path)])
    S = state_count(noise_args)
    lengths = np.diff(packed.bounds, axis=1)  # (pairs, 3)
    cost = S * (2 * lengths[:, 0] + lengths[:, 1] + lengths[:, 2])  # tokens through the model, per pair
    bar = tqdm(total=sum(int(cost[first:first + CHUNK].sum()) for first in todo), unit="tok", unit_scale=True,
               desc=f"reference scores, noise set {noise_set}", disable=not ranks.first,
               mininterval=1 if sys.stderr.isatty() else 30)  # a log file gets a line now and then
    for turn in range(0, len(todo), ranks.world):
        mine = todo[turn + ranks.rank:turn + ranks.rank + 1]
        pairs = list(range(mine[0], min(mine[0] + CHUNK, len(packed)))) if mine else []
        idle = [0] * (CHUNK - len(pairs)) if ranks.world > 1 else []  # scored and thrown away: equal forwards on every rank
        did = score_chunk(model, packed, pairs + idle, noise_args, noise_set, mask_id, states_per_forward, ranks.device, stop)
        if did is None:
            bar.close()
            return False
        bits, scores = did
        if mine:
            kept = (packed.noise_bounds[pairs, 2] - packed.noise_bounds[pairs, 0]).sum()
            with disk.replacing(names[mine[0]], "wb") as file:
                np.savez(file, noise=bits[:kept], scores=scores[:len(pairs)])
        bar.update(sum(int(cost[first:first + CHUNK].sum()) for first in todo[turn:turn + ranks.world]))
    bar.close()
    dist.barrier()
    if ranks.first:
        chunks = [np.load(path, allow_pickle=False) for path in names.values()]
        disk.write_array(folder / f"noise-{noise_set}.npy", np.concatenate([chunk["noise"] for chunk in chunks]))
        disk.write_array(folder / f"ref_scores-{noise_set}.npy", np.concatenate([chunk["scores"] for chunk in chunks]))
        shutil.rmtree(work)
    dist.barrier()
    return True


def sets_of(folder):
    """Noise sets that are scored whole."""
    return disk.read_sealed(folder / "meta.json", "this command, that folder removed")["noise_sets"] if (folder / "meta.json").exists() else 0


def readable(path):
    try:
        with np.load(path, allow_pickle=False) as chunk:
            return chunk["noise"].dtype == np.uint8 and chunk["scores"].dtype == np.float32  # read whole: its checksums are compared
    except (KeyError, OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):  # EOFError: an empty file
        return False


def load(model_args, ranks, name=None):
    """The model of the arguments (or another, `name`) ready to be scored with: streamed under ZeRO-3, else plain."""
    ds_config = engine.scoring_config(engine.read_ds_config(model_args.deepspeed), model_args)
    model = checkpoint.load_model(name or model_args.model_name_or_path, checkpoint.DTYPES[model_args.use_mixed_precision], ds_config,
                                  model_args.trust_remote_code, model_args.shift_logits, model_args.load_in_4bit)
    streamed = ds_config["zero_optimization"]["stage"] == 3  # else the model fits: no engine is needed
    return engine.build(model, ds_config) if streamed else model.to(ranks.device)


def main(argv=None):
    *groups, args = config.parse(argv, __doc__, *config.GROUPS, config.CalibrateArguments, hide=UNUSED)
    data_args, model_args, noise_args, train_args = groups
    engine.read_ds_config(model_args.deepspeed)  # what is wrong in it is said before hours of work
    if train_args.loss_type == "sft" and not args.calibrate:
        print("loss_type sft needs no reference scores", flush=True)
        return 0
    packed = disk.Packed(data_args.data)
    packed.need_pairs()
    mask_id = check(packed, model_args, noise_args)
    ranks = None
    if args.calibrate or noise_args.diffusion_steps == "auto":
        import calibrate  # it imports this file
        if args.calibrate or not calibrate.place(packed, model_args).exists():
            ranks = engine.start()
            calibrate.run(packed, model_args, noise_args, args, mask_id, ranks)
        if args.calibrate:
            return leave()
        calibrate.settle(packed, model_args, noise_args)
    wanted = depends_on(packed, model_args, noise_args)
    folder = packed.folder / f"ref-{disk.fingerprint(wanted)}"
    have = sets_of(folder)
    if have >= noise_args.noise_sets:
        print(f"{folder}: {len(packed)} pairs, {have} noise set(s), up to date", flush=True)
        return leave()
    ranks = ranks or engine.start()
    if ranks.first:
        folder.mkdir(exist_ok=True)
        lock = disk.wait_for(folder / ".lock", f"the same reference scores, {folder}")  # noqa: F841  ours until this process ends
        have = sets_of(folder)
    have = ranks.broadcast(have)
    if have >= noise_args.noise_sets:  # whom we waited for has made them
        return leave()
    if ranks.first:
        if ranks.device.type == "cpu" and model_args.use_mixed_precision == "bf16":
            print("warning: bfloat16 is several times slower than float32 on a CPU; --use_mixed_precision no", flush=True)
        print(f"{packed.folder}, {model_args.model_name_or_path} -> {folder}", flush=True)
    stop = stopping.Stop(ranks)
    model, began = load(model_args, ranks), time.time()
    with torch.no_grad():
        if model_args.states_per_forward == "auto":
            model_args.states_per_forward = fit_reference(model, packed, noise_args, mask_id, ranks)
        for noise_set in range(have, noise_args.noise_sets):
            if not reference_set(model, packed, folder, noise_args, noise_set, mask_id, model_args.states_per_forward, ranks, stop):
                if ranks.first:
                    print(f"stopped; what is scored is kept (but for {CHUNK} pairs at most); go on with: {config.command()}", flush=True)
                return leave()
            if ranks.first:
                names = [f"{kind}-{k}.npy" for kind in ("noise", "ref_scores") for k in range(noise_set + 1)]
                disk.write_json(folder / "meta.json", disk.sealed({
                    "depends_on": wanted, "noise_sets": noise_set + 1, "files": {name: disk.file_sha256(folder / name) for name in names}, "pairs": len(packed), "states": state_count(noise_args),
                    "model_name_or_path": model_args.model_name_or_path, "device": str(ranks.device),
                    "ranks": ranks.world, "torch": torch.__version__, "states_per_forward": model_args.states_per_forward}))
    if ranks.first:
        print(f"{folder}: {len(packed)} pairs, {noise_args.noise_sets} noise set(s), {state_count(noise_args)} states a response, "
              f"{model_args.states_per_forward} a forward, {time.time() - began:.0f} s\n"
              f"next: python train_dpo.py --data {packed.folder} {config.flags(SAME, model_args, noise_args)}", flush=True)
    return leave()


def leave():
    """Part from the other ranks, if we have met."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    config.run(main)

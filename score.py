"""The score, its gradient, and the reference job: a model's stepwise denoising scores of packed pairs, to disk.

    packed/ + model -> packed/ref-<key>/ (noise and reference scores; replayed by train_dpo.py)
    python data_prep.py --in examples/prefs.jsonl
    python score.py --data packed --use_mixed_precision no

S(x, y) = sum over states s and the tokens i that s hides of weight[s, i] * log p(y_i | s, x)   (docs/method.md)

scoring/noise.py has the states and weights of each estimator.

B rows of a forward pass, N tokens of all of them, M of these scored, L length, n response tokens, T denoising steps,
R trajectories, S states.
"""

import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import config
import losses
from cli import exits, out_of_memory
from cli.parser import names
from scoring import reference

UNUSED = {"end_token_id", "gradient_checkpointing", "lora_r", "lora_alpha", "lora_targets"}
UNUSED |= names(config.DataArguments, config.TrainArguments) - {"data"}


def read_arguments(argv=None):
    """One instance of each of config.GROUPS, checked as far as nothing needs to be loaded for it."""
    groups = config.parse(argv, __doc__, *config.GROUPS, hide=UNUSED)
    config.check_scoring(groups[1], groups[2])
    return groups


def nothing_to_score(train_args):
    """What to say, instead of scoring, of a loss without a reference; else None."""
    if losses.has_reference(train_args.loss_type):
        return None
    return f"loss_type {train_args.loss_type} needs no reference scores"


def up_to_date(prepared, noise_sets):
    """What to say if all noise sets are scored; else None."""
    have = reference.sets_of(prepared.folder)
    if have < noise_sets:
        return None
    return f"{prepared.folder}: {len(prepared.packed)} pairs, {have} noise set(s), up to date"


def early():
    """Read the arguments; end the process if there is nothing to score."""
    data_args, model_args, noise_args, train_args = read_arguments()
    exits.end_if(nothing_to_score(train_args))
    exits.end_if(up_to_date(reference.prepare(data_args, model_args, noise_args), noise_args.noise_sets))


if __name__ == "__main__":
    exits.early(early)  # answers --help, mistakes and "up to date" before the imports below, which take seconds

import numpy as np
import torch
import torch.distributed as dist

import files
from cli.progress import progress
from files import InputError
from models import families
from models.architecture import bare
from models.attention import BlockRows, Rows
from preferences.packed import Packed
from scoring import passes
from scoring.recipe import draw, replay, state_count
from scoring.states import all_masked, join, response_states, tokens_of
from scoring.window import Scores, Window
from training import deepspeed_config, engine, fetches, memory, stopping
from training.streaming import load

CHUNK = 8  # pairs that the reference job writes at once: what a kill can lose, per rank


# --- the score and its gradient ---------------------------------------------------------------------------


def joins_rows(model):
    """Whether a model takes rows of several lengths in one forward pass."""
    return getattr(bare(model), "joins_rows", False)


def row_scores(model, rows, device):
    """sum over a state's tokens of weight * log p(target | input), for each state of `rows` [(States, indices)].

    Returns (states,) float32. One forward pass; the head computes log-probabilities at scored tokens alone.
    """
    joined = join(rows)
    states, widest = int(joined.state[-1]) + 1, int(joined.place.max()) + 1
    ids, apart = joined.inputs[None], {}  # (1, N)
    if blocks := rows and rows[0][0].blocks:
        apart = {"rows": BlockRows(joined.rows, blocks, device)}
    elif len(set(joined.rows)) > 1:
        apart = {"rows": Rows(joined.rows, device)}
    else:
        ids = joined.inputs.reshape(len(joined.rows), -1)  # (B, L)
    positions, targets = engine.send(joined.positions, device), engine.send(joined.targets, device)
    ids = engine.send(ids, fetches.ids_device(model, device))
    logps = model(input_ids=ids, positions=positions, targets=targets, **apart)  # (M,)
    logps = logps * engine.send(joined.weight, device)  # float32
    grid = torch.zeros(states * widest, dtype=torch.float32, device=device)
    places = engine.send(joined.state * widest + joined.place, device)
    grid = grid.index_put((places,), logps)  # without atomic additions: the same sum in every run
    return grid.view(states, widest).sum(-1)


def nothing():
    """The default of after_pass: nothing is done after a forward pass."""


def state_scores(model, responses, tokens_per_forward, ranks, after_pass=nothing):
    """The score of each state of each response: a list of (S,) float32. With gradients enabled they have a graph.

    responses: a list of States, whose rows share forward passes. Every rank must call this, with [] if it has none.
    after_pass() is called after each forward pass.
    """
    rows = [(response, row) for response, states in enumerate(responses) for row in states.rows(tokens_per_forward)]
    lengths = [responses[response].length(row) for response, row in rows]
    planned = passes.pick(rows, passes.fill(lengths, tokens_per_forward, not joins_rows(model)))
    scores = Scores(responses, ranks.device)
    for each in passes.filled_up(planned, *ranks.most(len(planned))):
        states = [(responses[response], row) for response, row in each]
        scores.keep(each, row_scores(model, states, ranks.device))
        after_pass()
    return scores.by_response()


def diffusion_score(model, prompt, response, masked, weight, masking, tokens_per_forward=4096, device="cpu"):
    """The stepwise denoising score of one response, per state: (S,) float32, whose sum is S(x, y). Differentiable.

    prompt (P,), response (n,): token ids. masked (S, n) bool, weight (S, n): see state_masks and state_weights of
    scoring/noise.py. masking: families.Masking.
    """
    states = response_states(prompt, response, masked, weight, *masking)
    [scores] = state_scores(model, [states], tokens_per_forward, engine.Ranks(0, 1, torch.device(device)))
    return scores


def score_and_backward(model, pieces, tokens_per_forward, ranks, backward, after_pass=nothing):
    """Add the gradient of the sum of scale * loss over `pieces`, in passes of at most `tokens_per_forward` tokens.

    pieces: [Piece], all with slopes or none. backward(loss, is_last): adds d loss / d weights to the gradient.
    after_pass() is called between passes. Returns [(loss (), [(S,) of each response])] of the pieces, detached and on
    the device: the host does not wait for a GPU here.

    By the chain rule d loss / d weights is the sum over responses of d loss / d S times d S / d weights, and S is a sum
    over states: the gradient is exact however the rows are divided, and memory does not grow with their number. Where
    only some states carry it (--backprop_steps) it is unbiased.
    """
    # 1. The passes, of which every rank makes the same number
    window = Window(pieces, ranks.device)
    planned = window.divide(tokens_per_forward, is_alike=not joins_rows(model))
    planned = planned.filled_up(*ranks.most(*planned.counts))
    left = planned.counts[1]

    def go_back(loss):
        nonlocal left
        left -= 1
        backward(loss, left == 0)
        if left:
            after_pass()

    # 2. Pieces that are too large for one graph: their scores, and so the slopes of their losses
    with torch.no_grad():
        for rows in planned.without_graph:
            window.scores.keep(rows, row_scores(model, window.states(rows), ranks.device))
            after_pass()
    if planned.with_graph:
        window.find_slopes()

    # 3. Their rows again, with a graph, times those slopes
    for rows in planned.with_graph:
        scores = row_scores(model, window.graph_states(rows), ranks.device)
        go_back(window.loss_of_rows(rows, scores))

    # 4. Whole pieces: one graph, one backward pass
    for parts in planned.whole:
        rows = [row for piece in parts for row in window.rows[piece]]
        scores = row_scores(model, window.states(rows), ranks.device)
        go_back(window.loss_of_pieces(parts, rows, scores))
    return window.results()


# --- the reference job ------------------------------------------------------------------------------------


class Job(NamedTuple):
    """What one rank of the reference job works with."""

    model: Any
    packed: Packed
    masking: families.Masking
    folder: Path  # packed/ref-<key>
    noise_args: config.NoiseArguments
    tokens_per_forward: int
    ranks: engine.Ranks
    stop: stopping.Stop


def tokens_of_a_pass(model, packed, wanted, masking, ranks, has_graph=False):
    """`wanted`, the --tokens_per_forward; for auto, the most that fit, tried on the longest response, all masked.

    has_graph: each forward pass is followed by a backward pass.
    """
    states = all_masked(packed, masking)
    length = states.tokens

    def trial(tokens):
        with torch.set_grad_enabled(has_graph):
            scores = row_scores(model, [(states, (0,))] * (tokens // length), ranks.device)
        if has_graph:
            scores.sum().backward()

    if wanted == "auto":
        wanted = memory.largest_that_fits(length, max(length, passes.ENOUGH), trial, ranks).size
    out_of_memory.note_pass(wanted, length, ranks.device.type)
    return wanted


@torch.no_grad()
def score_pairs(job, pairs, noise_set):
    """Noise and scores of `pairs`; None if told to stop.

    Returns masks uint8 (their response tokens, ceil(S/8)) and scores float32 (pairs, 2, S).
    """
    masks, responses = [], []
    for index in pairs:
        prompt, *sides = job.packed[index]
        shared = min(map(len, sides))
        for side, response in enumerate(sides):
            masked = draw(job.packed, index, side, job.noise_args, noise_set, job.masking.blocks)
            masks.append(reference.pack_masks(masked))
            responses.append(replay(prompt, response, masked, job.noise_args, job.masking, shared))
    try:
        scores = state_scores(job.model, responses, job.tokens_per_forward, job.ranks, job.stop.check)
    except stopping.Stopped:
        return None
    if not pairs:
        return masks, scores
    scores = torch.stack(scores).view(len(pairs), 2, -1).cpu().numpy()
    if len(broken := np.flatnonzero(~np.isfinite(scores).all((1, 2)))):
        raise InputError(
            f"{job.packed.folder}: the reference score of pair {pairs[broken[0]]} is not finite; the model is broken "
            "or its numbers overflow (try --use_mixed_precision no)",
            local=True,
        )
    return np.concatenate(masks), scores


def reference_set(job, noise_set):
    """Score every pair under one noise set and write its two arrays. False if told to stop.

    Each rank scores a chunk of pairs at a time, which is written under a temporary name and renamed: a job that was
    killed resumes after its last complete chunk.
    """
    # 1. The chunks that are not on disk yet
    paths = reference.chunk_paths(job.folder, noise_set, len(job.packed), CHUNK)
    todo = job.ranks.broadcast([chunk for chunk, path in paths.items() if not reference.is_readable(path)])

    # 2. Score them, one chunk per rank at a time
    prompts, *responses = np.diff(job.packed.bounds, axis=1).T
    states = state_count(job.noise_args)
    tokens = sum(tokens_of(prompts, each, states, job.masking.blocks) for each in responses)  # (pairs,)
    total = sum(int(tokens[chunk].sum()) for chunk in todo)
    description = f"reference scores, noise set {noise_set}"
    with progress(total, "tok", description, unit_scale=True, disable=not job.ranks.first) as bar:
        for turn in range(0, len(todo), job.ranks.world):
            in_turn = todo[turn : turn + job.ranks.world]
            mine = in_turn[job.ranks.rank] if job.ranks.rank < len(in_turn) else range(0)
            scored = score_pairs(job, mine, noise_set)
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
        "tokens_per_forward": job.tokens_per_forward,
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
    states = f"{state_count(job.noise_args)} states per response, {job.tokens_per_forward} tokens in a forward pass"
    done = f"{job.folder}: {len(job.packed)} pairs, {job.noise_args.noise_sets} noise set(s), {states}, {seconds:.0f} s"
    if os.environ.get("LAUNCH_COMMAND"):  # launch.sh trains next
        return done
    loss = ["--loss_type", "kto"] if job.packed.task == "kto" and "--loss_type" not in flags else []
    return f"{done}\nnext: {shlex.join(['python', 'train_dpo.py', *loss, *flags])}"


def main(argv=None):
    # 1. What is to be scored
    data_args, model_args, noise_args, train_args = read_arguments(argv)
    deepspeed_config.read_ds_config(model_args.deepspeed)  # a mistake in it is reported before hours of work
    if reason := nothing_to_score(train_args):
        print(reason, flush=True)
        return 0
    prepared = packed, masking, wanted, folder = reference.prepare(data_args, model_args, noise_args)
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

    # 3. The model, and as many tokens in a forward pass as fit
    if ranks.first:
        if ranks.device.type == "cpu" and model_args.use_mixed_precision == "bf16":
            print("warning: bfloat16 is several times slower than float32 on a CPU; --use_mixed_precision no")
        print(f"{packed.folder}, {source} -> {folder}", flush=True)
    stop = stopping.Stop(ranks)
    model, began = load(model_args, ranks), time.time()
    tokens = tokens_of_a_pass(model, packed, model_args.tokens_per_forward, masking, ranks)

    # 4. The scores
    job = Job(model, packed, masking, folder, noise_args, tokens, ranks, stop)
    is_done = score_all(job, have, wanted, source)

    # 5. What to do next
    if ranks.first:
        lock.close()
        flags = sys.argv[1:] if argv is None else argv
        print(what_next(job, is_done, time.time() - began, flags), flush=True)
    return engine.leave()


if __name__ == "__main__":
    exits.run(main)

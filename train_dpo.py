"""Diffusion-DPO: align a masked diffusion language model with preferences, or train it on responses (SFT).

    packed/ + packed/ref-<key>/ + model -> runs/NAME/ (run.json, log.jsonl, checkpoints/, final/)
    python data_prep.py --in examples/prefs.jsonl
    python score.py --data packed --use_mixed_precision no
    python train_dpo.py --data packed --use_mixed_precision no --max_steps 5 --output_dir runs/example

L = -log sigmoid(beta * margin),  margin = (S(w) - S(l)) - (S_ref(w) - S_ref(l))   (Rafailov et al., arXiv 2305.18290)

The loop is here: train(), optimizer_step(), evaluate(). The loss is in losses.py, the score S and its exact
gradient in score.py, DeepSpeed's engine in training/engine.py. Policy and reference score the same masked states, so
that the first step has margin 0 and loss ln 2; a run in which they differ is refused.
"""

import functools
import itertools
import math
import shlex
import time
from typing import Any, NamedTuple

import config
import losses
from cli import exits, out_of_memory
from cli.parser import names
from training import runs

UNUSED = names(config.DataArguments) | {"end_token_id"}  # of the arguments that are accepted: --help leaves them out
UNUSED -= {"data", "max_length"}


def read_arguments(argv=None):
    """The config.Arguments, checked as far as nothing needs to be loaded for it."""
    given = config.Arguments(*config.parse(argv, __doc__, *config.GROUPS, hide=UNUSED))
    config.check_scoring(given.model, given.noise)
    config.check(given.train)
    return given


def early():
    """Read the arguments; end the process if the run is finished."""
    exits.end_if(runs.finished(read_arguments()))


if __name__ == "__main__":
    exits.early(early)  # answers --help, mistakes and a finished run before the imports below, which take seconds

import torch
import torch.distributed as dist

import plan
import score
from models import quantized
from reasoning import tasks
from scoring import recipe, reference
from scoring.judged import Judged
from scoring.objective import SFT, Preference, Stream, split
from training import deepspeed_config, engine, guard, nvme, resume, stopping, tracking
from training.policy import check_row_lengths, check_start, fit, longest_row, save_final, start_policy

FULL_PASSES = 8  # of an evaluation, between two looks at what is left to score


class Job(NamedTuple):
    """What every step needs. It does not change during a run."""

    args: config.TrainArguments
    policy: Any  # DeepSpeed's engine
    objective: Any
    stream: Stream  # the order of the data
    ranks: engine.Ranks
    stop: stopping.Stop
    tokens_per_forward: int
    pairs_per_step: int  # of all ranks
    steps: int  # of the run

    def scores(self, responses, after_pass=score.nothing):
        """The policy's scores of a list of States: [(S,) float32]. Every rank must call it."""
        return score.state_scores(self.policy, responses, self.tokens_per_forward, self.ranks, after_pass)


# --- the loop ---------------------------------------------------------------------------------------------


def train(job, record, run, held_out_pairs, progress):
    """Step, log, evaluate, save, until the last step. False if a signal stopped it; all is saved then.

    progress: how far the run is. It is updated so that it can be saved at any moment.
    """
    clock, skips, saved_step = record.clock, guard.Skips(job, run), progress.step
    saving = functools.partial(resume.saving_if_memory_runs_out, job, run, progress)
    try:
        if progress.step:
            finish_last_step(job, record, held_out_pairs, progress)
        for step in range(progress.step, job.steps):
            # 1. the step
            began, rate = time.time(), learning_rate(step, job.steps, job.args)
            result = optimizer_step(job, step, record, rate, saving)
            skipped = skips.see(step + 1, result.norm, result.pieces)
            totals = tracking.add_up_over_ranks(result.sums, result.tokens)
            seconds = time.time() - began
            clock.stepped(seconds)
            record.pairs(step + 1, "train", result.pieces)

            # 2. its line of the log
            progress.step = step + 1
            progress.num_tokens += int(totals.tokens)
            if skipped:
                progress.skipped += 1
            progress.line = {
                **tracking.measured(job, step, totals, seconds),
                "learning_rate": rate,
                "grad_norm": guard.plain(result.norm),
                "skipped": skipped,
                "num_tokens": progress.num_tokens,
                "seconds_left": clock.left(step + 1, evaluated=False),
            }

            # 3. the evaluation, if one is due
            evaluation = {}
            if clock.evaluation_due(step + 1):
                with saving():
                    evaluation = clock.time(clock.evaluation_seconds, evaluate, job, record, held_out_pairs, step + 1)
                progress.line["seconds_left"] = clock.left(step + 1, evaluated=True)
            record.step(progress.line, evaluation)
            progress.line = None  # it is in the log

            # 4. a checkpoint, if one is due
            if clock.save_due(step + 1):
                clock.time(clock.save_seconds, resume.save, job, run, progress)
                saved_step = step + 1
            if step + 1 < job.steps:
                job.stop.check()
    except stopping.Stopped:
        if progress.step > saved_step:
            resume.save(job, run, progress)
        return False
    return True


def finish_last_step(job, record, held_out_pairs, progress):
    """After a resume: make the evaluation that the run was stopped before, or the last one again, for the card."""
    if progress.line:
        record.step(progress.line, evaluate(job, record, held_out_pairs, progress.step))
        progress.line = None
    elif progress.step == job.steps and len(held_out_pairs):
        record.evaluation = evaluate(job, record, held_out_pairs, progress.step, write=False)  # it is in the log


class StepResult(NamedTuple):
    """What an optimizer step computed on this rank."""

    sums: torch.Tensor  # (M + 1,) float64: the M metrics and the number of pairs, summed over the pairs
    tokens: int  # that went through the model
    norm: float  # of the gradient, over all ranks, before clipping
    pieces: list  # of (item, loss, scores)


def optimizer_step(job, step, record, rate, saving):
    """One step of the optimizer. Raises Stopped in its middle if a signal came; the weights are as before then.

    saving(): a context for the passes, in which the weights are still as before.
    """
    for group in job.policy.optimizer.param_groups:
        group["lr"] = rate
    micro_steps, objective = job.args.gradient_accumulation_steps, job.objective
    work = [objective.work(micro_batch(job, step, micro)) for micro in range(micro_steps)]
    items, shares = zip(*itertools.chain.from_iterable(work))

    def backward(loss, is_last):
        """Add the gradient of the loss, which is NaN if the loss is not finite."""
        # Set at every backward: without it ZeRO-2 is silently wrong
        job.policy.set_gradient_accumulation_boundary(is_last)
        job.policy.backward(loss * guard.poison(loss), scale_wrt_gas=False)

    def after_pass():
        record.passed(step)
        job.stop.check()

    with saving():
        tokens = objective.set_baseline(items, functools.partial(job.scores, after_pass=after_pass), job.ranks.device)
        pieces = [objective.piece(item, share / micro_steps) for item, share in zip(items, shares)]
        scored = score.score_and_backward(job.policy, pieces, job.tokens_per_forward, job.ranks, backward, after_pass)
    results = [(item, *each) for item, each in zip(items, scored)]
    sums = sum(objective.measure(*each) for each in results)
    tokens += sum(states.tokens for piece in pieces for states in piece.responses)
    return StepResult(sums, tokens, engine.step(job.policy), results)


def micro_batch(job, step, micro):
    """This rank's [(pair, epoch)] of one micro-step. A place in the stream depends on nothing but its number."""
    B = job.args.per_device_train_batch_size
    first = ((step * job.args.gradient_accumulation_steps + micro) * job.ranks.world + job.ranks.rank) * B
    return [job.stream[first + b] for b in range(B)]


def learning_rate(step, steps, args):
    """The rate of optimizer step `step` (0-based): linear warm-up, then cosine or linear to 0, or constant."""
    warmup = math.ceil(args.warmup_ratio * steps)
    if step < warmup:
        return args.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    return args.learning_rate * shape[args.lr_scheduler_type]


@torch.no_grad()
def evaluate(job, record, held_out_pairs, step, write=True):
    """Mean metrics over the held-out pairs after `step`, with noise set 0. Raises Stopped if a signal came.

    The pairs are dealt over the ranks, with the same forwards on each. write: their scores to scores.jsonl, too.
    """
    sums = torch.zeros(job.objective.sums, dtype=torch.float64, device=job.ranks.device)
    pieces, count, world = [], len(held_out_pairs), job.ranks.world
    scores_of = functools.partial(job.scores, after_pass=job.stop.check)
    own_items = [(int(pair), 0) for pair in held_out_pairs[job.ranks.rank :: world]]
    job.objective.set_baseline(own_items, scores_of, job.ranks.device)
    most = int(job.objective.tokens()[held_out_pairs].max())
    at_once = math.ceil(FULL_PASSES * job.tokens_per_forward / most)  # pairs of a rank, in passes that are mostly full
    for turn in range(0, count, at_once * world):
        mine = held_out_pairs[turn + job.ranks.rank : turn + at_once * world : world]
        items = [item for pair in mine for item, _ in job.objective.work([(int(pair), 0)])]
        parts = [job.objective.piece(item) for item in items]
        scores = iter(scores_of([states for part in parts for states in part.responses]))
        for item, part in zip(items, parts):
            own = [next(scores) for _ in part.responses]
            loss = part.loss_of([each.sum() for each in own])
            sums += job.objective.measure(item, loss, own)
            pieces.append((item, loss, own))
        record.rewrite(f"step {step} | evaluating {min(turn + at_once * world, count)}/{count} held-out pairs")
    if write:
        record.pairs(step, "eval", pieces)
    means = tracking.means(job.objective, tracking.add_up_over_ranks(sums, 0), "eval_")
    if "eval_rewards/accuracies" in means:
        means["eval_rewards/accuracies_ci95"] = tasks.wilson(means["eval_rewards/accuracies"], count)
    return means


# --- before the loop --------------------------------------------------------------------------------------


def prepare(given):
    """Read what the run replays; refuse what cannot be right. Returns the objective, and what the scores depend on."""
    args, tasks = given.train, losses.leading(given.train.loss_type).tasks
    tracking.names(args.report_to)
    packed, masking, wanted, _ = reference.prepare(given.data, given.model, given.noise, tasks)
    check_start(given.model)
    quantized.check(given.model, deepspeed_config.read_ds_config(given.model.deepspeed))
    sft = recipe.sft_recipe(given.model)
    if args.loss_type == "sft":
        check_row_lengths(packed, args, given.model)
        return SFT(args, given.noise, packed, masking, sft), wanted
    scored = None
    if losses.has_reference(args.loss_type):
        flags = config.flags((*recipe.SAME, "deepspeed"), given.model, given.noise)
        mend = f"python score.py --data {shlex.quote(given.data.data)} {flags}"
        scored = reference.Reference(packed, wanted, given.noise.noise_sets, mend)
    if packed.task == "kto":
        return Judged(args, given.noise, packed, scored, masking), wanted
    return Preference(args, given.noise, packed, scored, masking, sft), wanted


def make_job(given, objective, run, train_pairs, ds_config, ranks, checkpoint):
    """The Job: the policy in its engine, and how its steps are divided."""
    args, model_args = given.train, given.model
    # 1. pairs and steps
    micro_batch_size = args.per_device_train_batch_size
    pairs_per_step = micro_batch_size * args.gradient_accumulation_steps * ranks.world
    steps = args.max_steps
    if steps <= 0:
        steps = math.ceil(args.num_train_epochs * len(train_pairs) / pairs_per_step)

    # 2. the engine, and as many tokens in a forward pass as fit
    tokens = model_args.tokens_per_forward
    if tokens == "auto" and checkpoint:  # as the run began: the same sums to the last digit
        tokens = run.arguments().get("tokens_per_forward", "auto")
    path = model_args.deepspeed
    ds_config = deepspeed_config.training_config(ds_config, args, model_args, path, ranks.world, steps)
    policy = start_policy(model_args, args, ds_config, ranks)
    stop = stopping.Stop(ranks)
    if tokens == "auto":
        tokens = fit(policy, objective, pairs_per_step // ranks.world, score.score_and_backward, ranks)
    out_of_memory.note_pass(tokens, longest_row(objective).tokens, ranks.device.type)

    # 3. the order of the data
    stream = Stream(train_pairs, args.seed, micro_batch_size, objective.lengths)
    return Job(args, policy, objective, stream, ranks, stop, tokens, pairs_per_step, steps)


def begin(job, run, given, arguments, wanted, held_out_pairs, checkpoint):
    """Start the run, or resume it from a checkpoint. Returns its Progress and its Record."""
    precision, noun = given.model.use_mixed_precision, job.objective.noun
    progress = resume.load(job, checkpoint, precision) if checkpoint else resume.Progress()
    record = tracking.new_record(job, run, held_out_pairs, progress.step)
    if job.ranks.first:
        place = f"; resuming after step {progress.step} ({checkpoint})" if checkpoint else ""
        print(
            f"{job.objective.packed.folder}, {given.model.model_name_or_path} -> {run.folder}: "
            f"{len(job.stream.train)} {noun} to train on, {len(held_out_pairs)} held out, {job.steps} steps of "
            f"{job.pairs_per_step} {noun}, {job.tokens_per_forward} tokens in a forward pass{place}",
            flush=True,
        )
    if not checkpoint and losses.has_reference(given.train.loss_type):
        gap = guard.check_reference(job, micro_batch(job, 0, 0), precision)
        if job.ranks.first:
            print(f"policy and reference agree to {gap:.1e} per token", flush=True)
    if job.ranks.first:
        versions = {"torch": torch.__version__, "deepspeed": engine.deepspeed.__version__, "ranks": job.ranks.world}
        run.begin(arguments, wanted, versions, job.steps, progress.step)
        run.cut_log(progress.step, bool(progress.line))
    record.open(runs.without_home(arguments), progress.step if progress.line else progress.step + 1)
    dist.barrier()
    return progress, record


def main(argv=None):
    # 1. what is on disk, and whether this run is finished, unfinished or new
    given = read_arguments(argv)
    if sentence := runs.finished(given):
        print(sentence, flush=True)
        return 0
    objective, wanted = prepare(given)
    arguments = runs.arguments_of(given)
    run = runs.Run(given.train.output_dir)
    run.check_same(arguments, wanted)
    train_pairs, held_out_pairs = split(objective.packed, given.train.eval_fraction, given.train.seed)
    ds_config = deepspeed_config.read_ds_config(given.model.deepspeed)
    ranks = engine.start()
    if ranks.first:
        run.lock()
        print(plan.at_start(given, ds_config, ranks), flush=True)
    checkpoint = ranks.broadcast(run.start_from(given.train.resume_from_checkpoint) if ranks.first else None)

    # 2. the policy in its engine
    job = make_job(given, objective, run, train_pairs, ds_config, ranks, checkpoint)
    arguments["tokens_per_forward"] = job.tokens_per_forward

    # 3. the loop, and what it makes
    progress, record = begin(job, run, given, arguments, wanted, held_out_pairs, checkpoint)
    is_finished = train(job, record, run, held_out_pairs, progress)
    record.close()
    if is_finished:
        counts = {"trained on": len(train_pairs), "held out": len(held_out_pairs)}
        counts |= {"steps": job.steps, "pairs a step": job.pairs_per_step}
        save_final(job, run, given.model, arguments, record.evaluation, counts)
    elif ranks.first:
        state = "stopped and saved" if run.saved() else "stopped before the first step was made"
        print(f"{state}; to resume, run: {exits.command()}", flush=True)
    dist.barrier()
    if ranks.first:
        nvme.remove(run.folder / "nvme")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    exits.run(main)

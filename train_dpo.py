"""Diffusion-DPO: align a masked diffusion language model with preferences, or train it on responses (SFT).

    packed/ + packed/ref-<key>/ + model -> runs/NAME/ (run.json, log.jsonl, checkpoints/, final/)
    python data_prep.py --in examples/prefs.jsonl
    python score.py --data packed --use_mixed_precision no
    python train_dpo.py --data packed --use_mixed_precision no --max_steps 5 --output_dir runs/example

The loop is here, visible; the loss is in objective.py, the score and its exact gradient in score.py, the engine in engine.py. The
first step has margin 0 and loss ln 2, because policy and reference replay the same noise; a run where they do not is refused.
"""

import dataclasses
import math
import os
import shlex
import time
from typing import Any, NamedTuple

import config
from cli import exits
from cli.parser import names
from scoring import reference
from training import runs

UNUSED = names(config.DataArguments) - {"data", "max_length"} | {
    "end_token_id"
}  # here, of the arguments that are accepted


def read_arguments(argv=None):
    """One instance of each of config.GROUPS, checked as far as nothing needs to be loaded for it."""
    groups = config.parse(argv, __doc__, *config.GROUPS, hide=UNUSED)
    config.check_scoring(groups[1], groups[2])
    config.check(groups[3])
    return groups


def run_arguments(groups):
    """What run.json has of the arguments."""
    arguments = {name: value for group in groups for name, value in dataclasses.asdict(group).items()}
    return arguments | {"ranks": int(os.environ.get("WORLD_SIZE", 1))}


def finished(groups):
    """The sentence of a run that has ended, if this is one; None if there is something to do."""
    data_args, model_args, noise_args, args = groups
    run = runs.Run(args.output_dir)
    if not run.finished:
        return None
    prepared = reference.prepare(data_args, model_args, noise_args, sft=args.loss_type == "sft")
    run.check_same(run_arguments(groups), prepared.wanted)
    return f"{run.final}: this run is finished; another needs another --output_dir"


def early():
    """Read the arguments; end the process if the run is finished."""
    exits.end_if(finished(read_arguments()))


if __name__ == "__main__":
    exits.early(early)  # answers --help, mistakes and a finished run before the imports below, which take seconds

import numpy as np
import torch
import torch.distributed as dist

import plan
import score
from files import InputError
from models import architecture, checkpoint, families, folders, lora, quantized, tokenization
from preferences.packed import longest
from reasoning import tasks
from scoring import recipe
from scoring.objective import SFT, Preference, Stream, split
from scoring.states import backward_passes, sizes
from training import card, deepspeed_config, engine, guard, memory, resume, stopping, tracking


class Job(NamedTuple):
    """What every step needs: arguments, the engine, the objective, the order of the data, the ranks."""

    args: config.TrainArguments
    policy: Any
    objective: Any
    stream: Stream
    ranks: engine.Ranks
    stop: stopping.Stop
    states_per_forward: int
    record: tracking.Record

    def scores(self, states):
        """The policy's score of each of `states`, (S,) float32."""
        return score.state_scores(self.policy, states, self.states_per_forward, self.ranks.device)


def learning_rate(step, total, args):
    """The rate of optimizer step `step` (0-based) of `total`: linear warm-up, then cosine or linear to 0, or constant."""
    warmup = math.ceil(args.warmup_ratio * total)
    if step < warmup:
        return args.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(total - warmup, 1)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    return args.learning_rate * shape[args.lr_scheduler_type]


def micro_batch(job, step, micro):
    """This rank's [(pair, epoch)] of one micro-step; a place in the stream depends on nothing but its number."""
    B = job.args.per_device_train_batch_size
    first = ((step * job.args.gradient_accumulation_steps + micro) * job.ranks.world + job.ranks.rank) * B
    return [job.stream[first + b] for b in range(B)]


def optimizer_step(job, step, backwards, rate):
    """One step of the optimizer: this rank's sums (the metrics, pairs, tokens through the model), on the device, the gradient's
    norm, and [(item, loss, scores)]. None if the run was told to stop in its middle: the weights are as before."""
    done, sums, tokens, pieces = 0, 0, 0, []
    for group in job.policy.optimizer.param_groups:
        group["lr"] = rate
    for micro in range(job.args.gradient_accumulation_steps):
        for item, share in job.objective.work(micro_batch(job, step, micro)):

            def backward(loss):
                nonlocal done
                done += 1  # the boundary is set at every backward: without it ZeRO-2 is silently wrong
                job.policy.set_gradient_accumulation_boundary(done == backwards)
                job.policy.backward(
                    loss * (share / job.args.gradient_accumulation_steps * guard.poison(loss)), scale_wrt_gas=False
                )

            responses = job.objective.responses(item)
            loss, scores = score.score_and_backward(
                job.policy, responses, job.objective.loss(item), job.states_per_forward, job.ranks.device, backward
            )
            sums = sums + job.objective.measure(item, loss, scores)
            tokens += sum(states.inputs.size for states in responses)
            pieces.append((item, loss, scores))
            job.record.pair(step, pieces)
            if done < backwards and job.stop.asked():
                return None
    assert done == backwards, f"{done} backward passes, {backwards} were planned"
    return torch.cat((sums, sums.new_tensor([tokens]))), engine.step(job.policy), pieces


@torch.no_grad()
def evaluate(job, pairs, step, write=True):
    """Mean metrics over the held-out `pairs`, noise set 0, dealt over the ranks with the same forwards on each, after `step`; None if
    told to stop. write: their scores, too, to scores.jsonl."""
    sums, pieces = torch.zeros(len(job.objective.metrics) + 1, dtype=torch.float64, device=job.ranks.device), []
    for turn in range(0, len(pairs), job.ranks.world):
        mine = turn + job.ranks.rank
        item = (int(pairs[min(mine, len(pairs) - 1)]), 0)  # an idle rank scores the last pair and throws it away
        [(item, _)] = job.objective.work([item])
        scores = [job.scores(states) for states in job.objective.responses(item)]
        loss = job.objective.loss(item)([state.sum() for state in scores])
        if mine < len(pairs):
            sums += job.objective.measure(item, loss, scores)
            pieces.append((item, loss, scores))
        job.record.rewrite(f"step {step} | evaluating {mine + 1}/{len(pairs)} held-out pairs")
        if job.stop.asked():
            return None
    if write:
        job.record.pairs(step, "eval", pieces)
    means = tracking.named(job.objective.metrics, total(sums, job.ranks), "eval_")
    if "eval_rewards/accuracies" in means:
        means["eval_rewards/accuracies_ci95"] = tasks.wilson(means["eval_rewards/accuracies"], len(pairs))
    return means


def total(sums, ranks):
    """Sum over the ranks."""
    dist.all_reduce(sums)
    return sums.cpu().numpy()


def fit(job):
    """job with as many states a forward as fit: the longest pair is tried, its gradient times 0, and what it took is printed."""
    objective, (index, side) = job.objective, longest(job.objective.packed)
    S, k = objective.counts[0], objective.carrying[0]
    joint = lambda size: objective.counts == objective.carrying and size == S  # noqa: E731  both responses in one graph

    def backward(loss):
        job.policy.set_gradient_accumulation_boundary(False)
        job.policy.backward(loss, scale_wrt_gas=False)

    def trial(size):
        responses = objective.responses((index, 0))
        responses = responses if joint(size) else [responses[side].first(size)]
        score.score_and_backward(
            job.policy, responses, lambda scores: 0.0 * sum(scores), size, job.ranks.device, backward
        )

    size, peak = memory.grow(
        sizes(S), lambda size: 2 * S if joint(size) else min(size, k), trial, job.ranks, memory.unborn(job.policy)
    )
    if job.ranks.first:
        prompt, *sides = objective.packed[index]
        print(
            f"states_per_forward auto: {size} of {S}; the longest response with its prompt, {len(prompt) + len(sides[side])} "
            f"tokens, took {peak:.1f} GiB",
            flush=True,
        )
    return job._replace(states_per_forward=size)


def prepare(groups):
    """Read the arguments and everything on disk that the run replays; refuse what cannot be right."""
    data_args, model_args, noise_args, args = groups
    tracking.names(args.report_to)
    packed, mask_id, wanted, _ = reference.prepare(data_args, model_args, noise_args, sft=args.loss_type == "sft")
    if folders.read_adapter(folders.model_folder(model_args.model_name_or_path)):
        raise InputError(
            f"{model_args.model_name_or_path}: an adapter, expected whole weights to start from; run: python merge.py "
            f"{model_args.model_name_or_path} OUT, and score and train with --model_name_or_path OUT"
        )
    quantized.check(model_args, deepspeed_config.read_ds_config(model_args.deepspeed))
    if args.loss_type == "sft":
        refuse_long_rows(
            packed, args, architecture.load_config(model_args.model_name_or_path, model_args.trust_remote_code)
        )
        objective = SFT(args, noise_args, packed, mask_id)
    else:
        mend = f"python score.py --data {data_args.data} {config.flags((*recipe.SAME, 'deepspeed'), model_args, noise_args)}"
        objective = Preference(
            args, noise_args, packed, reference.Reference(packed, wanted, noise_args.noise_sets, mend), mask_id
        )
    return objective, wanted


def train(job, run, held, state, steps, backwards):
    """The loop: step, log, evaluate, save. state: that of the checkpoint, or of a new run. Returns the last evaluation, or None if
    it was told to stop; then all is saved."""
    args, record, clock, evaluation, start, kept = (
        job.args,
        job.record,
        job.record.clock,
        {},
        state["step"],
        state["step"],
    )
    skips, num_tokens = guard.Skips(job, run, state["skipped"]), state["num_tokens"]
    counters = lambda: {"num_tokens": num_tokens, "skipped": skips.count}  # noqa: E731
    if start and len(held) and (state["line"] or start == steps):  # it was stopped before that evaluation was made
        evaluation = evaluate(job, held, start, bool(state["line"]))  # what is logged already is not written again
        if evaluation is None:
            return None
        if state["line"]:
            record.step(state["line"], evaluation, {})
    for step in range(start, steps):
        began, rate = time.time(), learning_rate(step, steps, args)
        did = optimizer_step(job, step, backwards, rate)
        if did is None:
            if step > kept:
                resume.save(job, run, step, counters())
            return None
        sums, norm, pieces = did
        skipped, sums = skips.see(step + 1, norm, pieces), total(sums, job.ranks)
        seconds = time.time() - began
        clock.stepped(seconds)
        num_tokens += int(sums[-1])
        line = {
            **tracking.measured(job, step, sums, seconds),
            "learning_rate": rate,
            "grad_norm": guard.plain(norm),
            "skipped": skipped,
            "num_tokens": num_tokens,
            "seconds_left": clock.left(step + 1, False),
        }
        record.pairs(step + 1, "train", pieces)
        before, made, (evaluation_due, save_due) = evaluation, {}, clock.due(step + 1)
        if evaluation_due:
            made = clock.time(clock.evaluation_seconds, evaluate, job, held, step + 1)
            evaluation = made or evaluation
        pending = line if made is None else None  # told to stop before it was made: the resumed run makes it
        if not pending:
            record.step(line | {"seconds_left": clock.left(step + 1, True)}, made, before)
        leaving = pending or (step + 1 < steps and job.stop.asked())
        if leaving or save_due:
            clock.time(clock.save_seconds, resume.save, job, run, step + 1, counters(), pending)
            kept = step + 1
        if leaving:
            return None
    return evaluation


def refuse_long_rows(packed, args, model_config):
    """Padding may make a row longer than learned positions reach."""
    longest = families.longest(model_config)
    if longest and (most := int(np.diff(packed.bounds[:, :2], axis=1).max()) + args.sft_pad_to) > longest:
        raise InputError(
            f"--sft_pad_to {args.sft_pad_to}: makes rows of {most} tokens, and this model reads {longest}; expected at most "
            f"{args.sft_pad_to - most + longest}"
        )


def start_policy(model_args, args, ds_config, ranks):
    """The engine of the model that training starts from, with LoRA's adapters if asked for."""
    source = model_args.model_name_or_path
    model = checkpoint.load_model(
        source,
        checkpoint.DTYPES[model_args.use_mixed_precision],
        ds_config,
        model_args.trust_remote_code,
        model_args.shift_logits,
        model_args.load_in_4bit,
    )
    if model_args.gradient_checkpointing and model.supports_gradient_checkpointing:  # ALBERT does not
        # non-reentrant: the only kind that ZeRO-3 bears with several forwards a step
        model.activation_checkpointing_enable({"use_reentrant": False})
    if model_args.lora_r:
        model, said = lora.add(
            model, model_args.lora_r, model_args.lora_alpha, model_args.lora_targets, args.seed, source
        )
        if ranks.first:
            print(said, flush=True)
    return engine.build(model, ds_config)


def save_final(job, run, model_args, arguments, evaluation, pairs):
    """final/: the model, or LoRA's adapter alone. pairs: (trained on, held out)."""
    source, weights = model_args.model_name_or_path, engine.gather_weights(job.policy, job.ranks)
    if job.ranks.first:
        model, objective = job.policy.module, job.objective
        tokenizer = tokenization.load_tokenizer(source, model_args.trust_remote_code)
        counts = {
            "trained on": pairs[0],
            "held out": pairs[1],
            "steps": job.record.steps,
            "pairs a step": job.record.per_step,
        }
        text = card.text(run.folder.name, arguments, objective.packed, counts, evaluation, model.config.model_type)
        if model_args.lora_r:
            lora.save(
                run.final,
                model,
                weights,
                tokenizer,
                text,
                {
                    "is_folder": os.path.isdir(source),
                    "fingerprint": folders.model_fingerprint(source),
                    "mask_token_id": objective.mask_id,
                    "shift_logits": bool(getattr(model.config, "shift_logits", False)),
                    "load_in_4bit": model_args.load_in_4bit,
                },
            )
            said = f"the adapter, in peft's format (python merge.py {run.final} OUT makes one model of it, rounded)"
        else:
            checkpoint.save_model(run.final, model, weights, source, tokenizer, text, objective.mask_id)
            said = "the aligned model, in Hugging Face format"
        flag = " --load_in_4bit true" if model_args.load_in_4bit else ""
        here, final = shlex.quote(str(run.folder)), shlex.quote(str(run.final))
        print(
            f"{run.final}: {said}\nnext: python report.py {here}\n"
            f"and:  python generate.py --model_name_or_path {final}{flag} --prompt '...'",
            flush=True,
        )
    dist.barrier()


def make_job(groups, objective, run, train_pairs, ds_config, ranks, checkpoint_path):
    """(Job without its record, steps of the run, backward passes of a step): the policy in its engine, the states a forward settled."""
    _, model_args, _, args = groups
    rows = args.per_device_train_batch_size
    steps = (
        args.max_steps
        if args.max_steps > 0
        else math.ceil(args.num_train_epochs * len(train_pairs) / pairs_a_step(args, ranks))
    )
    pieces = args.gradient_accumulation_steps * len(objective.work([(0, 0)] * rows))
    passes = lambda size: pieces * backward_passes(objective.counts, objective.carrying, size)  # noqa: E731
    states_per_forward = rows if args.loss_type == "sft" else model_args.states_per_forward
    if states_per_forward == "auto" and checkpoint_path:  # as it began: the same sums to the last digit
        states_per_forward = run.arguments()["states_per_forward"]
    auto = states_per_forward == "auto"
    backwards = passes(1 if auto else states_per_forward)
    policy = start_policy(
        model_args,
        args,
        deepspeed_config.training_config(ds_config, args, model_args, backwards, model_args.deepspeed),
        ranks,
    )
    stream = Stream(train_pairs, args.seed, rows, objective.lengths)
    job = Job(args, policy, objective, stream, ranks, stopping.Stop(ranks), states_per_forward, None)
    if auto:
        job = fit(job)
        backwards = passes(job.states_per_forward)
    return job, steps, backwards


def pairs_a_step(args, ranks):
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * ranks.world


def make_record(job, run, held, start, steps):
    """Its clock knows the tokens of every step to come."""
    per_step, tokens = pairs_a_step(job.args, job.ranks), job.objective.tokens()
    places = range(start * per_step, steps * per_step)
    each = np.array([tokens[job.stream[place][0]] for place in places]).reshape(-1, per_step).sum(1)
    clock = tracking.Clock(each, int(tokens[held].sum()), job.args.eval_steps, job.args.save_steps, start)
    return tracking.Record(run, job.ranks, job.args, job.objective, held, clock, per_step)


def main(argv=None):
    # 1. what is on disk, and whether this run is finished, unfinished or new
    groups = read_arguments(argv)
    if sentence := finished(groups):
        print(sentence, flush=True)
        return 0
    objective, wanted = prepare(groups)
    arguments = run_arguments(groups)
    _, model_args, _, args = groups
    run = runs.Run(args.output_dir)
    run.check_same(arguments, wanted)
    train_pairs, held = split(objective.packed, args.eval_fraction, args.seed)
    ds_config = deepspeed_config.read_ds_config(model_args.deepspeed)
    ranks = engine.start()
    if ranks.first:
        run.lock()
        print(plan.at_start(groups, ds_config, ranks), flush=True)
    checkpoint_path = ranks.broadcast(run.start_from(args.resume_from_checkpoint) if ranks.first else None)

    # 2. the policy in its engine
    job, steps, backwards = make_job(groups, objective, run, train_pairs, ds_config, ranks, checkpoint_path)
    if args.loss_type != "sft":
        arguments["states_per_forward"] = job.states_per_forward

    # 3. start or go on
    state = {"step": 0, "num_tokens": 0, "skipped": 0, "line": None}
    if checkpoint_path:
        state = resume.load(job, checkpoint_path, model_args.use_mixed_precision)
    job = job._replace(record=make_record(job, run, held, state["step"], steps))
    if ranks.first:
        noun = "rows" if objective.packed.task == "sft" else "pairs"
        print(
            f"{objective.packed.folder}, {model_args.model_name_or_path} -> {run.folder}: {len(train_pairs)} {noun} to train on, "
            f"{len(held)} held out, {steps} steps of {job.record.per_step} {noun}, {sum(objective.counts)} states each, {backwards} "
            f"backward passes a step"
            + (f"; going on after step {state['step']} ({checkpoint_path})" if checkpoint_path else ""),
            flush=True,
        )
    if not checkpoint_path and args.loss_type != "sft":
        gap = guard.check_reference(job, micro_batch(job, 0, 0), model_args.use_mixed_precision)
        if ranks.first:
            print(f"policy and reference agree to {gap:.1e} per token", flush=True)
    if ranks.first:
        versions = {"torch": torch.__version__, "deepspeed": engine.deepspeed.__version__, "ranks": ranks.world}
        run.begin(arguments, wanted, versions, steps, state["step"])
        run.cut_log(state["step"], bool(state["line"]))
    job.record.open(runs.without_home(arguments), state["step"] + (not state["line"]))
    dist.barrier()

    # 4. the loop, and what comes out
    evaluation = train(job, run, held, state, steps, backwards)
    job.record.close()
    if evaluation is not None:
        save_final(job, run, model_args, arguments, evaluation, (len(train_pairs), len(held)))
    elif ranks.first:
        print(
            f"stopped{' and saved' if run.saved() else ' before the first step was made'}; go on with: {exits.command()}",
            flush=True,
        )
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    exits.run(main)

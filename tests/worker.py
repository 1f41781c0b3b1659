"""Runs several of our scripts in one process per rank, and records what each did. small.run_jobs starts it.

    python -m torch.distributed.run --standalone --nproc_per_node 2 tests/worker.py FOLDER

FOLDER/jobs.json -> FOLDER/NAME.RANK.json: exit code, error, forward passes with and without a graph, forward passes of
evaluations, backward passes, (pair, epoch) of each step and its forward passes without and with a graph and backward
passes; FOLDER/NAME.step-N.pt: the weights after each step.
"""

import importlib
import json
import math
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))

import train_dpo
from files import InputError
from models import checkpoint
from training import engine

torch.set_num_threads(1)
seen = {}  # of the current job


def watch(module, name, make):
    setattr(module, name, make(getattr(module, name)))


def loading(original):
    def load_model(*args, **kwargs):
        model = original(*args, **kwargs)

        def count(*_):
            seen["forwards" if torch.is_grad_enabled() else "forwards_without_graph"] += 1

        model.register_forward_hook(count)
        return model

    return load_model


def building(original):
    def build(model, config):
        policy = original(model, config)
        backward = policy.backward

        def counted(*args, **kwargs):
            seen["backwards"] += 1
            return backward(*args, **kwargs)

        policy.backward = counted
        return policy

    return build


def batching(original):
    def micro_batch(job, step, micro):
        batch = original(job, step, micro)
        seen["items"].setdefault(step, []).extend(batch)
        return batch

    return micro_batch


def passes():
    return [seen[what] for what in ("forwards_without_graph", "forwards", "backwards")]


def stepping(original):
    def optimizer_step(job, step, *args):
        seen["items"].pop(step, None)  # of the check before the first step
        loss, poisoned = job.objective.loss, []

        def first_is_nan(item):
            of = loss(item)
            poisoned.append(item)
            return of if len(poisoned) > 1 else lambda scores: of(scores) * math.nan

        if str(step) in os.environ.get("POISON", "").split(","):
            job.objective.loss = first_is_nan
        before = passes()
        result = original(job, step, *args)
        seen["passes"][step] = [after - earlier for after, earlier in zip(passes(), before)]
        job.objective.loss = loss
        weights = engine.gather_weights(job.policy, job.ranks)
        if job.ranks.first:
            torch.save(weights, seen["path"].with_suffix(f".step-{step + 1}.pt"))
        return result

    return optimizer_step


def evaluating(original):
    def evaluate(*args, **kwargs):
        before = seen["forwards_without_graph"]
        result = original(*args, **kwargs)
        seen["eval_forwards"] += seen["forwards_without_graph"] - before
        return result

    return evaluate


def main(folder):
    watch(checkpoint, "load_model", loading)
    watch(engine, "build", building)
    for name, make in (("micro_batch", batching), ("optimizer_step", stepping), ("evaluate", evaluating)):
        watch(train_dpo, name, make)
    destroy, dist.destroy_process_group = dist.destroy_process_group, lambda: None  # the next job goes on with it
    for name, script, argv in json.loads((folder / "jobs.json").read_text()):
        seen.update(
            path=folder / name,
            code=0,
            error="",
            forwards=0,
            forwards_without_graph=0,
            eval_forwards=0,
            backwards=0,
            items={},
            passes={},
        )
        try:
            importlib.import_module(script).main(argv)
        except InputError as error:
            seen.update(code=2, error=str(error))
        except Exception:
            seen.update(code=1, error=traceback.format_exc())
        path = folder / f"{name}.{os.environ.get('RANK', 0)}.json"
        path.write_text(json.dumps({key: value for key, value in seen.items() if key != "path"}))
    destroy()
    sys.stdout.flush()
    os._exit(0)  # as exits.run ends a rank


if __name__ == "__main__":
    main(Path(sys.argv[1]))

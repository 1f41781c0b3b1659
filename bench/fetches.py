"""What ZeRO-3 brings over the bus in a step: in models, how much of it on demand, and how much it holds at once.

    python bench/fetches.py [--blocks 32] [--ds_config ds_configs/zero3_offload_4080.json] [--json FILE]
    python bench/fetches.py --family llada2_moe --blocks 20 [--recompute false] [--only full]

It needs no card. The model is LLaDA-8B, or LLaDA2-mini, with the sizes of its tensors divided by 256, LoRA's rank 16 by
16, and the numbers of elements in the ds_config divided by 256, too. So DeepSpeed decides as it does at full size, and
its fetches are counted. A step is one pair: its forward and backward passes, and the optimizer's update.

models: one is all bytes of the weights, 16 GB at 8B. on demand: the share that is not fetched until a module needs it.
GiB: of gathered weights, at full size in bf16. lost: DeepSpeed's records of a pass that did not fit the next, which is
then fetched on demand. The table is of the last of four steps.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import files
import score
from models import lora
from models.llada import LLaDAConfig, LLaDAModelLM
from models.moe import LLaDA2MoeConfig, LLaDA2MoeModelLM
from scoring.states import response_states
from scoring.window import Piece
from training import engine

import deepspeed  # isort: skip  (engine.py chooses the accelerator first)
from deepspeed.runtime.zero import partitioned_param_coordinator as coordinators  # isort: skip
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus  # isort: skip

SCALE, WIDTHS = 256, 16  # what numbers of elements, and widths, are divided by
IN_ELEMENTS = """reduce_bucket_size stage3_prefetch_bucket_size stage3_max_live_parameters stage3_max_reuse_distance
    stage3_param_persistence_threshold sub_group_size"""
HOOKED = "_fetch_sub_module_impl", "_invalidate_trace", "_PartitionedParameterCoordinator__all_gather_params_"
STEPS, STATES, LENGTHS = 4, 4, (8, 10, 14)  # LENGTHS: of the prompt and both responses


class Row(NamedTuple):
    what: str
    forwards: int  # without a graph
    backwards: int  # forward and backward passes
    models: float
    on_demand: float
    gathered_gib: float
    lost: int


class Fetches:
    """Counts elements of the weights that DeepSpeed fetches for a model. A context."""

    def __init__(self, model):
        self.parameters = list(model.parameters())
        self.total, self.wanted = sum(parameter.ds_numel for parameter in self.parameters), set()
        self.kind = coordinators.PartitionedParameterCoordinator
        self.originals = {name: getattr(self.kind, name) for name in HOOKED}
        self.forget()

    def forget(self):
        self.on_demand = self.ahead = self.peak = self.lost = 0

    def __enter__(self):
        """Put functions that count before DeepSpeed's own."""
        fetch, invalidate, gather = self.originals.values()

        def fetching(coordinator, module, *args):
            self.wanted = set(coordinators.iter_params(module))
            fetch(coordinator, module, *args)

        def invalidating(coordinator):
            self.lost += 1
            invalidate(coordinator)

        def gathering(coordinator, parameters, *args, **options):
            for parameter in parameters:
                if parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE:
                    self.ahead += parameter.ds_numel * (parameter not in self.wanted)
                    self.on_demand += parameter.ds_numel * (parameter in self.wanted)
            gather(coordinator, parameters, *args, **options)
            self.peak = max(self.peak, self.gathered())

        for name, function in zip(self.originals, (fetching, invalidating, gathering)):
            setattr(self.kind, name, function)
        for parameter in self.parameters:
            parameter.all_gather = self.unplanned(parameter, parameter.all_gather)
        return self

    def __exit__(self, *_):
        for name, original in self.originals.items():
            setattr(self.kind, name, original)

    def unplanned(self, parameter, original):
        """In place of a parameter's all_gather(), called where a module reads it that has not fetched it."""

        def all_gather(parameters=None, **options):
            self.on_demand += sum(each.ds_numel for each in parameters or [parameter] if not each.ds_persist)
            return original(parameters, **options)

        return all_gather

    def gathered(self):
        """Elements on the device now, without those that always are."""
        away = ZeroParamStatus.NOT_AVAILABLE
        return sum(each.ds_numel for each in self.parameters if each.ds_status != away and not each.ds_persist)


def scaled(path, has_optimizer):
    """The ds_config at `path` with its numbers of elements divided, for one engine."""
    settings = json.loads(Path(path).read_text(encoding="utf-8"))
    zero = settings["zero_optimization"]
    zero |= {name: int(zero[name]) // SCALE for name in IN_ELEMENTS.split() if name in zero}
    zero["log_trace_cache_warnings"] = True
    settings["optimizer"]["params"] = {"lr": 1e-5, "torch_adam": True}
    settings |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2, "gradient_clipping": 1.0}
    settings |= {"bf16": {"enabled": False}, "zero_force_ds_cpu_optimizer": False, "steps_per_print": 10**9}
    if not has_optimizer:
        del settings["optimizer"], zero["offload_optimizer"]
    return settings


def llada_8b(blocks):
    return LLaDAModelLM, LLaDAConfig(
        d_model=4096 // WIDTHS,
        n_layers=blocks,
        n_heads=32 // 4,
        mlp_hidden_size=12288 // WIDTHS,
        vocab_size=126464 // WIDTHS,
    )


def llada2_mini(blocks):
    return LLaDA2MoeModelLM, LLaDA2MoeConfig(
        hidden_size=2048 // WIDTHS,
        num_hidden_layers=blocks,
        num_attention_heads=16 // 4,
        num_key_value_heads=4 // 4,
        head_dim=128 // 4,
        num_experts=256,
        intermediate_size=5120 // WIDTHS,
        moe_intermediate_size=512 // WIDTHS,
        vocab_size=157184 // WIDTHS,
    )


MODELS = {"llada": llada_8b, "llada2_moe": llada2_mini}


def build(kind, args):
    """The engine of a small model. kind: lora, full or frozen."""
    settings = scaled(args.ds_config, kind != "frozen")
    model_class, config = MODELS[args.family](args.blocks)
    with deepspeed.zero.Init(config_dict_or_path=settings):
        model = model_class(config)
    if args.recompute == "true":
        model.activation_checkpointing_enable({"use_reentrant": False})
    if kind == "lora":
        lora.add(model, 16 // WIDTHS, 2, "auto", 0, args.family)
    return engine.build(model.train().requires_grad_(False) if kind == "frozen" else model.train(), settings)


def pair(carrying):
    """A pair of random responses; `carrying` states of each carry the gradient, or all of them if None."""
    rng, made = np.random.default_rng(0), []
    prompt, *responses = (rng.integers(4, 7000, length) for length in LENGTHS)
    for response in responses:
        masked = rng.random((STATES, len(response))) < 0.5
        states = response_states(prompt, response, masked, masked.astype(np.float32), 3)
        made.append(states.carrying((np.arange(STATES) < carrying).astype(np.float32)) if carrying else states)
    return Piece(made, lambda scores: -torch.nn.functional.logsigmoid(scores[0] - scores[1]))


def step(policy, piece, tokens, ranks):
    """One pair in passes of `tokens`, and the optimizer's update; of a frozen model its scores alone."""
    if not any(parameter.requires_grad for parameter in policy.module.parameters()):
        with torch.no_grad():
            score.state_scores(policy, piece.responses, tokens, ranks)
        return

    def backward(loss, is_last):
        policy.set_gradient_accumulation_boundary(is_last)
        policy.backward(loss, scale_wrt_gas=False)

    score.score_and_backward(policy, [piece], tokens, ranks, backward)
    engine.step(policy)


def measure(what, kind, tokens, carrying, args, ranks):
    """The Row of one engine."""
    policy, passes = build(kind, args), {True: 0, False: 0}

    def count(*_):
        passes[torch.is_grad_enabled()] += 1

    policy.module.register_forward_pre_hook(count)
    with Fetches(policy.module) as fetches:
        for _ in range(STEPS):
            passes.update({True: 0, False: 0})
            fetches.forget()
            step(policy, pair(carrying), tokens, ranks)
        models = (fetches.on_demand + fetches.ahead) / fetches.total
        share = fetches.on_demand / (fetches.on_demand + fetches.ahead)
        return Row(what, passes[False], passes[True], models, share, fetches.peak * SCALE * 2 / 2**30, fetches.lost)


CASES = [  # what, kind, tokens of a pass, states that carry the gradient
    ("LoRA, one pass", "lora", 1000, None),
    ("LoRA, several passes", "lora", 60, None),
    ("LoRA, 1 state carries", "lora", 1000, 1),
    ("full, one pass", "full", 1000, None),
    ("full, several passes", "full", 60, None),
    ("full, 1 state carries", "full", 1000, 1),
    ("scores of a reference", "frozen", 60, None),
]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--ds_config", default=Path(__file__).parent.parent / "ds_configs" / "zero3_offload_4080.json")
    parser.add_argument("--family", choices=MODELS, default="llada")
    parser.add_argument("--recompute", choices=("true", "false"), default="true", help="gradient checkpointing")
    parser.add_argument("--only", default="", help="the cases whose name begins so")
    parser.add_argument("--json", help="write the table there")
    args = parser.parse_args(argv)
    ranks = engine.start()
    print(f"{'':24} {'passes':>6} {'with graph':>10} {'models':>7} {'on demand':>9} {'GiB':>5} {'lost':>4}")
    rows = []
    for case in (each for each in CASES if each[0].startswith(args.only)):
        row = measure(*case, args, ranks)
        rows.append(row._asdict())
        print(
            f"{row.what:24} {row.forwards:6} {row.backwards:10} {row.models:7.3f} {row.on_demand:9.1%} "
            f"{row.gathered_gib:5.2f} {row.lost:4}",
            flush=True,
        )
    if args.json:
        files.write_json(args.json, rows)
    return engine.leave()


if __name__ == "__main__":
    main()

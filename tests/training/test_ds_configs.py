"""Tests of ds_configs as people have them: "auto", batch sizes, schedules, and sections that do nothing here.

bash tests/run.sh tests/training/test_ds_configs.py
"""

import copy
import json

import pytest
from small import LENGTHS, ROOT, call, flags, log, make_model, make_pairs, pack, run_jobs

import config
import plan
from files import InputError
from training import deepspeed_config, footprint
from training.deepspeed_keys import FROM_THE_RUN, LIMITED, OURS, SECTIONS, WITH_A_SWITCH, WITHOUT_A_SWITCH

FROM_TRANSFORMERS = {  # as its documentation shows ZeRO-3 with offload, and every "auto" that its files are found with
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1e-5},
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": "auto"},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": "auto", "buffer_count": "auto", "nvme_path": "auto"},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": "auto",
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "max_reuse_distance": "auto",
        "stage3_gather_16bit_weights_on_model_save": "auto",
    },
    "aio": {"block_size": 262144, "thread_count": 2, "single_submit": False},
    "flops_profiler": {"enabled": False, "profile_step": 1},
    "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
ARGS = config.TrainArguments(
    lr_scheduler_type="constant", learning_rate=0.25, gradient_accumulation_steps=2, warmup_ratio=0.5
)


@pytest.fixture
def made(tmp_path):
    """made(ds_config, ranks, **changes of ARGS): the configuration of the policy's engine, in a run of 4 steps."""

    def call(section, ranks=1):
        (tmp_path / "ds.json").write_text(json.dumps(section))
        read = deepspeed_config.read_ds_config(tmp_path / "ds.json")
        return deepspeed_config.training_config(read, ARGS, config.ModelArguments(), "ds.json", ranks, 4)

    return call


def with_value(section, dotted, value):
    """A copy of a ds_config with a value at "a.b.c"."""
    section = copy.deepcopy(section)
    inner, (*parents, key) = section, dotted.split(".")
    for parent in parents:
        inner = inner.setdefault(parent, {})
    inner[key] = value
    return section


def test_every_auto_becomes_a_value(made):
    engine = made(FROM_TRANSFORMERS)
    zero, params = engine["zero_optimization"], engine["optimizer"]["params"]
    zero["offload_optimizer"].pop("nvme_path")  # read only where states are on an SSD
    assert "auto" not in json.dumps(engine)
    assert (params["lr"], params["betas"], engine["gradient_clipping"]) == (0.25, [0.9, 0.999], 1.0)
    assert zero["reduce_bucket_size"] == zero["stage3_prefetch_bucket_size"] == 5e7
    assert zero["stage3_param_persistence_threshold"] == 1e5 and zero["stage3_max_reuse_distance"] == 5e8
    assert engine["aio"]["intra_op_parallelism"] == 2 and "thread_count" not in engine["aio"]
    assert zero["sub_group_size"] == 1e9 and "overlap_comm" not in zero
    gone = {"fp16", "scheduler", "flops_profiler", "activation_checkpointing", "train_batch_size"}
    assert engine["bf16"] == {"enabled": True} and not gone & engine.keys()


def test_one_auto_at_a_time(made):
    """Wherever "auto" stands in DeepSpeed's own sections, and in a plain file of each stage."""
    for stage in range(4):
        for dotted in (*FROM_THE_RUN, *OURS, "optimizer.params.eps", "log_level", "zero_optimization.overlap_comm"):
            engine = made(with_value({"zero_optimization": {"stage": stage}}, dotted, "auto"))
            engine["zero_optimization"].pop("offload_optimizer", None)
            assert "auto" not in json.dumps(engine), dotted


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"train_batch_size": 64}, '"train_batch_size" is 64, but the run says per_device_train_batch_size x'),
        ({"scheduler.type": "WarmupDecayLR"}, "which is --lr_scheduler_type linear, but the run says constant"),
        ({"scheduler.type": "OneCycle"}, "expected one of WarmupLR, WarmupDecayLR, WarmupCosineLR"),
        ({"scheduler.params.warmup_max_lr": 1e-5}, "but the run says learning_rate = 0.25"),
        ({"scheduler.params.warmup_num_steps": 100}, "but the run says warmup_ratio x steps = 2"),
        ({"scheduler.params.total_num_steps": 100}, "but the run says steps = 4"),
        ({"scheduler.params.warmup_type": "log"}, "but the run says linear"),
        ({"fp16.enabled": True}, "fp16 is not supported; its range is too small"),
        ({"zero_optimization.offload_param.device": "auto"}, 'write "none" or "cpu"'),
        ({"zero_optimization.offload_param.device": "nvme"}, 'device "nvme" is not supported; write "cpu"'),
        ({"zero_optimization.offload_optimizer.device": "nvme", "bf16.bf16_master_weights_and_grads": True}, "float32"),
        ({"optimizer.type": "Lion"}, 'optimizer.type "Lion" is not supported; write "AdamW"'),
        ({"flops_profiler.enable": True}, "did you mean enabled?"),
        ({"zero_optimization.stage": 0, "data_types.grad_accum_dtype": "fp32"}, "stage"),
    ],
)
def test_what_contradicts_the_run_is_refused(made, changes, words):
    section = FROM_TRANSFORMERS
    for dotted, value in changes.items():
        section = with_value(section, dotted, value)
    with pytest.raises(InputError) as error:
        made(section)
    assert words in str(error.value) and "ds.json: " in str(error.value), error.value


def test_what_agrees_with_the_run_is_taken(made):
    section = with_value(FROM_TRANSFORMERS, "train_batch_size", 6)
    for dotted, value in {"warmup_max_lr": 0.25, "warmup_num_steps": 2, "warmup_type": "linear"}.items():
        section = with_value(section, f"scheduler.params.{dotted}", value)
    for kind in ("Adam", "adamw"):
        engine = made(with_value(section, "optimizer.type", kind), ranks=3)
        assert engine["optimizer"]["type"] == "AdamW"
    assert made({"zero_optimization": {"stage": 2}})["optimizer"]["params"]["torch_adam"]  # needs no CUDA toolkit


@pytest.mark.parametrize("name", [*WITH_A_SWITCH, *WITHOUT_A_SWITCH])
def test_a_section_is_off_or_refused(made, name):
    """By name and with the way out."""
    key = "enabled"
    if name in WITHOUT_A_SWITCH:
        key = next(iter(SECTIONS[name]), "x") if isinstance(SECTIONS[name], dict) else "x"
    for off in ({}, {key: False}, {key: "auto"}):
        assert name not in made({"zero_optimization": {"stage": 1}, name: off})
    with pytest.raises(InputError, match=rf"ds\.json: {name} is not supported; \w+"):
        made({"zero_optimization": {"stage": 1}, name: {key: True}})


@pytest.mark.parametrize("dotted", LIMITED)
def test_a_value_that_does_nothing_or_harm(made, dotted):
    accepted, _ = LIMITED[dotted]
    other = {bool: not accepted[0], int: 2, str: "fp16", type(None): {"topk_ratio": 0.1}}[type(accepted[0])]
    other = "fp16" if dotted.startswith("data_types") else other
    base = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
    made(with_value(base, dotted, accepted[0]))
    with pytest.raises(InputError, match=rf"{dotted} .* is not supported; \w+"):
        made(with_value(base, dotted, other))


def test_plan_takes_it(tmp_path, capsys):
    (tmp_path / "ds.json").write_text(json.dumps(FROM_TRANSFORMERS))
    tiny = ROOT / "examples" / "tiny"
    assert call(plan.main, "--model_name_or_path", tiny, "--deepspeed", tmp_path / "ds.json", "--host_gib", 64) == 0
    assert "FITS" in capsys.readouterr().out
    offload = {"stage": 3, "offload_param": {"device": "cpu"}}  # DeepSpeed locks pages unless the file says otherwise
    assert footprint.placement({"zero_optimization": offload}).parameters_locked


def test_a_run_with_it(tiny_dir, tmp_path):
    """Of transformers' file: the losses of the shipped one."""
    model = make_model(tmp_path / "model", tiny_dir)
    base = ["--data", pack(tmp_path / "packed", make_pairs(LENGTHS[:6]), model), "--use_mixed_precision", "no"]
    base += flags(max_steps=2, gradient_accumulation_steps=1, learning_rate=1e-3, warmup_ratio=0, report_to="none")
    base += ["--lr_scheduler_type", "constant"]
    section = with_value(FROM_TRANSFORMERS, "optimizer.params.torch_adam", True)
    section["zero_force_ds_cpu_optimizer"] = False
    (tmp_path / "ds.json").write_text(json.dumps(section))
    ours, theirs = [*base, "--output_dir", tmp_path / "ours"], [*base, "--output_dir", tmp_path / "theirs"]
    jobs = [("score", "score", base), ("ours", "train_dpo", ours)]
    run_jobs(tmp_path / "out", None, [*jobs, ("theirs", "train_dpo", [*theirs, "--deepspeed", tmp_path / "ds.json"])])
    losses = [[line["loss"] for line in log(tmp_path / name)] for name in ("ours", "theirs")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and losses[0][0] == pytest.approx(0.693147, abs=1e-5)

"""The keys of a ds_config: which there are, what "auto" becomes, and what is refused with the way out.

DeepSpeed itself accepts any name at the top and in optimizer.params, and ignores those that it does not know. "auto" is
transformers' (integrations/deepspeed.py): a value that the run decides, or one that the file leaves open.
"""

from typing import Literal

from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig


def of_type(kind, names):
    """{name: kind} of names in one string."""
    return dict.fromkeys(names.split(), kind)


# --- names and types: {name: type, or the names of a section} ---------------------------------------------------------

SECTIONS = {
    **of_type(int, "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps steps_per_print"),
    **of_type(float, "gradient_clipping gradient_predivide_factor"),
    **of_type(
        bool,
        "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer prescale_gradients wall_clock_breakdown "
        "memory_breakdown dump_state",
    ),
    **of_type(str, "communication_data_type log_level"),
    "bf16": DeepSpeedBF16Config,
    "fp16": dict.fromkeys(DeepSpeedFP16Config.model_fields, object) | {"enabled": bool},  # the rest is not read
    "zero_optimization": DeepSpeedZeroConfig,
    "optimizer": {
        "type": str,
        "params": {
            **of_type(float, "lr eps weight_decay"),
            **of_type(bool, "torch_adam adam_w_mode bias_correction fp32_optimizer_states"),
            "betas": tuple[float, float],
        },
        "legacy_fusion": bool,
    },
    "scheduler": {
        "type": str,
        "params": {
            **of_type(float, "warmup_min_lr warmup_max_lr cos_min_ratio warmup_min_ratio"),
            **of_type(int, "warmup_num_steps total_num_steps last_batch_iteration"),
            "warmup_type": str,
        },
    },
    "activation_checkpointing": {
        **of_type(
            bool,
            "partition_activations cpu_checkpointing contiguous_memory_optimization synchronize_checkpoint_boundary "
            "profile",
        ),
        "number_checkpoints": int | bool | None,
    },
    "aio": {
        **of_type(int, "block_size queue_depth intra_op_parallelism thread_count"),
        **of_type(bool, "single_submit overlap_events use_gds"),
    },
    "checkpoint": {
        "tag_validation": Literal["Ignore", "Warn", "Fail"],
        **of_type(bool, "load_universal use_node_local_storage"),
    },
    "comet": CometConfig,
    "comms_logger": CommsLoggerConfig,
    "csv_monitor": CSVConfig,
    "data_types": {"grad_accum_dtype": str | None},
    "flops_profiler": {
        **of_type(int, "profile_step module_depth top_modules"),
        **of_type(bool, "enabled detailed"),
        "recompute_fwd_factor": float,
        "output_file": str | None,
    },
    "tensorboard": TensorBoardConfig,
    "timers": {"throughput": DeepSpeedThroughputTimerConfig},
    "wandb": WandbConfig,
    **of_type(
        dict,
        "amp autotuning compile compression_training curriculum_learning data_efficiency elasticity expert_parallel "
        "hybrid_engine pipeline progressive_layer_drop sparse_attention tensor_parallel torch_autocast",
    ),
}

# --- "auto" -----------------------------------------------------------------------------------------------------------

FROM_THE_RUN = """train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping
    bf16.enabled optimizer.params.lr optimizer.params.betas optimizer.params.weight_decay scheduler.type
    scheduler.params.warmup_min_lr scheduler.params.warmup_max_lr scheduler.params.warmup_num_steps
    scheduler.params.warmup_type scheduler.params.total_num_steps
    zero_optimization.offload_optimizer.nvme_path""".split()
OURS = {  # ds_configs/README.md says why; any other "auto" is DeepSpeed's default
    "zero_optimization.reduce_bucket_size": 50_000_000,
    "zero_optimization.stage3_prefetch_bucket_size": 50_000_000,
    "zero_optimization.stage3_param_persistence_threshold": 100_000,
    "zero_optimization.stage3_max_live_parameters": 500_000_000,
    "zero_optimization.stage3_max_reuse_distance": 500_000_000,
    "zero_optimization.sub_group_size": 100_000_000,
}
NEVER_AUTO = {  # where parameters and states live is what a ds_config decides
    "zero_optimization.stage": "0, 1, 2 or 3",
    "zero_optimization.offload_optimizer.device": '"none", "cpu" or "nvme"',
    "zero_optimization.offload_param.device": '"none" or "cpu"',
}

SCHEDULERS = {  # DeepSpeed's name: --lr_scheduler_type
    "WarmupLR": "constant",
    "WarmupDecayLR": "linear",
    "WarmupCosineLR": "cosine",
}

# --- refused unless they are off --------------------------------------------------------------------------------------

WITH_A_SWITCH = {  # sections that count if their "enabled" is true
    "amp": 'use "bf16": {"enabled": "auto"}',
    "autotuning": "tokens_per_forward is tuned by each run, and python plan.py proposes a ds_config",
    "comet": "use --report_to wandb or tensorboard",
    "comms_logger": "leave it out",
    "compression_training": "leave it out",
    "csv_monitor": "log.jsonl in the run's folder has every step",
    "curriculum_learning": "leave it out; the order of the data is --seed's",
    "data_efficiency": "leave it out; the order of the data is --seed's",
    "elasticity": "leave it out; a run may be resumed with another number of ranks",
    "flops_profiler": "python plan.py counts the operations",
    "fp16": "its range is too small for these scores, use bf16",
    "hybrid_engine": "leave it out",
    "progressive_layer_drop": "leave it out",
    "tensorboard": "use --report_to tensorboard",
    "torch_autocast": 'use "bf16": {"enabled": "auto"}',
    "wandb": "use --report_to wandb",
}
WITHOUT_A_SWITCH = {  # sections that count if they hold anything that is not false
    "activation_checkpointing": "use --gradient_checkpointing, which recomputes every block",
    "compile": "leave it out",
    "expert_parallel": "leave it out",
    "pipeline": "leave it out",
    "sparse_attention": "leave it out",
    "tensor_parallel": "leave it out",
}
SAME_WEIGHTS = ((False,), "policy and reference would not have the same weights; leave it out")
LIMITED = {  # {key: (the values that are taken, what to do instead of another)}
    "aio.use_gds": ((False,), "leave it out"),
    "checkpoint.load_universal": ((False,), "a run is resumed from its own checkpoints; leave it out"),
    "checkpoint.use_node_local_storage": ((False,), "output_dir is one folder for all ranks; leave it out"),
    "communication_data_type": (("fp32", "bf16"), 'write "fp32" or "bf16"'),
    "data_types.grad_accum_dtype": ((None, "fp32"), 'write "fp32", or leave it out'),
    "gradient_predivide_factor": ((1,), "DeepSpeed has it without ZeRO only; leave it out"),
    "log_level": (("debug", "info", "warning", "error", "critical"), 'write "warning"'),
    "optimizer.params.adam_w_mode": ((True,), "weight decay is AdamW's; leave it out"),
    "optimizer.params.bias_correction": ((True,), "the optimizer is AdamW; leave it out"),
    "prescale_gradients": ((False,), "DeepSpeed has it without ZeRO only; leave it out"),
    "wall_clock_breakdown": ((False,), "log.jsonl has the time of each step; write false"),
    "zero_optimization.compute_grad_norm": ((True,), "each step's norm is clipped and logged; leave it out"),
    "zero_optimization.legacy_stage1": ((False,), "DeepSpeed removed it; leave it out"),
    "zero_optimization.offload_optimizer.super_offload": ((False,), "leave it out"),
    "zero_optimization.stage3_module_granularity_threshold": ((0,), "a block is fetched as it is used; leave it out"),
    "zero_optimization.zenflow": ((None,), "its steps are not AdamW's; leave it out"),
    "zero_optimization.zero_quantized_gradients": ((False,), "the gradient would be rounded; leave it out"),
    "zero_optimization.zero_quantized_nontrainable_weights": SAME_WEIGHTS,
    "zero_optimization.zero_quantized_weights": SAME_WEIGHTS,
}

"""What the free section `deepspeed:` may hold.

DeepSpeed ignores an unknown top-level key without a message, and some of its settings have no effect under this
trainer. Both are refused here, before any device is touched.
"""

import difflib
from typing import Any

FREE = {
    "comms_logger": dict,
    "dump_state": bool,
    "flops_profiler": dict,
    "memory_breakdown": bool,
    "prescale_gradients": bool,
    "gradient_predivide_factor": float,
    "steps_per_print": int,
    "wall_clock_breakdown": bool,
    "zero_optimization": dict,
}
"""Sections and settings of DeepSpeed 0.19.8 that may be given, with their type."""

FREE_ZERO = {
    "contiguous_gradients": bool,
    "enable_sanity_checks": bool,
    "ignore_unused_parameters": bool,
    "leaf_module": dict,
    "log_trace_cache_warnings": bool,
    "memory_efficient_linear": bool,
    "overlap_comm": bool,
    "override_module_apply": bool,
    "parameter_alignment": bool,
    "reduce_scatter": bool,
    "round_robin_gradients": bool,
    "stage3_allgather_sequential": bool,
    "stage3_max_live_parameters": int,
    "stage3_max_reuse_distance": int,
    "stage3_model_persistence_threshold": int,
    "stage3_module_granularity_threshold": int,
    "stage3_prefetch_bucket_size": int,
    "stage3_use_all_reduce_for_fetch_params": bool,
    "sub_group_size": int,
    "use_multi_rank_bucket_allreduce": bool,
    "zero_hpz_partition_size": int,
    "zero_quantized_gradients": bool,
    "zero_quantized_nontrainable_weights": bool,
    "zero_quantized_weights": bool,
}
"""Keys of its section `zero_optimization` that may be given, with their type."""

OWNED = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "gradient_clipping": "optimizer.gradient_clipping",
    "optimizer": "optimizer.name",
    "scheduler": "schedule.name",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "torch_autocast": "train.precision",
    "data_types": "train.precision",
    "communication_data_type": "zero.reduce_dtype",
    "tensorboard": "train.log_every",
    "compile": "train.compile",
    "activation_checkpointing": "train.activation_checkpointing",
    "zero_optimization.stage": "zero.stage",
    "zero_optimization.offload_optimizer": "zero.offload",
    "zero_optimization.offload_param": "zero.offload",
    "zero_optimization.cpu_offload": "zero.offload",
    "zero_optimization.cpu_offload_param": "zero.offload",
    "zero_optimization.cpu_offload_use_pin_memory": "zero.offload",
    "zero_optimization.reduce_bucket_size": "zero.bucket_size",
    "zero_optimization.allgather_bucket_size": "zero.bucket_size",
    "zero_optimization.param_persistence_threshold": "zero.persistence_threshold",
    "zero_optimization.stage3_param_persistence_threshold": "zero.persistence_threshold",
}
"""Keys of DeepSpeed that are set by a key of our own."""

_OWN_CHECKPOINTS = (
    "only DeepSpeed's own checkpoints use it, and they are not written here; leave it out: a checkpoint of this "
    "trainer loads at any ZeRO stage and number of GPUs"
)
WITHOUT_EFFECT = {
    "aio": "nothing is offloaded to disk here; set zero.offload=optimizer or zero.offload=parameters (host memory)",
    "autotuning": "DeepSpeed's autotuner does not run here; choose train.micro_batch_size, zero.stage and "
    "train.activation_checkpointing by what --dry-run estimates",
    "disable_allgather": "DeepSpeed does not use it any more; leave it out",
    "zero_optimization.allgather_partitions": "DeepSpeed does not use it any more; leave it out",
    "zero_optimization.compute_grad_norm": "the trainer needs the gradient norm to clip; leave it out",
    "zero_optimization.elastic_checkpoint": _OWN_CHECKPOINTS,
    "zero_optimization.gather_16bit_weights_on_model_save": _OWN_CHECKPOINTS,
    "zero_optimization.legacy_stage1": "DeepSpeed does not support it any more; leave it out",
    "zero_optimization.load_from_fp32_weights": _OWN_CHECKPOINTS,
    "zero_optimization.pipeline_loading_checkpoint": _OWN_CHECKPOINTS,
    "zero_optimization.save_muon_momentum_buffer_in_memory": "there is no Muon optimizer here; leave it out",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": _OWN_CHECKPOINTS,
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": _OWN_CHECKPOINTS,
    "zero_optimization.zenflow": "the trainer does not support it; leave it out, or set zero.offload=optimizer",
}
"""Keys of DeepSpeed that have no effect here, or that the trainer cannot work with: why, and what to do instead."""


def deepspeed_problems(section: dict[str, Any]) -> list[str]:
    """Check the section `deepspeed`; returns what is wrong with it, one line per key."""
    found = _problems(section, FREE, prefix="")
    inner = section.get("zero_optimization")
    return found + (_problems(inner, FREE_ZERO, prefix="zero_optimization.") if isinstance(inner, dict) else [])


def _problems(section: dict[str, Any], free: dict[str, type], prefix: str) -> list[str]:
    """What is wrong with the keys of one mapping, which `prefix` leads to."""
    found = []
    for name, value in section.items():
        key = f"{prefix}{name}"
        if key in OWNED:
            found.append(f"deepspeed.{key}: has its own key here; set {OWNED[key]} instead")
        elif key in WITHOUT_EFFECT:
            found.append(f"deepspeed.{key}: {WITHOUT_EFFECT[key]}")
        elif name not in free:
            near = difflib.get_close_matches(str(name), free, n=1)
            fix = f"did you mean {prefix}{near[0]}?" if near else f"use one of {', '.join(free)}"
            found.append(f"deepspeed.{key}: is not among the keys that may be given; {fix}")
        elif not _has_type(value, free[name]):
            found.append(f"deepspeed.{key}: {value!r} is not of type {free[name].__name__}; see DeepSpeed's reference")
    return found


def _has_type(value: object, kind: type) -> bool:
    """Whether a value from YAML has a type; a number without a fraction is an integer (1.0e+9), a boolean is none."""
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return isinstance(value, (int, float) if kind is float else kind)

"""What the free section `deepspeed:` may hold. DeepSpeed itself ignores unknown top-level keys without a word."""

from typing import Any

FREE = {
    "activation_checkpointing": dict,
    "aio": dict,
    "autotuning": dict,
    "comms_logger": dict,
    "compile": dict,
    "disable_allgather": bool,
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
    "zero_optimization.stage": "zero.stage",
    "zero_optimization.offload_optimizer": "zero.offload",
    "zero_optimization.offload_param": "zero.offload",
    "zero_optimization.reduce_bucket_size": "zero.bucket_size",
    "zero_optimization.allgather_bucket_size": "zero.bucket_size",
    "zero_optimization.stage3_param_persistence_threshold": "zero.persistence_threshold",
}
"""Keys of DeepSpeed that have their one place in our configuration."""


def deepspeed_problems(section: dict[str, Any]) -> list[str]:
    """What is wrong with the section `deepspeed`, one line each."""
    inner = section.get("zero_optimization")
    keys = [*section, *(f"zero_optimization.{key}" for key in (inner if isinstance(inner, dict) else ()))]
    found = [f"deepspeed.{key}: has its own key here; set {OWNED[key]} instead" for key in keys if key in OWNED]
    for key, value in section.items():
        if key in OWNED:
            continue
        if key not in FREE:
            found.append(f"deepspeed.{key}: is not among what may be given; use one of {', '.join(FREE)}")
        elif not isinstance(value, (int, float) if FREE[key] is float else FREE[key]):
            found.append(f"deepspeed.{key}: {value!r} is not of type {FREE[key].__name__}; see DeepSpeed's reference")
    return found

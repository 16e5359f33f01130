"""What the free section `deepspeed:` may hold.

DeepSpeed ignores an unknown top-level key without a message, and some of its settings have no effect under this
trainer. Both are refused here, before any device is touched.
"""

import difflib
from dataclasses import dataclass
from typing import Any

LOG = "DeepSpeed's log is kept at warnings here; use profile.steps"
"""Why a setting that only writes into DeepSpeed's log has no effect."""


@dataclass(frozen=True, kw_only=True)
class FreeKey:
    """A section or setting of DeepSpeed that may be given."""

    kind: type
    """Type of its value."""
    stages: tuple[int, ...] = (0, 1, 2, 3)
    """ZeRO stages at which DeepSpeed reads it."""
    sums: bool = False
    """Whether it is about how DeepSpeed runs a micro-batch and sums its gradients, which it does not do at ZeRO stages
    1 and 2 on GPUs (colt5dist/train/engine/flat_gradients.py)."""
    nowhere: str = ""
    """Why it has no effect anywhere here."""
    changes_result: bool = False
    """Whether the losses depend on it, so that a resumed run may not change it."""


FREE = {
    "comms_logger": FreeKey(kind=dict, nowhere=LOG),
    "dump_state": FreeKey(kind=bool, nowhere=LOG),
    "flops_profiler": FreeKey(kind=dict, sums=True),
    "memory_breakdown": FreeKey(kind=bool, nowhere=LOG),
    "prescale_gradients": FreeKey(kind=bool, sums=True, changes_result=True),
    "gradient_predivide_factor": FreeKey(kind=float, sums=True, changes_result=True),
    "steps_per_print": FreeKey(kind=int, nowhere=LOG),
    "wall_clock_breakdown": FreeKey(kind=bool, nowhere=LOG),
    "zero_optimization": FreeKey(kind=dict),
}
"""Sections and settings of DeepSpeed 0.19.8 that may be given."""

SHARDED, STAGES_1_AND_2, STAGE_3 = (1, 2, 3), (1, 2), (3,)
FREE_ZERO = {
    "contiguous_gradients": FreeKey(kind=bool, stages=SHARDED, sums=True),
    "enable_sanity_checks": FreeKey(kind=bool, stages=STAGE_3),
    "ignore_unused_parameters": FreeKey(kind=bool, stages=STAGES_1_AND_2, sums=True),
    "leaf_module": FreeKey(kind=dict, stages=STAGE_3),
    "log_trace_cache_warnings": FreeKey(kind=bool, stages=STAGE_3),
    "memory_efficient_linear": FreeKey(kind=bool, stages=STAGE_3),
    "overlap_comm": FreeKey(kind=bool, stages=SHARDED, sums=True),
    "override_module_apply": FreeKey(kind=bool, stages=STAGE_3),
    "parameter_alignment": FreeKey(kind=bool, stages=STAGES_1_AND_2),
    "reduce_scatter": FreeKey(kind=bool, stages=SHARDED, sums=True),
    "round_robin_gradients": FreeKey(kind=bool, stages=STAGES_1_AND_2),
    "stage3_allgather_sequential": FreeKey(kind=bool, stages=STAGE_3),
    "stage3_max_live_parameters": FreeKey(kind=int, stages=STAGE_3),
    "stage3_max_reuse_distance": FreeKey(kind=int, stages=STAGE_3),
    "stage3_model_persistence_threshold": FreeKey(kind=int, stages=STAGE_3),
    "stage3_module_granularity_threshold": FreeKey(kind=int, stages=STAGE_3),
    "stage3_prefetch_bucket_size": FreeKey(kind=int, stages=STAGE_3),
    "stage3_use_all_reduce_for_fetch_params": FreeKey(kind=bool, stages=STAGE_3),
    "sub_group_size": FreeKey(kind=int, stages=STAGE_3),
    "use_multi_rank_bucket_allreduce": FreeKey(kind=bool, stages=STAGES_1_AND_2, sums=True),
    "zero_hpz_partition_size": FreeKey(kind=int, stages=STAGE_3),
    "zero_quantized_gradients": FreeKey(kind=bool, stages=STAGE_3, changes_result=True),
    "zero_quantized_nontrainable_weights": FreeKey(kind=bool, stages=STAGE_3, changes_result=True),
    "zero_quantized_weights": FreeKey(kind=bool, stages=STAGE_3, changes_result=True),
}
"""Keys of its section `zero_optimization` that may be given."""

FLOPS_PROFILER = (
    "enabled",
    "recompute_fwd_factor",
    "profile_step",
    "module_depth",
    "top_modules",
    "detailed",
    "output_file",
)
"""Keys of its section `flops_profiler`, which DeepSpeed itself does not check."""

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
    inner, profiler = section.get("zero_optimization"), section.get("flops_profiler")
    if isinstance(profiler, dict):
        found += [
            f"deepspeed.flops_profiler.{name}: no such key; use one of {', '.join(FLOPS_PROFILER)}"
            for name in profiler
            if name not in FLOPS_PROFILER
        ]
    return found + (_problems(inner, FREE_ZERO, prefix="zero_optimization.") if isinstance(inner, dict) else [])


def keeps_result_in_deepspeed(key: str) -> bool:
    """Whether a setting such as `deepspeed.zero_optimization.overlap_comm` leaves the result of a run as it is."""
    outer, _, inner = key.removeprefix("deepspeed.").partition(".")
    known, name = (FREE_ZERO, inner.split(".")[0]) if outer == "zero_optimization" else (FREE, outer)
    return name in known and not known[name].changes_result


def _problems(section: dict[str, Any], free: dict[str, FreeKey], prefix: str) -> list[str]:
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
        elif not _has_type(value, free[name].kind):
            found.append(
                f"deepspeed.{key}: {value!r} is not of type {free[name].kind.__name__}; see DeepSpeed's reference"
            )
    return found


def _has_type(value: object, kind: type) -> bool:
    """Whether a value from YAML has a type; a number without a fraction is an integer (1.0e+9), a boolean is none."""
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return isinstance(value, (int, float) if kind is float else kind)

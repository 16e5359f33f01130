"""The JSON that DeepSpeed gets, derived from ours: batch sizes, clipping and number formats exist once."""

import os
from typing import Any

import torch
from omegaconf import OmegaConf
from pydantic import ValidationError

from colt5dist.train.config.schema import RunConfig


def uses_bf16(config: RunConfig, on_gpu: bool) -> bool:
    """Whether forward and backward run in bf16."""
    return config.train.precision == "bf16" or (config.train.precision == "auto" and on_gpu)


def engine_stage(config: RunConfig, on_gpu: bool) -> int:
    """ZeRO stage that DeepSpeed is given.

    DeepSpeed's stage 0 in bf16 takes an optimizer step with empty gradients when it is built and so trains another
    model; stage 1 is the same arithmetic without that, and is used instead.
    """
    stage = int(config.zero.stage)
    return 1 if stage == 0 and uses_bf16(config, on_gpu) else stage


def sums_flat(config: RunConfig, on_gpu: bool) -> bool:
    """Whether gradients are summed by us (`GradientSums`), not by DeepSpeed."""
    return on_gpu and engine_stage(config, on_gpu) > 0 and config.zero.offload == "none"


def library_problems(config: RunConfig, world_size: int, on_gpu: bool) -> list[str]:
    """Have DeepSpeed itself check what the section `deepspeed` holds, before it has a process group or a model.

    Args:
        config: the run.
        world_size: number of processes.
        on_gpu: whether it runs on GPUs.

    Returns:
        What is wrong, one line per key.
    """
    if not config.deepspeed:
        return []
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    merged = deepspeed_config(config, world_size, on_gpu)
    zero, stage = merged["zero_optimization"], engine_stage(config, on_gpu)
    found = []
    for title, kind in (("zero_optimization", DeepSpeedZeroConfig), ("comms_logger", CommsLoggerConfig)):
        try:
            kind(**merged.get(title, {}))
        except (ValueError, TypeError, AssertionError) as error:
            details = error.errors() if isinstance(error, ValidationError) else [{"loc": (), "msg": str(error)}]
            for detail in details:
                key = ".".join(["deepspeed", title, *map(str, detail["loc"])])
                found.append(f"{key}: {str(detail['msg']).splitlines()[0]}; see DeepSpeed's reference")
    factor = merged.get("gradient_predivide_factor", 1.0)
    if not factor > 0:
        found.append(f"deepspeed.gradient_predivide_factor: {factor} is not positive; use a number above 0")
    if stage in (2, 3) and zero.get("reduce_scatter", True):
        given = {
            "gradient_predivide_factor": factor != 1,
            "prescale_gradients": merged.get("prescale_gradients", False),
        }
        found += [
            f"deepspeed.{name}: needs deepspeed.zero_optimization.reduce_scatter=false at ZeRO stage {stage}; set it"
            for name, changed in given.items()
            if changed
        ]
    part = min(int(zero.get("zero_hpz_partition_size", 1) or 1), world_size)
    if stage == 3 and part > 0 and world_size % part:
        found.append(
            f"deepspeed.zero_optimization.zero_hpz_partition_size: {part} does not divide {world_size} processes; use "
            "a divisor"
        )
    return found


def max_live_parameters(config: RunConfig) -> int:
    """Elements of weights up to which ZeRO stage 3 keeps layers gathered: DeepSpeed's default, unless it is given."""
    given: Any = config.deepspeed.get("zero_optimization", {})
    return int(given.get("stage3_max_live_parameters", 1_000_000_000))


def deepspeed_config(config: RunConfig, world_size: int, on_gpu: bool) -> dict[str, Any]:
    """Derive DeepSpeed's configuration."""
    bf16, stage = uses_bf16(config, on_gpu), engine_stage(config, on_gpu)
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": config.zero.bucket_size,
        "allgather_bucket_size": config.zero.bucket_size,
        "contiguous_gradients": True,
        "overlap_comm": on_gpu,
    }
    if stage == 3:
        zero.pop("allgather_bucket_size")
        zero["stage3_param_persistence_threshold"] = config.zero.persistence_threshold
        # else DeepSpeed replaces torch's linear function in the whole process, by one that no compiler sees through
        zero["memory_efficient_linear"] = False
    if config.zero.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    if config.zero.offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
    derived: dict[str, Any] = {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size(world_size),
        "gradient_accumulation_steps": config.gradient_accumulation_steps(world_size),
        # at stage 0 the trainer clips, because DeepSpeed would apply a gradient that is not finite
        "gradient_clipping": config.optimizer.gradient_clipping if stage else 0.0,
        "zero_optimization": zero,
        # torch's fused AdamW works on host memory as well and needs no compiler
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": False,
        "bf16": {"enabled": bf16},
    }
    if bf16:
        derived["data_types"] = {"grad_accum_dtype": "fp32"}
        derived["communication_data_type"] = config.zero.reduce_dtype
    if config.deepspeed:
        merged = OmegaConf.to_container(OmegaConf.merge(derived, config.deepspeed), resolve=True)
        assert isinstance(merged, dict)
        return {str(key): value for key, value in merged.items()}
    return derived

"""The JSON that DeepSpeed gets, derived from ours: batch sizes, clipping and number formats exist once."""

from typing import Any

from omegaconf import OmegaConf

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

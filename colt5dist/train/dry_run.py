"""What a configuration would do and need, without GPUs, shards or other processes."""

from colt5dist.data.mixture import length_notes, lengths_of_mixture, parse_mixture, required_sentinels
from colt5dist.errors import ConfigError
from colt5dist.train.accounting import state_memory, step_flops
from colt5dist.train.activation_memory import activation_bytes
from colt5dist.train.checkpoint import checkpoint_bytes
from colt5dist.train.config import RunConfig
from colt5dist.train.config_file import config_to_yaml
from colt5dist.train.engine import num_elements, parameter_shapes

WORLD_SIZES = (1, 8, 64)


def dry_run_report(config: RunConfig, world_size: int) -> str:
    """The resolved configuration and the figures that follow from it, as text.

    Args:
        config: the run.
        world_size: devices of this start; the memory table shows some more.

    Raises:
        ConfigError: the batch sizes do not divide among the devices.
    """
    problems = config.batch_problems(world_size)
    if problems:
        raise ConfigError("\n".join(problems))
    train = config.train
    num_parameters = sum(num_elements(shape) for shape in parameter_shapes(config).values())
    lines = [
        config_to_yaml(config).rstrip(),
        "",
        f"parameters: {num_parameters:,}",
        f"checkpoint: {checkpoint_bytes(num_parameters) / 1e9:.2f} GB, up to {config.checkpoint.keep_last + 1} at once",
        f"sentinels needed: {required_sentinels(config.data)}",
        f"tokens of the run: {run_tokens(config):,} input in {train.steps:,} steps",
    ]
    first_steps = [1, *(entry.step for entry in config.data.length_schedule)]
    for first_step, stage in zip(first_steps, config.stages, strict=True):
        if len(first_steps) > 1:
            lines.append(f"from step {first_step:,} on:")
        lines += stage_lines(stage, world_size)
    lines.append("model states a GPU in GB (activations come on top):")
    sizes = sorted({world_size, *WORLD_SIZES})
    lines.append("  ZeRO stage " + "".join(f"{f'{size} GPUs':>12}" for size in sizes))
    tables = [state_memory(config, num_parameters, size, on_gpu=True) for size in sizes]
    for row in zip(*tables, strict=True):
        lines.append(f"  {row[0].stage:<10} " + "".join(f"{cell.device_bytes / 1e9:>12.2f}" for cell in row))
    return "\n".join(lines)


def run_tokens(config: RunConfig) -> int:
    """Input tokens of the whole run."""
    bounds = [1, *(entry.step for entry in config.data.length_schedule), config.train.steps + 1]
    return config.train.global_batch_size * sum(
        stage.data.input_length * max(0, min(stop, config.train.steps + 1) - first)
        for stage, first, stop in zip(config.stages, bounds, bounds[1:], strict=False)
    )


def stage_lines(stage: RunConfig, world_size: int) -> list[str]:
    """Batch, work, activations and data plan at the lengths of one stage."""
    data, batch = stage.data, stage.train.global_batch_size
    micro_batch_size = stage.micro_batch_size(world_size)
    accumulation = stage.gradient_accumulation_steps(world_size)
    activations = activation_bytes(stage, micro_batch_size, on_gpu=True) / 1e9
    lines = [
        f"batch: {batch} samples = {world_size} devices x {accumulation} micro-batches x {micro_batch_size}",
        f"tokens a step: {batch * data.input_length:,} input, at most {batch * data.target_length:,} target",
        f"FLOPs a step: {step_flops(stage):.3e} (multiply-add = 2, backward = 2 forwards, as routed)",
        f"activations a GPU: about {activations:.2f} GB, or less (activation checkpointing: "
        f"{stage.train.activation_checkpointing})",
        "data plan (tokens of a full sample):",
    ]
    lengths = lengths_of_mixture(data.mixture, data.input_length, data.target_length)
    for name, length in zip(parse_mixture(data.mixture).names, lengths, strict=True):
        lines.append(
            f"  {name:<10} {length.raw_tokens:>7} of text -> {length.input_tokens:>7} input, "
            f"{length.target_tokens:>6} target, {length.num_spans:>5} sentinels"
        )
    return lines + [f"  note: {note}" for note in length_notes(data)]

"""The report of `--dry-run`: what a run would do and need, without GPUs, shards or other processes."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter

import torch

from colt5dist.data.order.mixture import lengths_of_mixture, parse_mixture
from colt5dist.data.sample_lengths import length_notes, required_sentinels, text_tokens_of_sample
from colt5dist.errors import ConfigError
from colt5dist.train.checkpoint import checkpoint_bytes
from colt5dist.train.config.load import config_to_yaml
from colt5dist.train.config.schema import RunConfig
from colt5dist.train.engine.deepspeed_json import engine_stage, library_problems, max_live_parameters
from colt5dist.train.engine.engine import build_model, num_elements, parameter_shapes
from colt5dist.train.optimizer.groups import muon_matrices, num_moments
from colt5dist.train.report.accounting import (
    describe_batch,
    gathered_elements,
    state_memory,
    step_flops,
    tokens_of_run,
)
from colt5dist.train.report.activation_memory import activation_bytes
from colt5dist.train.report.plan import cluster, plan_report
from colt5dist.train.report.without_effect import settings_without_effect
from colt5dist.wording import count

WORLD_SIZES = (1, 8, 64)


def dry_run_report(config: RunConfig, world_size: int, *, num_gpus: int | None = None) -> str:
    """Write the resolved configuration and the figures that follow from it as text.

    Args:
        config: the run.
        world_size: number of processes that make the report, and so of devices.
        num_gpus: number of devices instead; None: not given. The memory table shows further numbers.

    Returns:
        The report, several lines.

    Raises:
        ConfigError: the number of devices is not positive, the batch sizes do not divide among them, or DeepSpeed
            refuses its section.
    """
    if num_gpus is not None and num_gpus < 1:
        raise ConfigError(f"--gpus: {num_gpus} is not positive; use 1 or more")
    is_alone = num_gpus is None and world_size == 1
    world_size = num_gpus or world_size
    problems = config.batch_problems(world_size) or library_problems(config, world_size, on_gpu=True)
    if problems:
        raise ConfigError("\n".join(problems))
    train = config.train
    shapes = parameter_shapes(config)
    num_parameters = sum(map(num_elements, shapes.values()))
    run_tokens = [tokens_of_run(config, attrgetter(f"{side}_length")) for side in ("input", "target")]
    lines = [
        config_to_yaml(config).rstrip(),
        "",
        f"parameters: {num_parameters:,}",
        *optimizer_lines(config),
        f"checkpoint: {checkpoint_bytes(shapes, config) / 1e9:.2f} GB; {config.checkpoint.keep_last} are kept, plus "
        f"{'the best one, and ' if config.checkpoint.keep_best else ''}one while it is written",
        f"sentinels needed: {0 if config.data.is_pairs else required_sentinels(config.data)}",
        f"tokens of the run: {input_and_target(*run_tokens)}, in {count(train.steps, 'step')}",
        f"pairs of the run: {train.steps * train.global_batch_size:,} (a start prints how many passes over the shards "
        "that is)"
        if config.data.is_pairs
        else f"text of the run: {tokens_of_run(config, text_tokens_of_sample):,} tokens before corruption (a start "
        "prints how many passes over the shards that is)",
    ]
    for first_step, stage in zip(config.stage_starts, config.stages, strict=True):
        if len(config.stages) > 1:
            lines.append(f"from step {first_step:,} on:")
        lines += stage_lines(stage, world_size, is_alone=is_alone)
    lines.append("model states per GPU in GB (activations come on top):")
    sizes = sorted({world_size, *WORLD_SIZES})
    lines.append("  ZeRO stage " + "".join(f"{count(size, 'GPU'):>12}" for size in sizes))
    gathered = gathered_elements(shapes, max_live_parameters(config))
    kept = num_moments(shapes, config.optimizer)
    tables = [
        state_memory(config, num_parameters, size, on_gpu=True, num_gathered=gathered, num_moments=kept)
        for size in sizes
    ]
    for row in zip(*tables, strict=True):
        lines.append(f"  {row[0].stage:<10} " + "".join(f"{cell.device_bytes / 1e9:>12.2f}" for cell in row))
    if engine_stage(replace(config, zero=replace(config.zero, stage=0)), on_gpu=True) == 1:
        lines.append(
            "  note: in bf16 stage 0 runs as stage 1, hence the same memory (DeepSpeed's stage 0 trains differently)"
        )
    lines += [f"note: {line}" for line in settings_without_effect(config, on_gpu=True)]
    return "\n".join(lines)


def plan_or_reason(config_file: str, settings: Sequence[str], num_gpus: int) -> str:
    """Write the plan of the run as text, or one line that says why there is none: that is no reason not to train.

    Args:
        config_file: YAML file of the run, which loads with `settings`.
        settings: `key=value` texts that replace the file's.
        num_gpus: number of GPUs.
    """
    try:
        return plan_report(config_file, settings, cluster(num_gpus))
    except ConfigError as error:
        return f"no plan: {'; '.join(str(error).splitlines())}"


def optimizer_lines(config: RunConfig) -> list[str]:
    """Which parameters are Muon's and which are AdamW's; nothing where one optimizer has all.

    Args:
        config: the run.
    """
    if config.optimizer.name != "muon":
        return []
    with torch.device("meta"):
        model = build_model(config)
    matrices = muon_matrices(model)
    found: Counter[tuple[str, str]] = Counter()
    num_elements_of: Counter[str] = Counter()
    for name, p in model.named_parameters():
        optimizer = "muon" if name in matrices else "adamw"
        text = f"{re.sub(r'[.][0-9]+[.]', '.*.', name)} {' x '.join(map(str, p.shape))}"
        if name in matrices and matrices[name].num_maps > 1:
            text += f", as {matrices[name].num_maps} of {p.shape[0] // matrices[name].num_maps} x {p.shape[1]}"
        found[optimizer, text] += 1
        num_elements_of[optimizer] += p.numel()
    heading = f"muon for {num_elements_of['muon']:,} parameters, adamw for {num_elements_of['adamw']:,}"
    rows = sorted(found.items(), key=lambda row: row[0][0] != "muon")  # otherwise in the model's order
    return [f"optimizer: {heading}:", *(f"  {of:<6} {count(number, 'time')} {text}" for (of, text), number in rows)]


def input_and_target(num_input: int, num_target: int) -> str:
    """Numbers of input and target tokens as text; a decoder-only model has no input."""
    return (f"{num_input:,} input, " if num_input else "") + f"at most {num_target:,} target"


def stage_lines(stage: RunConfig, world_size: int, *, is_alone: bool) -> list[str]:
    """Lines on one stage of the run: batch, FLOPs, memory of activations, and data plan.

    Args:
        stage: configuration of the stage.
        world_size: number of devices.
        is_alone: whether the one device stands for this process, and no number of GPUs was given.
    """
    data, batch = stage.data, stage.train.global_batch_size
    activations = activation_bytes(stage, stage.micro_batch_size(world_size), on_gpu=True) / 1e9
    lines = [
        f"batch: {count(batch, 'sample')} = {describe_batch(stage, world_size)}"
        f"{' (1 device: this process alone; --gpus N for a run on N GPUs)' if is_alone else ''}",
        f"tokens per step: {input_and_target(batch * data.input_length, batch * data.target_length)}",
        f"FLOPs per step: {step_flops(stage):.3e} (multiply-add = 2, backward = 2 forwards, as routed)",
        f"activations per GPU: about {activations:.2f} GB, or less (activation checkpointing: "
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

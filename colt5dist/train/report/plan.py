"""The plan of a run on N GPUs: what fits into their memory, how long it takes, what its checkpoints need.

The states' memory is exact, that of activations follows from shapes. What is on top (`GAP_SHARE`), how fast a GPU
computes (`MEASURED_MFU`) and what collectives cost within a host (`BYTES_PER_SECOND_IN_HOST`, `STAGE_3_FACTOR`) comes
from runs on H100s and H200s in bf16; for other GPUs, for more than two of them and between hosts it is assumed.
"""

import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import attrgetter
from typing import Any

from colt5dist.errors import ConfigError
from colt5dist.packaged import pretrain_target
from colt5dist.train.checkpoint import checkpoint_bytes
from colt5dist.train.config.include import FREE_SECTIONS
from colt5dist.train.config.load import load_config
from colt5dist.train.config.schema import RunConfig
from colt5dist.train.engine.deepspeed_json import engine_stage, max_live_parameters, uses_bf16
from colt5dist.train.engine.engine import num_elements, parameter_shapes
from colt5dist.train.optimizer.groups import num_moments
from colt5dist.train.report.accounting import (
    StateMemory,
    gathered_elements,
    peak_flops_of,
    state_memory,
    step_flops,
    tokens_of_run,
)
from colt5dist.train.report.activation_memory import KeptBytes, kept_bytes
from colt5dist.wording import count

GIB = 2**30
CUDA_BYTES = GIB
"""What the driver, the libraries' workspaces and NCCL take beside PyTorch."""
LARGEST_SHARE = 0.95
"""Of a GPU's memory, which a plan may use: estimate and measurement differ by up to 5 %."""
GAP_SHARE = 0.04
"""Of activations, which PyTorch reserves besides; fitted to the measured peaks that tests/train/report/test_plan.py
lists."""

MEASURED_MFU = ((433e6, 0.372), (1463e6, 0.396), (5297e6, 0.370))
"""Parameters and share of the peak, inputs of 4096 tokens, one H100, ZeRO stage 1; XL from two H200s at stage 3, where
`H200_FACTOR` and `STAGE_3_FACTOR` cancel."""
H200_FACTOR = 1.06
"""Share of the peak on an H200 beside an H100: measured 1.06 to 1.07, Base at three lengths and Large; the H100 ran
before AdamW was one kernel."""
LENGTH_FACTOR = ((4096, 1.0), (16_384, 0.981), (65_536, 0.978))
"""Length of the input and speed beside that of 4096 tokens, of Base."""
RECOMPUTE_FACTOR = 4 / 3
"""Time of a pass with activation checkpointing: a second forward pass beside one forward and the two of backward."""
BYTES_PER_SECOND_IN_HOST = 250e9
"""Rate at which a GPU sends in collectives between GPUs of one host (NVLink). Measured: at stages 1 and 2, Base on two
H200s takes 5 ms longer than on one, for 1.3 GB that each sends while it does not compute."""
STAGE_3_FACTOR = 1.06
"""Time of a pass at stage 3 on several GPUs, whose collectives run beside it on some of the multiprocessors. Measured:
Base on two H200s does 93.7 and 95.0 % of twice one."""
BYTES_PER_SECOND_BETWEEN_HOSTS = 25e9
"""Assumed rate for each GPU between hosts (200 Gbit/s)."""

MEMORY_GB = {"H200": 141.0, "H100 NVL": 94.0, "H100": 80.0, "H800": 80.0, "L40S": 48.0, "L4": 24.0, "A10": 24.0}
"""Memory by a part of the GPU's name where it has one size, from data sheets; the first match counts. Else 80 GB."""

EQUAL_SECONDS = 1e-3
"""Step times that differ by less are equal: launching a step's kernels alone takes longer, and is not estimated."""

PLANNED_KEYS = ("zero.stage", "train.micro_batch_size", "train.activation_checkpointing")
"""What a plan chooses, unless it is given."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way to run: memory in bytes per GPU, time in seconds per optimizer step."""

    stage: int
    """ZeRO stage."""
    checkpointing: str
    """train.activation_checkpointing."""
    micro_batch_size: int
    """Samples that a GPU processes at once."""
    state_bytes: int
    """Weights, float32 copies and moments."""
    gradient_bytes: int
    """Gradients and their sums."""
    activation_bytes: int
    """What a pass keeps, with the logits and the layer that is recomputed."""
    bucket_bytes: int
    """What is being sent to other GPUs."""
    gap_bytes: int
    """Gaps between PyTorch's blocks."""
    memory_bytes: int
    """Of a GPU."""
    step_seconds: float
    """Expected."""

    @property
    def reserved_bytes(self) -> int:
        """What PyTorch reserves: `peak_memory_bytes` of metrics.jsonl."""
        return self.state_bytes + self.gradient_bytes + self.activation_bytes + self.bucket_bytes + self.gap_bytes

    @property
    def total_bytes(self) -> int:
        """What the GPU holds."""
        return self.reserved_bytes + CUDA_BYTES

    @property
    def fits(self) -> str:
        """`yes`, `tight` (with less than 5 % to spare) or `no`."""
        if self.total_bytes <= LARGEST_SHARE * self.memory_bytes:
            return "yes"
        return "tight" if self.total_bytes <= self.memory_bytes else "no"


@dataclass(frozen=True)
class Cluster:
    """The GPUs that a run is planned for."""

    num_gpus: int
    """In all."""
    num_hosts: int
    """Hosts, which have the same number of GPUs each."""
    memory_bytes: int
    """Of one GPU."""
    name: str
    """Of the GPU, as in `accounting.PEAK_BF16_FLOPS`."""
    peak_flops: float
    """Dense bf16 peak of one GPU per second."""
    assumes_memory: bool = False
    """Whether `memory_bytes` was neither given nor follows from the name."""


def cluster(num_gpus: int, num_hosts: int | None = None, gpu_memory: float | None = None, gpu: str = "H100") -> Cluster:
    """Describe the GPUs.

    Args:
        num_gpus: in all.
        num_hosts: None: eight GPUs a host.
        gpu_memory: of one GPU, in GiB, which vendors call GB; None: that of `MEMORY_GB`.
        gpu: name of the GPU.

    Raises:
        ConfigError: the numbers do not fit, or the peak of the GPU is not known.
    """
    if num_gpus < 1:
        raise ConfigError(f"--gpus: {num_gpus} is not positive; use 1 or more")
    hosts = -(-num_gpus // 8) if num_hosts is None else num_hosts
    if hosts < 1 or num_gpus % hosts:
        fix = "give --hosts of launch/plan.py a number that divides them"
        raise ConfigError(f"--gpus: {num_gpus} GPUs do not divide among {count(hosts, 'host')}; {fix}")
    if gpu_memory is not None and not 0 < gpu_memory < math.inf:
        wrong = "not positive" if gpu_memory <= 0 else "not a finite number"
        raise ConfigError(f"--gpu-memory: {gpu_memory} is {wrong}; use a number of GB, for instance 80")
    peak = peak_flops_of(gpu)
    if peak is None:
        raise ConfigError(f"--gpu: the peak of {gpu!r} is not known; use for instance H100, H200, A100 or L40S")
    known = next((size for part, size in MEMORY_GB.items() if re.search(rf"\b{part}\b", gpu)), None)
    size = gpu_memory or known or 80
    return Cluster(num_gpus, hosts, round(size * GIB), gpu, peak, gpu_memory is None and known is None)


def plan_report(config_file: str, settings: Sequence[str], gpus: Cluster, tokens: float | None = None) -> str:
    """Write the plan of a run as text.

    Args:
        config_file: YAML file of the run.
        settings: `key=value` texts that replace the file's; what they say of ZeRO stage, micro-batch and activation
            checkpointing is not varied.
        gpus: the GPUs.
        tokens: input and target tokens that the run is to read; None: those of train.steps.

    Returns:
        Several lines.

    Raises:
        ConfigError: the configuration is wrong, or the batch does not divide among the GPUs.
    """
    given = set(PLANNED_KEYS) & _by_key(settings).keys()
    config = _load(config_file, settings, given)
    if problems := config.batch_problems(gpus.num_gpus):
        raise ConfigError("\n".join(problems))
    if tokens is not None and not 1 <= tokens < math.inf:
        wrong = "not positive" if tokens <= 0 else "less than one" if tokens < 1 else "not a finite number"
        raise ConfigError(f"--tokens: {tokens} is {wrong}; use for instance 1e11")
    options = plan_options(config, gpus, given)
    best = recommend(options)
    data, batch = config.data, config.train.global_batch_size
    if tokens is None:
        tokens = sum(tokens_of_run(config, attrgetter(f"{side}_length")) for side in ("input", "target"))
    steps = math.ceil(tokens / (batch * (data.input_length + data.target_length)))
    shapes = parameter_shapes(config)
    num_parameters = sum(map(num_elements, shapes.values()))
    lines = [
        f"plan: {count(gpus.num_gpus, 'GPU')} ({gpus.name}, {gpus.memory_bytes / GIB:g} GiB each) on "
        f"{count(gpus.num_hosts, 'host')}, {num_parameters:,} parameters",
        f"a step: {count(batch, 'sample')} of {data.input_length:,}/{data.target_length:,} tokens, "
        f"{step_flops(config):.3e} FLOPs; {tokens:.4g} tokens take {count(steps, 'step')}",
        "memory in GiB per GPU, an estimate; fits: tight = with less than 5 % to spare",
        f"  {'stage':>5} {'checkpointing':<17} {'micro-batch':>11} {'states':>7} {'gradients':>9} {'activations':>11} "
        f"{'buckets':>7} {'gaps':>7} {'CUDA':>5} {'total':>7}  {'fits':<5} {'s/step':>8} {'days':>8}",
        *(_row(option, steps, "*" if option is best else " ") for option in shown(options, best)),
        _checkpoint_line(config, checkpoint_bytes(shapes, config), steps),
        *_notes(config, gpus, num_parameters, options),
    ]
    offload = config.zero.offload
    if best is None:
        fix = "more GPUs (--gpus), GPUs with more memory or shorter inputs"
        end = f"nothing fits: use {fix}" + ("" if config.optimizer.name == "muon" else ", or try zero.offload")
        if offload != "none":
            end = f"nothing fits without zero.offload={offload}, which is not planned: try it, or use {fix}"
        return "\n".join([*lines, end])
    if offload != "none":
        lines.append(f"note: zero.offload: {offload} is left out of the plan, which is slower and not needed")
    if best.fits == "tight":
        fix = f"if {best.total_bytes / GIB:.1f} GiB turn out too much, use shorter inputs or more GPUs"
        lines.append(f"note: nothing fits with a reserve of 5 %; {fix}")
    lines.append(
        f"recommended (*): ZeRO stage {best.stage}, micro-batch {best.micro_batch_size}, activation checkpointing "
        f"{best.checkpointing}: {best.total_bytes / GIB:.1f} GiB per GPU, {_or_less(best.step_seconds)} s per step, "
        f"{duration(best.step_seconds * steps)}"
    )
    return "\n".join([*lines, "  " + _command(config_file, settings, gpus, best, config)])


def _by_key(settings: Sequence[str]) -> dict[str, str]:
    """Settings by key: of a repeated key the last one counts; of a free section all do."""
    pairs = [(text.split("=")[0].strip(), text) for text in settings]
    return {text if key.split(".")[0] in FREE_SECTIONS else key: text for key, text in pairs}


def _load(config_file: str, settings: Sequence[str], given: set[str]) -> RunConfig:
    """Read the run; what the file has for keys of `PLANNED_KEYS` that are not given is no reason to refuse it."""
    size = [] if "train.micro_batch_size" in given else ["train.micro_batch_size=1"]
    if load_config(config_file, [*settings, *size, "zero.stage=0", "zero.offload=none"]).optimizer.name == "adafactor":
        raise ConfigError("optimizer.name: a plan is for adamw or muon, not adafactor; use one of them for a plan")
    return load_config(config_file, [*settings, *size, *([] if "zero.stage" in given else ["zero.stage=3"])])


def plan_options(config: RunConfig, gpus: Cluster, given: set[str]) -> list[Option]:
    """All ways to run: ZeRO stages, activation checkpointing or none, and micro-batches that divide a GPU's share.

    Args:
        config: the run; its offload is left out of account.
        gpus: the GPUs.
        given: keys of `PLANNED_KEYS` whose value in `config` stays.

    Returns:
        By stage, then without and with activation checkpointing, then by micro-batch.
    """
    config = replace(config, zero=replace(config.zero, offload="none"))
    share = config.train.global_batch_size // gpus.num_gpus
    sizes = [size for size in range(1, share + 1) if share % size == 0]
    if "train.micro_batch_size" in given:
        sizes = [config.micro_batch_size(gpus.num_gpus)]
    now = config.train.activation_checkpointing
    ways: list[Any] = ["none", "full_keep_routing" if now == "none" else now]
    if "train.activation_checkpointing" in given:
        ways = [now]
    # stage 0 in bf16 is stage 1
    stages = [stage for stage in range(4) if engine_stage(_with(config, stage, "none"), on_gpu=True) == stage]
    if "zero.stage" in given:
        stages = [engine_stage(config, on_gpu=True)]
    shapes = parameter_shapes(config)
    num_parameters, moving = sum(map(num_elements, shapes.values())), gathered_elements(shapes)
    live, moments = gathered_elements(shapes, max_live_parameters(config)), num_moments(shapes, config.optimizer)
    states = state_memory(config, num_parameters, gpus.num_gpus, on_gpu=True, num_gathered=live, num_moments=moments)
    # of a micro-batch of one sample
    plain = kept_bytes(_with(config, 1, "none"), 1, on_gpu=True)
    kept = {way: plain if way == "none" else kept_bytes(_with(config, 1, way), 1, on_gpu=True) for way in ways}
    return [
        _option(_with(config, stage, way), gpus, states[stage], kept[way], plain, size, num_parameters, moving)
        for stage in stages
        for way in ways
        for size in sizes
    ]


def _with(config: RunConfig, stage: Any, checkpointing: Any) -> RunConfig:
    """The run at a ZeRO stage, with or without activation checkpointing."""
    train = replace(config.train, activation_checkpointing=checkpointing)
    return replace(config, zero=replace(config.zero, stage=stage), train=train)


def _option(
    config: RunConfig,
    gpus: Cluster,
    states: StateMemory,
    kept: KeptBytes,
    plain: KeptBytes,
    size: int,
    num_parameters: int,
    moving: int,
) -> Option:
    """Memory and time of one way to run; `kept` and `plain` are of one sample, with checkpointing and without."""
    checkpointing = config.train.activation_checkpointing
    activations = kept.of_samples(config, size)
    if checkpointing != "none":
        activations += size * max(plain.encoder_layer, plain.decoder_layer)
    return Option(
        stage=states.stage,
        checkpointing=checkpointing,
        micro_batch_size=size,
        state_bytes=states.device_bytes - states.gradient_bytes,
        gradient_bytes=states.gradient_bytes,
        activation_bytes=activations,
        bucket_bytes=_bucket_bytes(config, states.stage, gpus, num_parameters, moving),
        gap_bytes=round(GAP_SHARE * activations),
        memory_bytes=gpus.memory_bytes,
        step_seconds=step_seconds(config, gpus, states.stage, size, num_parameters),
    )


def _bucket_bytes(config: RunConfig, stage: int, gpus: Cluster, num_parameters: int, moving: int) -> int:
    """Bytes of gradients on their way to other GPUs; `moving`: elements that stage 3 sums together."""
    if gpus.num_gpus == 1:
        return 0
    # a bucket, or at stage 3 the units that are in memory together
    elements = moving if stage == 3 else min(config.zero.bucket_size, num_parameters)
    # what comes is the sum of a GPU's part, or that part from each GPU
    received = 1.0 if _sent_as_they_are(config, stage, gpus) else 1 / gpus.num_gpus
    return round(elements * _sent_bytes(config, stage, gpus) * (1 + received))


def _sent_as_they_are(config: RunConfig, stage: int, gpus: Cluster) -> bool:
    """Whether gradients travel in 16 bits, and are summed in float32 where they arrive."""
    return stage == 3 and gpus.num_hosts == 1 and config.zero.reduce_dtype != "bf16" and uses_bf16(config, on_gpu=True)


def _sent_bytes(config: RunConfig, stage: int, gpus: Cluster) -> int:
    """Bytes per element of a gradient that is sent to other GPUs."""
    short = config.zero.reduce_dtype == "bf16" and uses_bf16(config, on_gpu=True)
    return 2 if short or _sent_as_they_are(config, stage, gpus) else 4


def step_seconds(config: RunConfig, gpus: Cluster, stage: int, micro_batch_size: int, num_parameters: int) -> float:
    """Expected seconds of an optimizer step.

    At stages 1 and 2 a GPU does not compute while gradients are summed (after the last micro-batch, at stage 2 after
    each) and weights are gathered. At stage 3 collectives run beside the passes, which they slow down; if they take
    longer, they decide. Measured are two GPUs of a host. Assumed: stage 3 is never faster than stage 1.

    Args:
        config: the run.
        gpus: the GPUs.
        stage: ZeRO stage.
        micro_batch_size: samples that a GPU processes at once.
        num_parameters: of the model.
    """
    speed = expected_mfu(num_parameters, config.data.input_length, gpus.name)  # at any stage, as Base on one H200
    seconds = step_flops(config) / (gpus.num_gpus * gpus.peak_flops * speed)
    if config.train.activation_checkpointing != "none":
        seconds *= RECOMPUTE_FACTOR
    if gpus.num_gpus == 1:
        return seconds
    rate = BYTES_PER_SECOND_IN_HOST if gpus.num_hosts == 1 else BYTES_PER_SECOND_BETWEEN_HOSTS
    micro_batches = config.train.global_batch_size // (gpus.num_gpus * micro_batch_size)
    whole = 2 if uses_bf16(config, on_gpu=True) else 4
    weights, gradients = whole * num_parameters, _sent_bytes(config, stage, gpus) * num_parameters
    others = (gpus.num_gpus - 1) / gpus.num_gpus
    if stage == 3:  # weights that are released are gathered for backward once more
        again = whole * max(0, num_parameters - max_live_parameters(config))
        collectives = micro_batches * (weights + again + gradients) * others / rate
        at_stage_1 = step_seconds(config, gpus, 1, micro_batch_size, num_parameters)
        return max(STAGE_3_FACTOR * seconds, collectives, at_stage_1)
    sums = micro_batches if stage == 2 else 1
    return seconds + (weights + sums * gradients) * others / rate


def expected_mfu(num_parameters: int, input_length: int, gpu: str = "H100") -> float:
    """Share of the peak at which a GPU computes, between the measured models and lengths; none is better than these."""
    by_gpu = H200_FACTOR if re.search(r"\bH200\b", gpu) else 1
    return by_gpu * _between(MEASURED_MFU, num_parameters) * _between(LENGTH_FACTOR, max(input_length, 1))


def _between(points: Sequence[tuple[float, float]], x: float) -> float:
    """Interpolate on a logarithmic axis; beyond the ends, the value of the end."""
    for (low, below), (high, above) in pairwise(points):
        if x < high:
            share = max(0.0, math.log(x / low) / math.log(high / low))
            return below + share * (above - below)
    return points[-1][1]


def recommend(options: Sequence[Option]) -> Option | None:
    """The fastest way that fits with a reserve, else the fastest that is tight; None if nothing fits.

    Of ways that are as fast (to 3 %, or to `EQUAL_SECONDS`) the lowest stage, and then the largest micro-batch.
    """
    for fits in ("yes", "tight"):
        able = [option for option in options if option.fits == fits]
        if able:
            fastest = min(option.step_seconds for option in able)
            limit = max(1.03 * fastest, fastest + EQUAL_SECONDS)
            fast = [option for option in able if option.step_seconds <= limit]
            return min(fast, key=lambda option: (option.stage, -option.micro_batch_size, option.step_seconds))
    return None


def shown(options: Sequence[Option], best: Option | None) -> list[Option]:
    """Leave out what needs no line: the micro-batches above the first that does not fit, unless it is recommended."""
    kept: list[Option] = []
    for option in options:
        last = kept[-1] if kept else None
        same = last is not None and (last.stage, last.checkpointing) == (option.stage, option.checkpointing)
        if not (same and last is not None and last.fits == "no") or option is best:
            kept.append(option)
    return kept


def _row(option: Option, steps: int, mark: str) -> str:
    """A line of the table."""
    parts = [option.state_bytes, option.gradient_bytes, option.activation_bytes, option.bucket_bytes]
    parts += [option.gap_bytes, CUDA_BYTES, option.total_bytes]
    widths = (7, 9, 11, 7, 7, 5, 7)
    memory = " ".join(f"{part / GIB:>{width}.1f}" for part, width in zip(parts, widths, strict=True))
    return (
        f"{mark} {option.stage:>5} {option.checkpointing:<17} {option.micro_batch_size:>11} {memory}  {option.fits:<5} "
        f"{_or_less(option.step_seconds):>8} {_or_less(option.step_seconds * steps / 86400):>8}"
    )


def _or_less(number: float) -> str:
    """Three digits of a number, or `<0.001`: nothing smaller is known from an estimate."""
    return f"{number:.3g}" if number >= 1e-3 else "<0.001"


def duration(seconds: float) -> str:
    """Say how long a run takes, in the unit that a person would use: `3.2 days`, `40 minutes`, `under a minute`."""
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return "under a minute"


def _checkpoint_line(config: RunConfig, size: int, steps: int) -> str:
    """What checkpoints take on disk."""
    kept, best = config.checkpoint.keep_last, config.checkpoint.keep_best is not None
    forever = steps // config.checkpoint.keep_every if config.checkpoint.keep_every else 0
    extra = f", and {forever:,} that are never deleted" if forever else ""
    return (
        f"checkpoint: {size / 1e9:.2f} GB; on disk at most {(kept + best + forever + 1) * size / 1e9:.2f} "
        f"GB: the newest {kept},{' the best,' if best else ''} one while it is written{extra}"
    )


def _notes(config: RunConfig, gpus: Cluster, num_parameters: int, options: Sequence[Option]) -> list[str]:
    """What the figures leave out of account, and which given value is not planned as it is; one line each."""
    speed = expected_mfu(num_parameters, config.data.input_length, gpus.name)
    lines = [
        f"note: time from {speed:.1%} of the peak, as measured on H100s and H200s; evaluations, checkpoints and waits "
        "for data come on top",
        "note: small micro-batches are slower than said: on an H100, Base took 2.8 % longer with 16 samples than with "
        "32; smaller ones were not measured",
    ]
    if gpus.assumes_memory:
        lines.append(
            f"note: {gpus.memory_bytes / GIB:g} GiB are assumed for {gpus.name}; --gpu-memory says what it has"
        )
    size, share = config.train.micro_batch_size, config.train.global_batch_size // gpus.num_gpus
    if size > share:
        lines.append(f"note: train.micro_batch_size: {size} is run as {share}, all that a GPU gets of a global batch")
    if engine_stage(config, on_gpu=True) != config.zero.stage:
        lines.append(f"note: zero.stage: {config.zero.stage} is run as stage 1 in bf16")
    whole = num_parameters * (2 if uses_bf16(config, on_gpu=True) else 4) / GIB
    if config.train.eval_generate_samples:
        taken = f"train.eval_generate_samples takes {whole:.1f} GiB more while texts are written"
        lines.append(f"note: at ZeRO stage 3 {taken}")
    elif config.monitor.held_out_sample and whole >= 0.1 and any(option.stage == 3 for option in options):
        lines.append(
            f"note: at ZeRO stage 3 each evaluation needs {whole:.1f} GiB more on the first GPU to write a sample "
            "(monitor.held_out_sample); without that room it writes none"
        )
    if num_parameters < MEASURED_MFU[0][0] * 0.9:
        lines.append("note: the model is smaller than any that was measured, and will be slower than this")
    if not config.data.input_length or not uses_bf16(config, on_gpu=True):
        lines.append("note: measured were encoder-decoders in bf16; for this run, memory and time are rough guesses")
    if config.optimizer.name == "muon":
        lines.append("note: times were measured with AdamW; what Muon computes and sends besides is left out")
    if gpus.num_gpus > 1:
        rate = BYTES_PER_SECOND_IN_HOST if gpus.num_hosts == 1 else BYTES_PER_SECOND_BETWEEN_HOSTS
        how = ", as NVLink between two H200s" if gpus.num_hosts == 1 else ""
        lines.append(f"note: links are assumed to carry {rate / 1e9:g} GB/s for each GPU{how}")
    if len(config.stages) > 1:
        lines.append("note: data.length_schedule: memory and time are those of the first lengths")
    return lines


def _command(config_file: str, settings: Sequence[str], gpus: Cluster, best: Option, config: RunConfig) -> str:
    """What to type for a way to run."""
    launcher = f"deepspeed --num_gpus {gpus.num_gpus}" if gpus.num_hosts == 1 else "deepspeed -H hostfile"
    chosen = [best.stage, best.micro_batch_size, best.checkpointing]
    values = {key: f"{key}={value}" for key, value in zip(PLANNED_KEYS, chosen, strict=True)}
    if config.zero.offload != "none":
        values["zero.offload"] = "zero.offload=none"
    kept = {key: text for key, text in _by_key(settings).items() if key not in values} | values
    return f"{launcher} {pretrain_target()} {shlex.join(['--config', config_file, *kept.values()])}"

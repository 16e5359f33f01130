"""Settings that have no effect in a run, because of others; a start and `--dry-run` say each in one line.

A setting counts as given where it differs from its default. What contradicts another setting is refused in
colt5dist/train/config/schema.py; here is what would be ignored in silence.
"""

import math
from collections.abc import Iterator

from colt5dist.marks import KEEPS_RESULT
from colt5dist.train.config.deepspeed_sections import FREE, FREE_ZERO
from colt5dist.train.config.differences import marked_keys
from colt5dist.train.config.load import config_leaves
from colt5dist.train.config.schema import RunConfig
from colt5dist.train.engine.deepspeed_json import engine_stage, sums_flat, uses_bf16

SCORES = (
    "model.fetch_k_ratio",
    "model.router_scores",
    "model.router_eps",
    "model.router_n_iters",
    "model.router_eps_init",
    "model.router_eps_decay",
    "model.router_solver",
    "model.router_implementation",
    "model.router_noise",
)
"""Settings of the soft scores of learned routing."""
HEAVY = (
    "model.routing",
    "model.num_heavy_tokens",
    "model.heavy_key_value_ratio",
    "model.num_heavy_heads",
    "model.heavy_ff_dim",
    *SCORES,
    "train.routing_every",
    "optimizer.router_lr_factor",
)
"""Settings of heavy branches and their routers."""
LIGHT = ("model.light_radius", "model.light_positions", "model.num_light_heads", "model.light_ff_dim")
"""Settings of light branches."""

Unread = Iterator[tuple[str, str]]
"""Keys that are not read, each with the reason."""


def settings_without_effect(config: RunConfig, *, on_gpu: bool) -> list[str]:
    """Name the settings that are given and have no effect.

    Args:
        config: the run.
        on_gpu: whether it runs on GPUs.

    Returns:
        One line each, which begins with the key.
    """
    given, defaults = config_leaves(config), config_leaves(RunConfig())
    lines = {
        key: f"{key}: {given[key]} has no effect; {reason}"
        for part in (_model(config), _text(config), _optimizer(config), _execution(config, on_gpu))
        for key, reason in part
        if given[key] != defaults[key]
    }
    entries = (*_entries_of_lists(config), *_deepspeed(config, on_gpu))
    return [*lines.values(), *(f"{key} has no effect; {reason}" for key, reason in entries)]


def _model(config: RunConfig) -> Unread:
    model = config.model
    if config.init_from:
        for key in ("initializer_range", "embedding_init_std"):
            yield f"model.{key}", "the first weights are those of init_from"
    if model.architecture == "causal":
        for key in ("num_heads", "ff_dim", "light_radius"):
            yield f"model.{key}", "model.architecture=causal has no layer that reads it"
    else:
        for key in ("window_size", "memory_size"):
            yield f"model.{key}", "only model.architecture=causal reads it"
    if model.encoder in ("dense", "light"):
        for key in (*HEAVY, *(LIGHT if model.encoder == "dense" else ())):
            yield key, f"model.encoder={model.encoder} routes nothing"
    elif model.routing != "learned":
        for key in SCORES:
            yield key, f"model.routing={model.routing} has no soft scores"
        yield "optimizer.router_lr_factor", f"model.routing={model.routing} has no routing vectors"
    elif model.router_solver == "newton":
        for key in ("n_iters", "eps_init", "eps_decay"):
            yield f"model.router_{key}", "model.router_solver=newton does not read it"
    elif model.router_eps_init is None or model.router_eps_init <= model.router_eps:
        for key in ("eps_init", "eps_decay"):
            yield f"model.router_{key}", "the temperature starts at model.router_eps; set router_eps_init above it"
    elif model.router_eps_decay == 1:
        yield "model.router_eps", "with model.router_eps_decay=1 the temperature stays at model.router_eps_init"


def _text(config: RunConfig) -> Unread:
    data = config.data
    if data.sources:
        yield "data.shards", "data.sources are read instead"
    places = [source.shards for source in data.sources] or [data.shards]
    places += [entry.shards for entry in data.validation]
    if not any("://" in place for place in places):
        yield "data.cache_gb", "no shards are at an address"


def _optimizer(config: RunConfig) -> Unread:
    optimizer, schedule = config.optimizer, config.schedule
    if optimizer.name != "muon":
        yield "optimizer.momentum", f"optimizer.name={optimizer.name} does not read it"
    if optimizer.name == "adafactor":
        for key in ("beta1", "beta2", "eps"):
            yield f"optimizer.{key}", "optimizer.name=adafactor does not read it"
    if schedule.name in ("inverse_sqrt", "constant"):
        for key in ("total_steps", "min_lr_ratio"):
            yield f"schedule.{key}", f"schedule.name={schedule.name} does not read it"
    if schedule.name != "warmup_stable_decay":
        yield "schedule.decay_steps", f"schedule.name={schedule.name} does not read it"


def _execution(config: RunConfig, on_gpu: bool) -> Unread:
    health, checkpoint, steps = config.health, config.checkpoint, config.train.steps
    if config.train.compile == "layers" and not on_gpu:
        yield "train.compile", "nothing is compiled on CPUs"
    if not uses_bf16(config, on_gpu):
        yield "zero.reduce_dtype", "in fp32 gradients are summed in fp32"
    if config.zero.stage != 3:
        yield "zero.persistence_threshold", f"zero.stage={config.zero.stage} keeps all parameters whole"
    if health.on_spike == "warn":
        for key in ("skip_steps", "max_rollbacks"):
            yield f"health.{key}", "health.on_spike=warn rolls nothing back"
    elif health.max_rollbacks == 0:
        yield "health.on_spike", "health.max_rollbacks=0 allows no rollback"
    elif not checkpoint.every_steps and checkpoint.every_minutes is None:
        yield "health.on_spike", "no checkpoint is written to go back to; set checkpoint.every_steps"
    elif health.spike_window >= steps:
        yield "health.on_spike", f"a loss is compared with health.spike_window={health.spike_window} earlier steps"
    if config.train.early_stopping_patience is not None and not config.train.eval_every:
        yield "train.early_stopping_patience", "train.eval_every=0 evaluates after the last step only"
    every, keep = checkpoint.every_steps, checkpoint.keep_every
    if keep and checkpoint.every_minutes is None and (not every or math.lcm(every, keep) > steps):
        yield "checkpoint.keep_every", f"with checkpoint.every_steps={every} no such step up to {steps} is saved"
    if config.profile.steps and config.profile.steps[0] > steps:
        yield "profile.steps", f"the last step is {steps}"


def _entries_of_lists(config: RunConfig) -> Unread:
    data, steps = config.data, config.train.steps
    if len(data.sources) == 1 and data.sources[0].weight != 1:
        yield f"data.sources[0].weight: {data.sources[0].weight:g}", "there is no other source"
    for number, entry in enumerate(data.length_schedule):
        key = f"data.length_schedule[{number}]"
        if entry.step > steps:
            yield f"{key}: step {entry.step}", f"the last step is {steps}"
        if entry.num_heavy_tokens is not None and config.model.encoder in ("dense", "light"):
            reason = f"model.encoder={config.model.encoder} routes nothing"
            yield f"{key}.num_heavy_tokens: {entry.num_heavy_tokens:g}", reason
    end = steps * config.train.global_batch_size
    for first, stop in sorted((part[0], part[1]) for part in data.skip):
        if first >= end:
            yield f"data.skip: [{first}, {stop}]", f"the run reads the samples below {end}"
        end += max(0, stop - first)
    for key in config.resume_allow:
        if key in marked_keys(KEEPS_RESULT):
            yield f"resume_allow: {key}", "a resumed run may change it anyway"


def _deepspeed(config: RunConfig, on_gpu: bool) -> Unread:
    """Settings of the free section that DeepSpeed does not come to read."""
    stage, flat = engine_stage(config, on_gpu), sums_flat(config, on_gpu)
    section = dict(config.deepspeed)
    inner = section.pop("zero_optimization", {}) or {}
    named = [(name, value, FREE[name]) for name, value in section.items()]
    named += [(f"zero_optimization.{name}", value, FREE_ZERO[name]) for name, value in inner.items()]
    for name, value, key in named:
        text = f"deepspeed.{name}: {value}"
        if key.nowhere:
            yield text, key.nowhere
        elif stage not in key.stages:
            yield text, f"DeepSpeed reads it at ZeRO stage {' and '.join(map(str, key.stages))}, not {stage}"
        elif key.sums and flat:
            yield text, f"at ZeRO stage {stage} on GPUs the trainer runs micro-batches and sums gradients itself"

"""A setting that is given and not read, because of another, is named in one line; one that is read is not."""

from pathlib import Path

import pytest

from colt5dist.train.config.load import load_config
from colt5dist.train.report.without_effect import settings_without_effect

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


def keys(*settings: str, on_gpu: bool = False, name: str = "tiny") -> list[str]:
    """Keys that are said to have no effect."""
    lines = settings_without_effect(load_config(CONFIGS / f"{name}.yaml", list(settings)), on_gpu=on_gpu)
    assert all(" has no effect; " in line and "\n" not in line for line in lines)
    return [line.split(":")[0] for line in lines]


@pytest.mark.parametrize("name", ["tiny", "causal_tiny", "base", "large", "xl"])
@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "gpu"])
def test_what_the_files_set_is_read(name: str, on_gpu: bool) -> None:
    assert keys(name=name, on_gpu=on_gpu) == []


COSINE = ("schedule.name=cosine", "schedule.total_steps=400")
ROLLBACK = ("health.on_spike=rollback", "health.spike_window=20")
CASES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # settings that need another one: without it they are named, with it they are not
    "schedule.min_lr_ratio=0.1": ((), COSINE),
    "schedule.total_steps=400": (("schedule.name=constant",), COSINE),
    "schedule.decay_steps=9": (COSINE, ("schedule.name=warmup_stable_decay", "schedule.total_steps=400")),
    "model.router_n_iters=9": (("model.router_solver=newton",), ()),
    "model.router_eps_decay=0.5": ((), ("model.router_eps_init=4",)),
    "model.router_eps_init=0.5": ((), ("model.router_eps=0.1", "model.router_eps_decay=0.9")),
    "model.router_eps=0.5": (("model.router_eps_init=2",), ("model.router_eps_init=2", "model.router_eps_decay=0.9")),
    "model.fetch_k_ratio=1.5": (("model.routing=random",), ()),
    "model.router_scores=straight_through": (("model.routing=static",), ()),
    "model.router_noise=0.5": (("model.routing=static",), ()),
    "optimizer.router_lr_factor=3": (("model.routing=random",), ()),
    "model.memory_size=64": ((), ()),
    "model.embedding_init_std=0.5": (("init_from=somewhere",), ()),
    "data.shards=somewhere": (("data.sources=[{shards: a}]",), ()),
    "data.cache_gb=3": ((), ("data.shards=https://host/shards",)),
    "optimizer.beta2=0.99": (("optimizer.name=adafactor", "zero.stage=0"), ()),
    "optimizer.momentum=0.9": ((), ("optimizer.name=muon",)),
    "zero.reduce_dtype=bf16": ((), ("train.precision=bf16",)),
    "zero.persistence_threshold=5": ((), ("zero.stage=3",)),
    "health.skip_steps=3": ((), ROLLBACK),
    "health.on_spike=rollback": (("health.max_rollbacks=0",), ("health.spike_window=20",)),
    "checkpoint.keep_every=70": (("train.steps=85",), ("checkpoint.every_steps=10",)),
    "profile.steps=[90,95]": (("train.steps=85",), ("train.steps=100",)),
    "train.compile=layers": ((), ()),
    "data.skip=[[680,700]]": (("train.steps=85",), ("train.steps=100",)),
    "data.length_schedule=[{step: 90, input_length: 4096}]": (("train.steps=85",), ("train.steps=100",)),
    "data.sources=[{shards: a, weight: 2}]": ((), ("data.sources=[{shards: a, weight: 2}, {shards: b}]",)),
    "resume_allow=[train.steps]": ((), ("resume_allow=[optimizer.lr]",)),
    "deepspeed.steps_per_print=5": ((), ()),
    "deepspeed.zero_optimization.sub_group_size=1000000": (("zero.stage=2",), ("zero.stage=3",)),
    "deepspeed.zero_optimization.overlap_comm=true": (("zero.stage=0",), ("zero.stage=2",)),
}
NEVER_READ = ("model.memory_size=64", "train.compile=layers", "deepspeed.steps_per_print=5")
"""On CPUs and in an encoder-decoder."""


@pytest.mark.parametrize("setting", CASES)
def test_a_setting_is_named_where_it_is_not_read(setting: str) -> None:
    without, with_it = CASES[setting]
    key = setting.split("=")[0]
    assert [found for found in keys(setting, *without) if found.split("[")[0] == key] != []
    if setting not in NEVER_READ:
        assert [found for found in keys(setting, *with_it) if found.split("[")[0] == key] == []


def test_a_dense_encoder_routes_nothing() -> None:
    assert {"model.routing", "model.heavy_ff_dim"} <= set(keys("model.encoder=dense", "model.routing=static"))


def test_a_light_encoder_reads_the_settings_of_light_branches_only() -> None:
    given = ("model.routing=static", "model.heavy_ff_dim=64", "model.light_ff_dim=64", "model.light_radius=9")
    named = set(keys("model.encoder=light", *given))
    assert {"model.routing", "model.heavy_ff_dim"} <= named
    assert named.isdisjoint({"model.light_ff_dim", "model.light_radius"})


SUMS = [
    "deepspeed.zero_optimization.overlap_comm=false",
    "deepspeed.zero_optimization.reduce_scatter=false",
    "deepspeed.flops_profiler.enabled=true",
    "deepspeed.prescale_gradients=true",
    "deepspeed.gradient_predivide_factor=2.0",
]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_settings_of_deepspeeds_sums(stage: int) -> None:
    """On GPUs they are used only with an offloaded optimizer; DeepSpeed's log is never shown."""
    settings = [*SUMS, "deepspeed.wall_clock_breakdown=true", f"zero.stage={stage}"]
    all_keys = {setting.split("=")[0].removesuffix(".enabled") for setting in SUMS}
    log = "deepspeed.wall_clock_breakdown"
    assert set(keys(*settings, on_gpu=True)) == {log, *all_keys}
    assert set(keys(*settings, "zero.offload=optimizer", on_gpu=True)) == set(keys(*settings)) == {log}

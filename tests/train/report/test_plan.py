"""The plan against measured peaks and speeds, and what it recommends."""

from pathlib import Path

import pytest

from colt5dist.errors import ConfigError
from colt5dist.train.config.load import load_config
from colt5dist.train.report.plan import (
    GIB,
    PLANNED_KEYS,
    Cluster,
    Option,
    cluster,
    duration,
    expected_mfu,
    plan_options,
    plan_report,
    recommend,
    shown,
    step_seconds,
)

CONFIGS = Path(__file__).resolve().parents[3] / "configs"

MEASURED_PEAKS = {
    "Base, 16": ("base", ("train.micro_batch_size=16",), {(1, 1): 32.4}),
    "Base, 32": (
        "base",
        ("train.micro_batch_size=32", "train.global_batch_size=64"),
        {(1, 1): 58.4, (2, 1): 58.1, (3, 1): 59.1, (1, 2): 58.5, (2, 2): 58.4, (3, 2): 55.9},
    ),
    "Base, 16k": ("base", ("train.micro_batch_size=8", "data.input_length=16384"), {(1, 1): 47.4}),
    "Base, 64k": ("base", ("train.micro_batch_size=2", "data.input_length=65536"), {(1, 1): 45.5}),
    "dense T5-Base, 8": ("base", ("train.micro_batch_size=8", "model.encoder=dense"), {(1, 1): 17.8}),
    "dense T5-Base, 16": ("base", ("train.micro_batch_size=16", "model.encoder=dense"), {(1, 1): 31.4}),
    "dense T5-Base, 16k": (
        "base",
        ("train.micro_batch_size=4", "model.encoder=dense", "data.input_length=16384"),
        {(1, 1): 27.1},
    ),
    "Large": ("large", ("train.micro_batch_size=8",), {(1, 1): 58.9, (1, 2): 52.6}),
    "XL": ("xl", ("train.micro_batch_size=2",), {(3, 2): 64.1}),
    "fine-tuning with dropout": (
        "finetune_base",
        ("data.shards=python-stdlib-pairs", "init_from=null", "model.vocab_size=384", "train.global_batch_size=16"),
        {(1, 1): 44.3},
    ),
}
"""Configuration, settings, and ZeRO stage, GPUs and GiB that PyTorch reserved: H100 or H200, bf16, targets of 910
tokens (512 in fine-tuning), no activation checkpointing, CUDA graphs."""


@pytest.mark.parametrize("name", MEASURED_PEAKS)
def test_memory_is_within_a_tenth_of_what_was_measured(name: str) -> None:
    file, settings, peaks = MEASURED_PEAKS[name]
    config = load_config(CONFIGS / f"{file}.yaml", [*settings, "train.activation_checkpointing=none"])
    given = set(PLANNED_KEYS) - {"zero.stage"}
    options = {(o.stage, n): o for n in {n for _, n in peaks} for o in plan_options(config, cluster(n), given)}
    planned = {key: options[key].reserved_bytes / GIB for key in peaks}
    assert planned == pytest.approx(peaks, rel=0.1)
    assert {options[key].fits for key in peaks} == {"yes"}


def test_time_is_what_was_measured() -> None:
    """Seconds of `python launch/benchmark.py step base` on one H100; checkpointing costs a third more."""
    for length, batch, seconds in ((4096, 32, 0.2609), (16_384, 8, 0.2246), (65_536, 4, 0.5085)):
        config = load_config(
            CONFIGS / "base.yaml",
            [f"data.input_length={length}", f"train.global_batch_size={batch}", "train.micro_batch_size=1"],
        )
        expected = step_seconds(config, cluster(1), 1, 1, 432_809_472)
        assert expected == pytest.approx(seconds, rel=0.05)
        config.train.activation_checkpointing = "full"
        assert step_seconds(config, cluster(1), 1, 1, 432_809_472) == pytest.approx(4 / 3 * expected)
    assert expected_mfu(1_463_000_000, 4096) == pytest.approx(0.396)
    assert expected_mfu(10**12, 4096) == expected_mfu(5_297_000_000, 4096)
    assert expected_mfu(10**6, 512) == pytest.approx(0.372)


def test_links_cost_time() -> None:
    config = load_config(CONFIGS / "base.yaml", [])
    one, two = (step_seconds(config, cluster(16, hosts), 1, 16, 432_809_472) for hosts in (1, 2))
    assert one < two
    # stage 2 sums every micro-batch's gradients
    assert step_seconds(config, cluster(2), 2, 1, 432_809_472) > step_seconds(config, cluster(2), 2, 128, 432_809_472)


MEASURED_SECONDS = (
    ("base", 32, 64, 1, (0.2511,)),
    ("base", 32, 64, 2, (0.2512,)),
    ("base", 32, 64, 3, (0.2533, 0.2580)),
    ("large", 8, 32, 1, (0.3972,)),
    ("xl", 2, 32, 3, (1.4606,)),
)
"""Configuration, micro-batch, global batch, ZeRO stage, and seconds per step on two H200s, from the table of the
training step in colt5dist/benchmark/README.md."""


@pytest.mark.parametrize("measured", MEASURED_SECONDS, ids=lambda row: f"{row[0]} {row[3]}")
def test_time_on_two_gpus_is_what_was_measured(measured: tuple[str, int, int, int, tuple[float, ...]]) -> None:
    file, size, batch, stage, seconds = measured
    settings = [f"train.global_batch_size={batch}", f"train.micro_batch_size={size}"]
    given = {"train.micro_batch_size", "train.activation_checkpointing"}
    options = plan_options(load_config(CONFIGS / f"{file}.yaml", settings), cluster(2, gpu="H200"), given)
    (expected,) = [o.step_seconds for o in options if o.stage == stage]
    assert [expected] * len(seconds) == pytest.approx(seconds, rel=0.03)


@pytest.mark.parametrize(("num_gpus", "batch"), [(2, 64), (8, 256), (8, 8), (16, 256)], ids=str)
def test_stage_3_is_never_faster_than_stage_1(num_gpus: int, batch: int) -> None:
    config = load_config(CONFIGS / "base.yaml", [f"train.global_batch_size={batch}", "train.micro_batch_size=1"])
    options = plan_options(config, cluster(num_gpus), set())
    seconds = {(o.stage, o.checkpointing, o.micro_batch_size): o.step_seconds for o in options}
    pairs = [(at_3, seconds[1, *way]) for (stage, *way), at_3 in seconds.items() if stage == 3]
    assert pairs and all(at_3 >= at_1 for at_3, at_1 in pairs)
    best = recommend(options)
    assert best is not None and best.stage == 1


def option(stage: int, size: int, memory: float, seconds: float) -> Option:
    """A way to run on a GPU of 80 GiB, in GiB without the one that CUDA takes."""
    return Option(
        stage=stage,
        checkpointing="none",
        micro_batch_size=size,
        state_bytes=round(memory * GIB),
        gradient_bytes=0,
        activation_bytes=0,
        bucket_bytes=0,
        gap_bytes=0,
        memory_bytes=80 * GIB,
        step_seconds=seconds,
    )


def test_the_fastest_that_fits_is_recommended() -> None:
    small, large = option(1, 4, 20, 2.0), option(1, 8, 40, 2.0)
    tight, too_large = option(1, 16, 77, 1.0), option(1, 32, 100, 0.5)
    sharded = option(3, 16, 30, 2.01)
    assert [o.fits for o in (large, tight, too_large)] == ["yes", "tight", "no"]
    assert recommend([small, large, tight, too_large, sharded]) is large
    assert recommend([small, large, option(2, 1, 50, 1.5)]) == option(2, 1, 50, 1.5)
    assert recommend([tight, too_large]) is tight
    assert recommend([too_large]) is None
    quick = [option(3, 1, 20, 1e-4), option(1, 1, 20, 5e-4), option(1, 2, 20, 4e-4), option(1, 2, 20, 9e-4)]
    assert recommend(quick) is quick[2]  # a thousandth of a second is no difference
    assert shown([small, too_large, option(1, 64, 200, 0.5), sharded], small) == [small, too_large, sharded]


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.0, "under a minute"), (150, "2.5 minutes"), (7200, "2 hours"), (1e6, "11.6 days")], ids=str
)
def test_the_time_of_a_run_has_the_unit_of_a_person(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_given_keys_are_not_varied_and_offload_is_left_out() -> None:
    settings = ["zero.offload=optimizer", "zero.stage=2", "train.global_batch_size=24", "train.micro_batch_size=4"]
    config = load_config(CONFIGS / "tiny.yaml", settings)
    options = plan_options(config, cluster(2), {"zero.stage"})
    assert {o.stage for o in options} == {2}
    assert [o.micro_batch_size for o in options] == [1, 2, 3, 4, 6, 12] * 2
    assert [o.checkpointing for o in options] == ["none"] * 6 + ["full_keep_routing"] * 6
    memory = [o.total_bytes for o in options[:6]]
    assert memory == sorted(memory) and options[11].total_bytes < memory[-1]
    assert options[0].bucket_bytes > 0
    one_size = {"train.micro_batch_size", "train.activation_checkpointing"}
    assert [o.stage for o in plan_options(config, cluster(1), one_size)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "--gpus: 0 is not positive"),
        ((9, 2), "--gpus: 9 GPUs do not divide among 2 hosts"),
        ((8, 1, 0.0), "--gpu-memory: 0.0 is not positive"),
        ((8, 1, float("inf")), "--gpu-memory: inf is not a finite number"),
        ((8, 1, 80.0, "Z1"), "--gpu: the peak of 'Z1' is not known"),
    ],
    ids=["gpus", "hosts", "memory", "infinite", "name"],
)
def test_wrong_gpus_are_named(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cluster(*arguments)


def test_eight_gpus_are_a_host() -> None:
    assert cluster(64) == Cluster(64, 8, 80 * GIB, "H100", 989e12)


@pytest.mark.parametrize(
    ("gpu", "memory", "expected", "is_assumed"),
    [
        ("H200", None, 141, False),
        ("NVIDIA H100 80GB HBM3", None, 80, False),
        ("H100 NVL", None, 94, False),
        ("H200", 100.0, 100, False),
        ("A100", None, 80, True),  # there are two sizes
        ("A100", 40.0, 40, False),
    ],
    ids=str,
)
def test_memory_follows_the_name_or_is_said_to_be_assumed(
    gpu: str, memory: float | None, expected: int, is_assumed: bool
) -> None:
    gpus = cluster(1, gpu=gpu, gpu_memory=memory)
    assert gpus.memory_bytes == expected * GIB
    text = plan_report("tiny", [], gpus)
    assert ("note: 80 GiB are assumed for A100; --gpu-memory" in text) == is_assumed


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        (("train.micro_batch_size=64",), "note: train.micro_batch_size: 64 is run as 32, all that a GPU gets"),
        (("zero.stage=0",), "note: zero.stage: 0 is run as stage 1 in bf16"),
        ((), "note: small micro-batches are slower than said"),
    ],
    ids=str,
)
def test_what_is_not_as_it_was_given_is_noted(settings: tuple[str, ...], note: str) -> None:
    assert note in plan_report("base", settings, cluster(8))
    others = plan_report("base", ["train.micro_batch_size=32", "zero.stage=2"], cluster(8))
    assert "is run as" not in others


def test_what_is_varied_is_no_reason_to_refuse() -> None:
    """The file's micro-batch is 32 and its ZeRO stage 1; given values have to go together."""
    assert "micro-batch 1," in plan_report("base", ["train.global_batch_size=12"], cluster(12))
    assert "recommended (*): ZeRO stage 1" in plan_report("base", ["zero.offload=parameters"], cluster(8))
    with pytest.raises(ConfigError, match=r"train\.micro_batch_size: 5 does not divide"):
        plan_report("base", ["train.global_batch_size=12", "train.micro_batch_size=5"], cluster(12))
    with pytest.raises(ConfigError, match=r"train\.micro_batch_size: 4 does not divide the 6 samples"):
        plan_report("base", ["train.global_batch_size=12", "train.micro_batch_size=4"], cluster(2))
    with pytest.raises(ConfigError, match=r"zero\.offload: parameters needs zero\.stage=3, not 1"):
        plan_report("base", ["zero.offload=parameters", "zero.stage=1"], cluster(8))


def test_offload_is_advised_where_nothing_fits_without_it() -> None:
    small = cluster(2, gpu_memory=24)
    given = plan_report("xl", ["zero.stage=3", "zero.offload=parameters"], small).splitlines()
    assert given[-1].startswith("nothing fits without zero.offload=parameters, which is not planned: try it, or use ")
    assert not any("not needed" in line for line in given)
    assert plan_report("xl", [], small).endswith("shorter inputs, or try zero.offload")
    assert plan_report("xl", ["optimizer.name=muon"], small).endswith("or shorter inputs")  # it refuses offload


@pytest.mark.parametrize(
    ("settings", "is_noted"),
    [
        ((), True),
        (("train.eval_every=0",), True),
        (("zero.stage=2",), False),
        (("monitor.held_out_sample=false",), False),
    ],
    ids=str,
)
def test_what_a_sample_takes_at_stage_3_is_noted(settings: tuple[str, ...], is_noted: bool) -> None:
    """Where stage 3 is planned; an evaluation follows the last step, whatever train.eval_every is."""
    text = plan_report("base", settings, cluster(8))
    words = "note: at ZeRO stage 3 each evaluation needs 0.8 GiB more on the first GPU to write a sample"
    assert (words in text) == is_noted

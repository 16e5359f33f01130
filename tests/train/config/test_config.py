"""Settings from files and arguments, and DeepSpeed's configuration, which is derived from them."""

from pathlib import Path

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from colt5dist.errors import ConfigError
from colt5dist.marks import KEEPS_RESULT, OF_A_HOST
from colt5dist.train.config.deepspeed_sections import FREE, FREE_ZERO, OWNED, WITHOUT_EFFECT, deepspeed_problems
from colt5dist.train.config.differences import settings_that_must_be_alike
from colt5dist.train.config.load import LIST_FORMS, config_leaves, load_config
from colt5dist.train.config.schema import RunConfig
from colt5dist.train.engine.deepspeed_json import deepspeed_config, engine_stage
from colt5dist.train.engine.engine import device_problems


def load(tmp_path: Path, text: str, *overrides: str) -> RunConfig:
    """Load a configuration from the text of a YAML file."""
    path = tmp_path / "some.yaml"
    path.write_text(text or "{}")
    return load_config(path, list(overrides))


def test_arguments_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    config = load(tmp_path, "train: {steps: 5, log_every: 3}", "train.steps=7")
    assert (config.train.steps, config.train.log_every, config.train.eval_samples) == (7, 3, 64)
    assert config.run_dir == "runs/some"


def test_an_included_file_is_the_base_of_its_section(tmp_path: Path) -> None:
    (tmp_path / "pieces").mkdir()
    (tmp_path / "pieces" / "z.yaml").write_text("stage: 2\noffload: optimizer\n")
    config = load(tmp_path, "include: {zero: pieces/z.yaml}\nzero: {stage: 1}")
    assert (config.zero.stage, config.zero.offload) == (1, "optimizer")


def test_problems_of_file_and_arguments_are_named_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, "train: {stepps: 5}", "zero.stages=1")
    first, second = str(raised.value).splitlines()
    assert first.startswith("train.stepps: no such key; did you mean train.steps?") and "some.yaml" in first
    assert second.startswith("zero.stages: no such key; did you mean zero.stage?") and "command line" in second


def test_deepspeeds_configuration_is_derived_from_ours(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "",
        "train.global_batch_size=48",
        "train.micro_batch_size=4",
        "optimizer.gradient_clipping=0.5",
        "zero.stage=3",
    )
    derived = deepspeed_config(config, world_size=3, on_gpu=True)
    assert (derived["train_batch_size"], derived["gradient_accumulation_steps"]) == (48, 4)
    assert derived["gradient_clipping"] == 0.5
    assert derived["bf16"] == {"enabled": True}
    assert derived["data_types"] == {"grad_accum_dtype": "fp32"}
    assert derived["communication_data_type"] == "fp32"
    assert derived["zero_optimization"]["stage"] == 3
    assert "optimizer" not in derived and "scheduler" not in derived


PAIRS = ("data.mixture=pairs", "train.eval_generate_samples=4")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["checkpoint.keep_best=eval/los"], "checkpoint.keep_best: no evaluation of this run has 'eval/los'; use"),
        (["checkpoint.keep_best=eval/f1", *PAIRS[:1]], "use one of eval/loss, eval/bits_per_byte, eval/loss/pairs"),
        (["train.eval_generate_samples=4"], "train.eval_generate_samples: only pairs have answers to generate"),
        (["train.eval_generate_samples=-1"], "train.eval_generate_samples: -1 is negative"),
        (["train.early_stopping_patience=0"], "train.early_stopping_patience: 0 is not positive"),
        (["model.dropout=1.0"], "model.dropout: 1.0; use a share in [0, 1)"),
    ],
    ids=["unknown", "no texts", "no pairs", "negative", "patience", "dropout"],
)
def test_settings_of_fine_tuning_that_do_not_fit(tmp_path: Path, settings: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, "", *settings)
    assert words in str(raised.value) and len(str(raised.value).splitlines()) == 1


def test_every_score_of_texts_can_choose_the_best(tmp_path: Path) -> None:
    for key in ("eval/loss/pairs", "eval/rouge_geometric_mean", "eval/rouge2", "eval/f1", "eval/exact_match"):
        assert load(tmp_path, "", *PAIRS, f"checkpoint.keep_best={key}").checkpoint.keep_best == key
    others = ("data.validation=[{name: books, shards: x}]", "train.ema=0.99")
    for key in ("eval/books/loss", "eval/ema/loss"):
        assert load(tmp_path, "", *others, f"checkpoint.keep_best={key}").checkpoint.keep_best == key


def test_no_clipping_is_passed_to_deepspeed(tmp_path: Path) -> None:
    """DeepSpeed's own default is 1.0."""
    config = load(tmp_path, "", "optimizer.gradient_clipping=0")
    assert deepspeed_config(config, world_size=1, on_gpu=False)["gradient_clipping"] == 0.0


def test_the_free_section_is_merged_last(tmp_path: Path) -> None:
    config = load(tmp_path, "", "deepspeed.zero_optimization.overlap_comm=false", "deepspeed.wall_clock_breakdown=true")
    derived = deepspeed_config(config, world_size=1, on_gpu=True)
    assert derived["zero_optimization"]["overlap_comm"] is False
    assert derived["zero_optimization"]["stage"] == 1
    assert derived["wall_clock_breakdown"] is True


def test_every_zero_key_of_deepspeed_is_classified() -> None:
    """May be given, is set by a key of our own, or has no effect: fails where a new DeepSpeed adds or drops a key."""
    names = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    inner = "zero_optimization."
    refused = {key.removeprefix(inner) for key in (*OWNED, *WITHOUT_EFFECT) if key.startswith(inner)}
    assert names - set(FREE_ZERO) - refused == set()
    assert set(FREE_ZERO) <= names and not set(FREE_ZERO) & refused and not set(FREE) & {*OWNED, *WITHOUT_EFFECT}


@pytest.mark.parametrize("key", sorted({*OWNED, *WITHOUT_EFFECT}))
def test_a_refused_key_of_deepspeed_gets_one_line(key: str) -> None:
    section: dict[str, object] = {}
    outer, _, inner = key.partition(".")
    section[outer] = {inner: 1} if inner else 1
    (problem,) = deepspeed_problems(section)
    assert problem.startswith(f"deepspeed.{key}: ") and "\n" not in problem


def test_types_of_the_free_section(tmp_path: Path) -> None:
    """An integer may be written as 1.0e+9; true is not a number."""
    assert deepspeed_problems({"zero_optimization": {"sub_group_size": 1.0e9}, "gradient_predivide_factor": 2}) == []
    for section in ({"steps_per_print": True}, {"zero_optimization": 3}, {"zero_optimization": {"overlap_comm": 1}}):
        (problem,) = deepspeed_problems(section)
        assert "is not of type" in problem


def test_bf16_at_stage_0_runs_as_stage_1(tmp_path: Path) -> None:
    config = load(tmp_path, "", "zero.stage=0")
    assert engine_stage(config, on_gpu=True) == 1
    assert engine_stage(config, on_gpu=False) == 0


def test_adafactor_is_refused_in_bf16(tmp_path: Path) -> None:
    config = load(tmp_path, "", "zero.stage=0", "optimizer.name=adafactor")
    assert device_problems(config, world_size=1, cuda_devices=0, local_world_size=1) == []
    (problem,) = device_problems(config, world_size=1, cuda_devices=1, local_world_size=1)
    assert problem.startswith("optimizer.name: adafactor needs fp32")


def test_more_processes_than_gpus_is_refused(tmp_path: Path) -> None:
    config = load(tmp_path, "")
    (problem,) = device_problems(config, world_size=4, cuda_devices=2, local_world_size=4)
    assert "2 GPUs for 4 processes" in problem


@pytest.mark.parametrize("key", ["data.sources", "data.validation", "data.length_schedule"])
def test_a_wrong_list_of_sections_is_told_how_it_is_written(tmp_path: Path, key: str) -> None:
    for wrong in ("[a]", "a", "[3]"):
        with pytest.raises(ConfigError, match=rf"^{key}: no list of sections; write it like \[\{{[^\n]*$"):
            load(tmp_path, "", f"{key}={wrong}")
    with pytest.raises(ConfigError, match=rf"^{key}: Key 'stepp' not in '\w+'[^\n]*; write it like \[\{{"):
        load(tmp_path, "", f"{key}=[{{stepp: 3}}]")
    written = LIST_FORMS[key]
    assert config_leaves(load(tmp_path, "", f"{key}={written}"))[key]


@pytest.mark.parametrize(("world_size", "micro", "accumulation"), [(1, 4, 2), (2, 4, 1), (4, 2, 1), (8, 1, 1)])
def test_the_default_runs_on_one_to_eight_devices(world_size: int, micro: int, accumulation: int) -> None:
    config = load_config(Path(__file__).resolve().parents[3] / "configs" / "tiny.yaml", [])
    assert config.batch_problems(world_size) == []
    assert config.micro_batch_size(world_size) == micro
    assert config.gradient_accumulation_steps(world_size) == accumulation


def test_a_micro_batch_that_does_not_divide_a_devices_share_is_refused(tmp_path: Path) -> None:
    config = load(tmp_path, "", "train.global_batch_size=12", "train.micro_batch_size=4")
    assert config.batch_problems(1) == config.batch_problems(3) == []
    (problem,) = config.batch_problems(2)
    assert "4 does not divide the 6 samples" in problem and problem.endswith("use one of 1, 2, 3, 6")
    (problem,) = config.batch_problems(5)
    assert problem.startswith("train.global_batch_size: 12 does not divide among 5 devices")


def differing(old: list[str], new: list[str], mark: str = KEEPS_RESULT) -> set[str]:
    """Keys that differ between two configurations and do not carry a mark."""
    tiny = Path(__file__).resolve().parents[3] / "configs" / "tiny.yaml"
    one, two = (settings_that_must_be_alike(config_leaves(load_config(tiny, s)), mark) for s in (old, new))
    return {key for key in one.keys() | two.keys() if one.get(key) != two.get(key)}


@pytest.mark.parametrize(
    "setting",
    [
        "train.activation_checkpointing=full",
        "model.router_implementation=reference",
        "model.embedding_init_std=0.02",
        "train.eval_samples=3",
        "train.eval_shuffled_inputs=false",
        "train.log_every=7",
        "deepspeed.zero_optimization.overlap_comm=false",
        "deepspeed.flops_profiler.enabled=true",
        "data.sources=[{shards: a, weight: 2}]",
    ],
)
def test_what_keeps_the_result_may_change_on_resume(setting: str) -> None:
    assert differing([], [setting]) == set()


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("optimizer.lr=0.5", "optimizer.lr"),
        ("model.router_solver=newton", "model.router_solver"),
        ("train.precision=bf16", "train.precision"),
        ("deepspeed.prescale_gradients=true", "deepspeed.prescale_gradients"),
        (
            "deepspeed.zero_optimization.zero_quantized_gradients=true",
            "deepspeed.zero_optimization.zero_quantized_gradients",
        ),
        ("data.length_schedule=[{step: 9, input_length: 4096}]", "data.length_schedule"),
    ],
)
def test_what_changes_the_result_may_not(setting: str, key: str) -> None:
    assert differing([], [setting]) == {key}


def test_a_field_inside_a_list_has_its_own_mark() -> None:
    entry = "data.length_schedule=[{step: 9, input_length: %d, micro_batch_size: %d}]"
    assert differing([entry % (4096, 4)], [entry % (4096, 2)]) == set()
    assert differing([entry % (4096, 4)], [entry % (8192, 4)]) == {"data.length_schedule"}
    sources = "data.sources=[{shards: %s, weight: %d}]"
    assert differing([sources % ("a", 1)], [sources % ("b", 1)], OF_A_HOST) == set()
    assert differing([sources % ("a", 1)], [sources % ("a", 2)], OF_A_HOST) == {"data.sources"}
    assert differing([], ["train.log_every=7", "data.num_workers=3"], OF_A_HOST) == {"train.log_every"}


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (["deepspeed.zero_optimization.sub_group_size=-1"], "deepspeed.zero_optimization.sub_group_size"),
        (["deepspeed.zero_optimization.leaf_module.klasses=[A]"], "deepspeed.zero_optimization.leaf_module.klasses"),
        (["deepspeed.comms_logger.enable=true"], "deepspeed.comms_logger.enable"),
        (["deepspeed.gradient_predivide_factor=2.0", "zero.stage=2"], "deepspeed.gradient_predivide_factor"),
        (["deepspeed.prescale_gradients=true", "zero.stage=3"], "deepspeed.prescale_gradients"),
        (
            ["deepspeed.zero_optimization.zero_hpz_partition_size=3", "zero.stage=3"],
            "deepspeed.zero_optimization.zero_hpz_partition_size",
        ),
    ],
)
def test_deepspeed_checks_its_section_before_the_ranks_connect(tmp_path: Path, settings: list[str], key: str) -> None:
    config = load(tmp_path, "", *settings)
    (problem,) = device_problems(config, world_size=4, cuda_devices=0, local_world_size=4)
    assert problem.startswith(f"{key}: ") and "\n" not in problem


def test_keys_of_the_flops_profiler() -> None:
    """DeepSpeed ignores those that it does not know."""
    (problem,) = deepspeed_problems({"flops_profiler": {"enabled": True, "steps": 3}})
    assert problem.startswith("deepspeed.flops_profiler.steps: no such key; use one of enabled, ")

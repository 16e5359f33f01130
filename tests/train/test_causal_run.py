"""CausalCoLT5 in the same trainer: ZeRO stages, numbers of ranks, resuming, init_from, statistics of routing."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from colt5dist.train.report.monitor import read_metrics

Pretrain = Callable[..., subprocess.CompletedProcess[str]]

CAUSAL = (
    "model.architecture=causal",
    "model.num_encoder_layers=0",
    "model.num_decoder_layers=2",
    "model.window_size=32",
    "model.memory_size=64",
    "data.mixture=causal",
    "data.input_length=0",
    "data.target_length=208",
    "train.eval_shuffled_inputs=false",
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, run_pretrain: Pretrain) -> Path:
    """Four steps on one process, with activation checkpointing that keeps the routing."""
    run_dir = tmp_path_factory.mktemp("causal") / "run"
    run_pretrain(run_dir, *CAUSAL, "train.activation_checkpointing=full_keep_routing")
    return run_dir


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run_dir)]


def test_trains_and_records_its_routing(undisturbed: Path) -> None:
    records = read_metrics(undisturbed)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert all(record["input_tokens"] == 0 and record["target_tokens"] == 8 * 208 for record in records)
    assert records[0]["loss"] == records[0]["loss/next_token"] > records[-1]["loss"]
    assert 0 < records[1]["router/layer_01/key_value/mean_score"] <= 1
    assert records[-1]["eval/loss"] < records[0]["loss"]


@pytest.mark.slow
def test_sharded_parameters_on_two_processes_resumed_on_one(
    undisturbed: Path, tmp_path: Path, run_pretrain: Pretrain
) -> None:
    """Stage 3 on two processes, then stage 1 on one: the losses of the run on one process."""
    run_dir = tmp_path / "run"
    run_pretrain(run_dir, *CAUSAL, "train.steps=2", "zero.stage=3", "train.activation_checkpointing=full", processes=2)
    run_pretrain(run_dir, *CAUSAL, "zero.stage=1", "train.activation_checkpointing=full", "resume=must")
    assert losses(run_dir) == pytest.approx(losses(undisturbed), rel=2e-5)


@pytest.mark.slow
def test_a_run_with_longer_text_starts_from_the_weights_of_another_run(
    undisturbed: Path, tmp_path: Path, run_pretrain: Pretrain
) -> None:
    settings = (*CAUSAL, "data.target_length=416", f"init_from={undisturbed}", "train.steps=1")
    run_pretrain(tmp_path / "run", *settings)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "finished"
    assert losses(tmp_path / "run")[0] < losses(undisturbed)[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ("data.mixture=colt5", "data.input_length=256"),
            "data.mixture: colt5 does not fit model.architecture causal",
        ),
        (("data.input_length=256",), "data.input_length: 256 is not used with data.mixture=causal; set 0"),
        (("train.eval_shuffled_inputs=true",), "train.eval_shuffled_inputs: model.architecture causal"),
        (("model.num_encoder_layers=2",), "model.num_encoder_layers: 2; architecture=causal has no encoder"),
    ],
)
def test_contradicting_settings_are_refused(
    settings: tuple[str, ...],
    message: str,
    tmp_path: Path,
    pretrain_main: Callable[[list[str]], int],
    micro_settings: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert pretrain_main([f"run_dir={tmp_path}/run", *micro_settings, *CAUSAL, *settings, "--dry-run"]) == 2
    assert message in capsys.readouterr().err

"""ZeRO stages in bf16 over NCCL, on one GPU or on two where there are two."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import torchrun

pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("zero_stages_gpu")]
SCRIPT = Path(__file__).with_name("zero_matrix.py")
TOLERANCE = 2e-3
"""Relative; bf16 has 8 bits, and the stages add gradients in another order."""
ALL_PAIRS = ",".join(f"{written}{loaded}" for written in "123" for loaded in "123")
ONE_PAIR, NO_PAIRS = "12", ""
"""Pairs of stages, the one that wrote a checkpoint and the one that loads it. Each load compiles anew; rollbacks are
left out."""


def run_matrix(
    folder: Path, processes: int, settings: tuple[str, ...], loads: str, stages: str = "0123"
) -> dict[str, Any]:
    """What zero_matrix.py finds on that many GPUs."""
    output = folder / f"{processes}.json"
    own = (*settings, "train.micro_batch_size=2")
    torchrun(SCRIPT, str(output), str(folder), stages, f"--loads={loads}", *own, processes=processes)
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, micro_settings: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """The matrix for each kind of activation checkpointing."""
    processes = min(2, torch.cuda.device_count())
    return {
        mode: run_matrix(
            tmp_path_factory.mktemp(mode),
            processes,
            (*micro_settings, f"train.activation_checkpointing={mode}"),
            ALL_PAIRS if mode == "none" else ONE_PAIR,
        )
        for mode in ("none", "full", "full_keep_routing")
    }


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("mode", ["none", "full", "full_keep_routing"])
def test_stages_and_checkpointing_train_alike_in_bf16(
    results: dict[str, dict[str, Any]], mode: str, stage: int
) -> None:
    expected = [loss for loss, _ in results["none"]["train 1"]]
    assert [loss for loss, _ in results[mode][f"train {stage}"]] == pytest.approx(expected, rel=TOLERANCE)
    assert results[mode][f"nan {stage}"] == {"applied": False, "finite": True}


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("written", [1, 2, 3])
def test_bf16_checkpoints_load_at_every_stage(results: dict[str, dict[str, Any]], written: int, stage: int) -> None:
    expected = [loss for loss, _ in results["none"][f"train {written}"][2:]]
    loaded = [loss for loss, _ in results["none"][f"load {written} {stage}"]]
    assert loaded == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("saved", "loaded"), [(1, 2), (2, 1)])
def test_bf16_checkpoints_load_on_another_number_of_gpus(
    saved: int, loaded: int, tmp_path: Path, micro_settings: tuple[str, ...]
) -> None:
    there = run_matrix(tmp_path, saved, micro_settings, NO_PAIRS, "123")
    here = run_matrix(tmp_path, loaded, micro_settings, ALL_PAIRS, "123")
    for written, stage in product((1, 2, 3), repeat=2):
        expected = [loss for loss, _ in there[f"train {written}"][2:]]
        assert [loss for loss, _ in here[f"load {written} {stage}"]] == pytest.approx(expected, rel=TOLERANCE)

"""ZeRO stages in bf16 over NCCL, on one GPU or on two where there are two."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.gpu
SCRIPT = Path(__file__).with_name("zero_matrix.py")
TOLERANCE = 2e-3
"""Relative; bf16 has 8 bits, and the stages add gradients in another order."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, micro_settings: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """The matrix of zero_matrix.py for each kind of activation checkpointing."""
    processes = min(2, torch.cuda.device_count())
    found = {}
    for mode in ("none", "full", "full_keep_routing"):
        folder = tmp_path_factory.mktemp(mode)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        settings = (*micro_settings, "train.micro_batch_size=2", f"train.activation_checkpointing={mode}")
        done = subprocess.run(
            [*command, str(SCRIPT), str(folder / "out.json"), str(folder), "0123", *settings],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        found[mode] = json.loads((folder / "out.json").read_text())
    return found


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

"""Bad numbers in bf16 over NCCL, on one GPU or two; deterministic runs on GPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import torchrun

from colt5dist.train.report.monitor import read_metrics

pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("bad_numbers_gpu")]
ROOT = Path(__file__).resolve().parents[3]
SCRIPT = Path(__file__).with_name("bad_numbers.py")
VARIANTS = ("auto-none-1", "auto-none-2", "auto-none-3", "auto-optimizer-2", "auto-optimizer-3", "fp32-none-0")


def run(command: list[str]) -> None:
    """Run a command; it must succeed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def settings(micro_settings: tuple[str, ...], short_texts: Path) -> list[str]:
    """Settings of the micro model on short texts."""
    return [*micro_settings, f"data.shards={short_texts}", "train.micro_batch_size=2", "train.eval_samples=2"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, settings: list[str]) -> dict[str, dict[str, Any]]:
    """Seven steps for each variant."""
    folder = tmp_path_factory.mktemp("bad")
    own = [str(folder / "out.json"), str(folder), *VARIANTS, "--", *settings, "train.steps=7"]
    torchrun(SCRIPT, *own, processes=min(2, torch.cuda.device_count()))
    return json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize("variant", VARIANTS)
def test_bad_steps_are_skipped_and_counted(results: dict[str, dict[str, Any]], variant: str) -> None:
    """They change no weight and no moment, to the bit, on any rank."""
    expected = [step in (2, 3, 4, 5, 6) for step in range(1, 8)]
    assert all(unchanged == expected for unchanged in results[variant]["unchanged"])
    records = results[variant]["records"]
    assert [record["skipped_steps"] for record in records] == [0, 1, 2, 3, 4, 5, 5]
    reference = results["auto-none-1"]["records"]
    for record, other in zip(records, reference, strict=True):
        assert (record["loss"] is None) == (record["step"] in (2, 3))
        assert record["loss"] is None or record["loss"] == pytest.approx(other["loss"], rel=2e-3)


def test_deterministic_runs_are_equal_to_the_bit(settings: list[str], tmp_path: Path) -> None:
    for name in ("one", "two"):
        own = [f"run_dir={tmp_path / name}", "train.deterministic=true", "train.steps=20"]
        run([sys.executable, str(ROOT / "launch" / "pretrain.py"), *settings, *own])
    one, two = ([(r["loss"], r["grad_norm"]) for r in read_metrics(tmp_path / name)] for name in ("one", "two"))
    assert len(one) == 20 and one == two

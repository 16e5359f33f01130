"""monitor.wandb: without the package one line, before anything is trained; with it, the numbers of metrics.jsonl."""

import json
import struct
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from colt5dist.train.report.monitor import Monitor
from colt5dist.train.report.weights_and_biases import WeightsAndBiases


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_a_missing_package_is_one_line(
    pretrain_main: Callable[[list[str]], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert pretrain_main([f"run_dir={run_dir}", "monitor.wandb=true"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "monitor.wandb: the package wandb is not installed; pip install wandb" in line
    assert not run_dir.exists()


def history(file: Path) -> list[dict[str, Any]]:
    """The logged rows of wandb's file of an offline run: records of LevelDB's log format, after a head of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, whole, rows = file.read_bytes(), 7, b"", []
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # the end of a block is padding
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            items = Record.FromString(whole).history.item
            if items:
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
            whole = b""
    return rows


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_an_offline_run_and_its_continuation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both starts write one run of the same id, with the keys of metrics.jsonl."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for first_step, rate in ((0, 0.1), (2, 0.2)):
        time.sleep(first_step)  # wandb names the folder of a start by the second
        writer = WeightsAndBiases(tmp_path, "abc123", {"optimizer.lr": rate})
        with Monitor(tmp_path, is_first=True, first_step=first_step, num_steps=9, wandb=writer) as monitor:
            for step in range(first_step + 1, first_step + 4):
                monitor.record(step, {"loss": float(step), "eval/loss": None}, notes={"skipped_batch": [[0, 1]]})
    wandb.teardown()  # only now all is on the disk
    files = sorted(tmp_path.glob("wandb/offline-run-*-abc123/run-abc123.wandb"))
    assert len(files) == 2
    found = [history(file) for file in files]
    assert [[(row["_step"], row["loss"]) for row in rows] for rows in found] == [
        [(1, 1), (2, 2), (3, 3)],
        [(3, 3), (4, 4), (5, 5)],
    ]
    assert not any({"eval/loss", "skipped_batch", "step"} & set(row) for rows in found for row in rows)

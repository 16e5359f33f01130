"""monitor.wandb: without the package one line, before anything is trained; with it, the numbers of metrics.jsonl."""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

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


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_an_offline_run_and_its_continuation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both starts write one run of the same id, with the keys of metrics.jsonl."""
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for first_step, rate in ((0, 0.1), (2, 0.2)):
        writer = WeightsAndBiases(tmp_path, "abc123", {"optimizer.lr": rate})
        with Monitor(tmp_path, is_first=True, first_step=first_step, num_steps=9, wandb=writer) as monitor:
            for step in range(first_step + 1, first_step + 4):
                monitor.record(step, {"loss": float(step), "eval/loss": None}, notes={"skipped_batch": [[0, 1]]})
    files = sorted(tmp_path.glob("wandb/offline-run-*-abc123/run-abc123.wandb"))
    assert len(files) == 2
    seen = []
    for file in files:
        store = DataStore()
        store.open_for_scan(str(file))
        values = {}
        while (data := store.scan_data()) is not None:
            record = Record.FromString(data)
            for item in record.history.item:
                key = item.key or "/".join(item.nested_key)
                values.setdefault(key, []).append(item.value_json)
        seen.append((values["_step"], values["loss"], "eval/loss" in values))
    assert seen == [(["1", "2", "3"], ["1", "2", "3"], False), (["3", "4", "5"], ["3", "4", "5"], False)]
    assert "wandb" in sys.modules

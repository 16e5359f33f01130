"""metrics.jsonl and TensorBoard after an interruption."""

import resource
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from colt5dist.train.monitor import Monitor, read_metrics


def test_what_was_recorded_beyond_the_resumed_step_is_gone(tmp_path: Path) -> None:
    with Monitor(tmp_path, is_first=True, first_step=0, num_steps=9) as monitor:
        for step in range(1, 6):
            monitor.record(step, {"loss": float(step)})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    with Monitor(tmp_path, is_first=True, first_step=3, num_steps=9) as monitor:
        monitor.record(4, {"loss": 40.0})
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    scalars = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in scalars] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


def test_a_loss_that_is_not_finite_is_null(tmp_path: Path) -> None:
    with Monitor(tmp_path, is_first=True, first_step=0, num_steps=9) as monitor:
        monitor.record(1, {"loss": float("nan"), "grad_norm": float("inf"), "mfu": None})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": None, "grad_norm": None, "mfu": None}]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with Monitor(tmp_path, is_first=False, first_step=0, num_steps=9) as monitor:
        monitor.record(1, {"loss": 1.0})
        monitor.flush()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_goes_on_after_the_clock_was_set_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are read in the order of the times in their names: the new one must come last."""
    with Monitor(tmp_path, is_first=True, first_step=0, num_steps=9) as monitor:
        for step in range(1, 6):
            monitor.record(step, {"loss": float(step)})
    a_day_ago = time.time() - 86_400
    monkeypatch.setattr(time, "time", lambda: a_day_ago)
    with Monitor(tmp_path, is_first=True, first_step=3, num_steps=9) as monitor:
        monitor.record(4, {"loss": 40.0})
    scalars = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in scalars] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_rollback_on_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is undone goes, written or not; what stays and could not be written yet follows when it can."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Monitor(tmp_path, is_first=True, first_step=0, num_steps=9) as monitor:
        for step in (1, 2):
            monitor.record(step, {"loss": float(step)})
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + 5, before[1]))
        try:
            for step in (3, 4, 5):
                monitor.record(step, {"loss": float(step)})
            monitor.roll_back(4)
            monitor.roll_back(3)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        monitor.record(4, {"loss": 40.0})
        assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
        monitor.roll_back(1)
        assert [r["step"] for r in read_metrics(tmp_path)] == [1]
    assert "warning: metrics cannot be written (File too large)" in capsys.readouterr().err


def test_a_full_disk_costs_no_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No file may grow for a while: the run goes on, and metrics.jsonl has every record in order afterwards."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Monitor(tmp_path, is_first=True, first_step=0, num_steps=9) as monitor:
        monitor.record(1, {"loss": 1.0})
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + 5, before[1]))
        try:
            for step in (2, 3):
                monitor.record(step, {"loss": float(step)})
                monitor.flush()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert capsys.readouterr().err.count("warning: metrics cannot be written (File too large)") == 1
        assert [record["step"] for record in read_metrics(tmp_path)] == [1]
        monitor.record(4, {"loss": 4.0})
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(n, float(n)) for n in (1, 2, 3, 4)]
    assert 4 in [e.step for e in EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")]

"""metrics.jsonl and TensorBoard after an interruption and on a full disk; the output on a terminal."""

import os
import pty
import re
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from colt5dist.train.report.monitor import Monitor, read_metrics
from colt5dist.train.report.tensorboard.tags import place


def test_records_after_the_resumed_step_are_removed(tmp_path: Path) -> None:
    with Monitor(tmp_path, is_first=True, first_step=0, num_steps=9) as monitor:
        for step in range(1, 6):
            monitor.record(step, {"loss": float(step)})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    with Monitor(tmp_path, is_first=True, first_step=3, num_steps=9) as monitor:
        monitor.record(4, {"loss": 40.0})
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    scalars = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("1_loss/all/train")
    assert [(event.step, event.value) for event in scalars] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


def test_the_record_of_the_step_before_a_start_can_be_completed(tmp_path: Path) -> None:
    with Monitor(tmp_path, is_first=True, first_step=0, num_steps=9) as monitor:
        for step in (1, 2):
            monitor.record(step, {"loss": float(step)}, notes={"skipped_batch": [[0, 8]]})
    with Monitor(tmp_path, is_first=True, first_step=2, num_steps=9) as monitor:
        monitor.complete(2, {"eval/loss": 5.0})
        monitor.record(3, {"loss": 3.0})
    last = {"step": 2, "loss": 2.0, "skipped_batch": [[0, 8]], "eval/loss": 5.0}
    assert read_metrics(tmp_path)[1:] == [last, {"step": 3, "loss": 3.0}]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars(place("eval/loss").tag)] == [(2, 5.0)]
    assert [(event.step, event.value) for event in events.Scalars(place("loss").tag)] == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_loss_that_is_not_finite_is_null(tmp_path: Path) -> None:
    with Monitor(tmp_path, is_first=True, first_step=0, num_steps=9) as monitor:
        monitor.record(1, {"loss": float("nan"), "grad_norm": float("inf"), "mfu": None})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": None, "grad_norm": None, "mfu": None}]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with Monitor(tmp_path, is_first=False, first_step=0, num_steps=9) as monitor:
        monitor.record(1, {"loss": 1.0})
        monitor.flush()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_shows_new_steps_after_the_clock_was_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads files in the order of the times in their names, so the new one must come last."""
    with Monitor(tmp_path, is_first=True, first_step=0, num_steps=9) as monitor:
        for step in range(1, 6):
            monitor.record(step, {"loss": float(step)})
    a_day_ago = time.time() - 86_400
    monkeypatch.setattr(time, "time", lambda: a_day_ago)
    with Monitor(tmp_path, is_first=True, first_step=3, num_steps=9) as monitor:
        monitor.record(4, {"loss": 40.0})
    scalars = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("1_loss/all/train")
    assert [(event.step, event.value) for event in scalars] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_rollback_on_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Records that are undone are removed, written or not; the others are written when there is space."""
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


def test_a_full_disk_loses_no_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No file may grow for a while: the run continues, and metrics.jsonl has every record in order afterwards."""
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
    assert 4 in [e.step for e in EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("1_loss/all/train")]


END = b"<end of output>"


def on_a_terminal(work: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> str:
    """Run `work` with a new terminal as sys.stdout; returns what the terminal receives."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm", "COLUMNS": "80", "LINES": "25"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("rich._console", None)  # rich keeps a console that has read another environment
    terminal, stdout = pty.openpty()
    got = b""

    def read() -> None:
        nonlocal got
        while not got.endswith(END):
            got += os.read(terminal, 4096)

    reader = threading.Thread(target=read)
    reader.start()
    with open(stdout, "wb", buffering=0) as slave, open(stdout, "w", closefd=False) as file:
        try:
            with monkeypatch.context() as patched:
                patched.setattr(sys, "stdout", file)
                work()
        finally:
            file.flush()
            slave.write(END)
            reader.join()
    os.close(terminal)
    return got.removesuffix(END).decode()


def shown(printed: str) -> list[str]:
    """The lines that a very wide terminal shows after it has received `printed`."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", printed):
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part.startswith("\x1b[") and part.endswith("A"):
            row -= int(part[2:-1])
        elif not part.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines]


LINES = ["step 1/9 | loss 5.9 [bold] :smile: " + "and so on " * 20 + "1", "step 2/9"]
"""The first looks like markup, and is wider than the terminal."""


def say_lines(run_dir: Path, *, is_first: bool) -> None:
    """Two of nine steps, one line each."""
    with Monitor(run_dir, is_first=is_first, first_step=0, num_steps=9) as monitor:
        for step, line in enumerate(LINES, start=1):
            monitor.say(line)
            monitor.advance(step)


def test_lines_appear_above_the_progress_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are printed unchanged, and the bar is redrawn below them with the current step."""
    printed = on_a_terminal(lambda: say_lines(tmp_path, is_first=True), monkeypatch)
    *lines, bar, end = shown(printed)
    assert lines == LINES and end == "" and all(line in printed for line in LINES)  # also without colours
    assert re.fullmatch(r"step \S.*\S 2/9 [-\d:]+", bar)
    assert printed.endswith("\x1b[?25h")  # the cursor is visible again


def test_other_ranks_print_nothing_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert on_a_terminal(lambda: say_lines(tmp_path, is_first=False), monkeypatch) == ""


def test_a_file_gets_the_lines_and_no_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    say_lines(tmp_path, is_first=True)
    assert capsys.readouterr().out.splitlines() == LINES

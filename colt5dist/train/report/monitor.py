"""Writes metrics.jsonl, TensorBoard and the console, all from rank 0 and under the same names."""

import json
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from colt5dist.errors import ConfigError
from colt5dist.files import write_whole

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
EVENTS = "events.out.tfevents."
EVENT_TIME = re.compile(r"events\.out\.tfevents\.(\d{10})")

Record = dict[str, float | int | None]
"""Numbers by name, as in metrics.jsonl; None is written as null."""


class Monitor:
    """Writes the records of a run; on ranks other than the first every call does nothing.

    Args:
        run_dir: folder of the run.
        is_first: whether this is rank 0.
        first_step: steps that are already done; records and events of later steps are removed.
        num_steps: last step, for the progress bar.
    """

    def __init__(self, run_dir: Path, *, is_first: bool, first_step: int, num_steps: int) -> None:
        self.is_first = is_first
        self._progress: Progress | None = None
        if not is_first:
            return
        self._metrics_path = run_dir / METRICS
        _truncate(self._metrics_path, first_step)
        self._metrics = os.open(self._metrics_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._unwritten = b""
        self._events_folder = run_dir / TENSORBOARD
        self._writer: SummaryWriter | None = self._open_events(first_step)
        self._has_warned = False
        if sys.stdout.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, refresh_per_second=2)
            self._task = self._progress.add_task("step", total=num_steps, completed=first_step)

    def __enter__(self) -> "Monitor":
        self._hook = threading.excepthook
        threading.excepthook = self._on_thread_error
        if self._progress:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_first:
            if self._progress:
                self._progress.stop()
            self._write_metrics(b"")
            self._write_events(SummaryWriter.close)
            os.close(self._metrics)
        threading.excepthook = self._hook

    def _on_thread_error(self, arguments: threading.ExceptHookArgs) -> None:
        """Suppress the traceback of TensorBoard's writer thread when the disk is full: `_warn` reports it once."""
        if not (isinstance(arguments.exc_value, OSError) and type(arguments.thread).__name__ == "_AsyncWriterThread"):
            self._hook(arguments)

    def roll_back(self, step: int) -> None:
        """Remove the records and events after a step."""
        if self.is_first:
            self._write_events(SummaryWriter.close)
            try:
                self._drop_metrics(step)
                self._writer = self._open_events(step)
            except OSError as error:
                self._writer = None
                self._warn(error)
            self.advance(step)

    def say(self, text: str) -> None:
        """Print a line without any formatting."""
        if self._progress:
            self._progress.console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)
        elif self.is_first:
            print(text, flush=True)

    def advance(self, step: int) -> None:
        """Set the progress bar to a step."""
        if self._progress:
            self._progress.update(self._task, completed=step)

    def record(self, step: int, record: Record, notes: dict[str, Any] | None = None) -> None:
        """Append one object to metrics.jsonl, and its numbers to TensorBoard under the same names.

        Args:
            step: number of the step.
            record: numbers by name; one that is not finite is written as null, because JSON has no other notation.
            notes: further entries that are not numbers; they are written to metrics.jsonl only.
        """
        if not self.is_first:
            return
        known = {name: value if value is None or math.isfinite(value) else None for name, value in record.items()}
        self._write_metrics((json.dumps({"step": step, **known, **(notes or {})}) + "\n").encode())
        self.scalars(step, known)

    def complete(self, step: int, record: Record) -> None:
        """Add numbers to the record of the last step before this start, if it was logged.

        Args:
            step: number of the step.
            record: numbers by name.
        """
        if not self.is_first:
            return
        known = [found for found in read_metrics(self._metrics_path.parent) if found["step"] == step]
        before = known[-1] if known else {}
        self._drop_metrics(step - 1)
        self.record(
            step, record, notes={name: value for name, value in before.items() if name not in ("step", *record)}
        )

    def scalars(self, step: int, values: Record) -> None:
        """Write numbers to TensorBoard; after an error, with a new writer."""
        if self.is_first:
            if self._writer is None:
                self._writer = self._reopen_events()
            for name, value in values.items():
                if value is not None:
                    self._write_events(
                        partial(SummaryWriter.add_scalar, tag=name, scalar_value=value, global_step=step)
                    )

    def histograms(self, step: int, counts: dict[str, torch.Tensor]) -> None:
        """Write histograms to TensorBoard.

        Args:
            step: number of the step.
            counts: (bins,) counts over equal bins of [0, 1], by name.
        """
        if not self.is_first:
            return
        for name, count in counts.items():
            values = count.double().cpu()
            edges = torch.linspace(0, 1, len(values) + 1, dtype=torch.float64)
            centers = (edges[:-1] + edges[1:]) / 2
            total = float(values.sum())
            self._write_events(
                partial(
                    SummaryWriter.add_histogram_raw,
                    tag=name,
                    min=0.0,
                    max=1.0,
                    num=int(total),
                    sum=float((values * centers).sum()),
                    sum_squares=float((values * centers**2).sum()),
                    bucket_limits=edges[1:].tolist(),
                    bucket_counts=values.tolist(),
                    global_step=step,
                )
            )

    def flush(self) -> None:
        """Flush all records to disk, before a checkpoint relies on them."""
        if self.is_first:
            self._write_metrics(b"")
            try:
                os.fsync(self._metrics)
            except OSError as error:
                self._warn(error)
            self._write_events(SummaryWriter.flush)

    def _write_metrics(self, line: bytes) -> None:
        """Append to metrics.jsonl; what does not fit on a full disk is kept and written first the next time."""
        self._unwritten += line
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[os.write(self._metrics, self._unwritten) :]
        except OSError as error:
            self._warn(error)

    def _drop_metrics(self, last_step: int) -> None:
        """Remove the records after a step, written or not; needs no space on the disk."""
        written = self._metrics_path.read_bytes()
        lines = (written + self._unwritten).splitlines(keepends=True)
        kept = b"".join(line for line in lines if json.loads(line)["step"] <= last_step)
        os.ftruncate(self._metrics, min(len(kept), len(written)))
        self._unwritten = kept[len(written) :]

    def _open_events(self, last_step: int) -> SummaryWriter:
        """Open a writer of TensorBoard's events that marks those after a step as obsolete."""
        _date_back_events(self._events_folder)
        return SummaryWriter(str(self._events_folder), purge_step=last_step + 1, flush_secs=15)

    def _write_events(self, call: Callable[[SummaryWriter], object]) -> None:
        """Write to TensorBoard; after an error the writer can no longer be used."""
        try:
            if self._writer is not None:
                call(self._writer)
        except OSError as error:
            self._writer = None
            self._warn(error)

    def _reopen_events(self) -> SummaryWriter | None:
        try:
            return SummaryWriter(str(self._events_folder), flush_secs=15)
        except OSError as error:
            self._warn(error)
            return None

    def _warn(self, error: OSError) -> None:
        if not self._has_warned:
            self._has_warned = True
            print(
                f"warning: metrics cannot be written ({error.strerror or error}); the run continues; metrics.jsonl is "
                "completed when there is space, TensorBoard has a gap",
                file=sys.stderr,
                flush=True,
            )


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl.

    Args:
        run_dir: folder of the run.

    Returns:
        The records in order, without a last line that was cut off; empty if there is no file.

    Raises:
        ConfigError: the file cannot be read, or another line is not a record.
    """
    path = run_dir / METRICS
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); move it away, or choose another run_dir"
        ) from None
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            break
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise TypeError
        except (ValueError, TypeError, KeyError):
            raise ConfigError(f"{path}: line {number} is not a record of a step; fix or remove the line") from None
        records.append(record)
    return records


def _date_back_events(folder: Path) -> None:
    """Make sure that the event file of this start is the last by name, because TensorBoard reads them in that order.

    The names begin with the time. If the clock was set back, the new file, which makes overlapping events obsolete,
    would come first, and TensorBoard would show nothing new. Then the older files get a time just before now.
    """
    dated = [(match, path) for path in sorted(folder.glob(f"{EVENTS}*")) if (match := EVENT_TIME.match(path.name))]
    now = int(time.time())
    if not dated or int(dated[-1][0][1]) < now:
        return
    for age, (match, path) in zip(range(len(dated), 0, -1), dated, strict=True):
        path.rename(folder / f"{EVENTS}{now - age:010d}{path.name[match.end() :]}")


def _truncate(path: Path, last_step: int) -> None:
    """Remove the records after `last_step`, and a line that was cut off."""
    kept = [r for r in read_metrics(path.parent) if r["step"] <= last_step]
    write_whole(path, "".join(json.dumps(r) + "\n" for r in kept).encode())

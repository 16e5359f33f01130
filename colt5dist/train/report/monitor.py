"""What a run tells: metrics.jsonl, TensorBoard and the console, all from rank 0 and under the same names."""

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

EVENTS = "events.out.tfevents."
EVENT_TIME = re.compile(r"events\.out\.tfevents\.(\d{10})")

Record = dict[str, float | int | None]


class Monitor:
    """Writes the records of a run; on ranks other than the first every call does nothing.

    Args:
        run_dir: the run's folder.
        is_first: whether this is rank 0.
        first_step: steps that are already done; records and events beyond are of an undone part of the run and go.
        num_steps: last step, for the progress bar.
    """

    def __init__(self, run_dir: Path, *, is_first: bool, first_step: int, num_steps: int) -> None:
        self.is_first = is_first
        self._progress: Progress | None = None
        if not is_first:
            return
        self._metrics_path = run_dir / "metrics.jsonl"
        _truncate(self._metrics_path, first_step)
        self._metrics = os.open(self._metrics_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._unwritten = b""
        self._events_folder = run_dir / "tensorboard"
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
        """A thread of TensorBoard's that a full disk ended says nothing: `_warn` tells of it once."""
        if not (isinstance(arguments.exc_value, OSError) and type(arguments.thread).__name__ == "_AsyncWriterThread"):
            self._hook(arguments)

    def roll_back(self, step: int) -> None:
        """Undo the records and events beyond a step."""
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
        """Print a line, as it stands."""
        if self._progress:
            self._progress.console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)
        elif self.is_first:
            print(text, flush=True)

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        if self._progress:
            self._progress.update(self._task, completed=step)

    def record(self, step: int, record: Record, notes: dict[str, Any] | None = None) -> None:
        """Append one object to metrics.jsonl, and its numbers to TensorBoard under the same names.

        A number that is not finite is written as null: JSON has no other word for it. `notes` are no numbers, and stand
        in metrics.jsonl only.
        """
        if not self.is_first:
            return
        known = {name: value if value is None or math.isfinite(value) else None for name, value in record.items()}
        self._write_metrics((json.dumps({"step": step, **known, **(notes or {})}) + "\n").encode())
        self.scalars(step, known)

    def scalars(self, step: int, values: Record) -> None:
        """Write numbers to TensorBoard; with another writer after an error."""
        if self.is_first:
            if self._writer is None:
                self._writer = self._reopen_events()
            for name, value in values.items():
                if value is not None:
                    self._write_events(
                        partial(SummaryWriter.add_scalar, tag=name, scalar_value=value, global_step=step)
                    )

    def histograms(self, step: int, counts: dict[str, torch.Tensor]) -> None:
        """Write counts over equal bins of [0, 1] as TensorBoard histograms."""
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
        """Make everything that was recorded durable, as a checkpoint is about to rely on it."""
        if self.is_first:
            self._write_metrics(b"")
            try:
                os.fsync(self._metrics)
            except OSError as error:
                self._warn(error)
            self._write_events(SummaryWriter.flush)

    def _write_metrics(self, line: bytes) -> None:
        """Append to metrics.jsonl; what a full disk does not take is kept and comes first the next time."""
        self._unwritten += line
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[os.write(self._metrics, self._unwritten) :]
        except OSError as error:
            self._warn(error)

    def _drop_metrics(self, last_step: int) -> None:
        """Drop the records beyond a step, written or not; needs no space on the disk."""
        written = self._metrics_path.read_bytes()
        lines = (written + self._unwritten).splitlines(keepends=True)
        kept = b"".join(line for line in lines if json.loads(line)["step"] <= last_step)
        os.ftruncate(self._metrics, min(len(kept), len(written)))
        self._unwritten = kept[len(written) :]

    def _open_events(self, last_step: int) -> SummaryWriter:
        """A writer of TensorBoard's events that takes back those beyond a step."""
        _date_back_events(self._events_folder)
        return SummaryWriter(str(self._events_folder), purge_step=last_step + 1, flush_secs=15)

    def _write_events(self, call: Callable[[SummaryWriter], object]) -> None:
        """Write to TensorBoard; after an error its writer is of no use any more."""
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
                f"warning: metrics cannot be written ({error.strerror or error}); the run goes on, metrics.jsonl "
                "follows when it can, TensorBoard has a gap",
                file=sys.stderr,
                flush=True,
            )


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run, in order; a last line that was cut off is left out.

    Raises:
        ConfigError: another line is no record.
    """
    path = run_dir / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); move it away, or name another run_dir") from None
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            break
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise TypeError
        except (ValueError, TypeError, KeyError):
            raise ConfigError(
                f"{path}: line {number} is not a record of a step; mend it, or take the line out"
            ) from None
        records.append(record)
    return records


def _date_back_events(folder: Path) -> None:
    """See that the event file of this start is the last by name, in which order TensorBoard reads them.

    The names begin with the time. After the clock was set back the new file, which takes back what it overlaps, would
    come first, and TensorBoard would show nothing new. Then the older files are renamed to just before now.
    """
    dated = [(match, path) for path in sorted(folder.glob(f"{EVENTS}*")) if (match := EVENT_TIME.match(path.name))]
    now = int(time.time())
    if not dated or int(dated[-1][0][1]) < now:
        return
    for age, (match, path) in zip(range(len(dated), 0, -1), dated, strict=True):
        path.rename(folder / f"{EVENTS}{now - age:010d}{path.name[match.end() :]}")


def _truncate(path: Path, last_step: int) -> None:
    """Drop the records beyond `last_step` and a line that was cut off."""
    kept = [r for r in read_metrics(path.parent) if r["step"] <= last_step]
    write_whole(path, "".join(json.dumps(r) + "\n" for r in kept).encode())

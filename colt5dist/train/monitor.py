"""What a run tells: metrics.jsonl, TensorBoard and the console, all from rank 0 and under the same names."""

import json
import math
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from colt5dist.errors import ConfigError
from colt5dist.files import write_whole

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
        self._run_dir = run_dir
        self._open(first_step)
        if sys.stdout.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, refresh_per_second=2)
            self._task = self._progress.add_task("step", total=num_steps, completed=first_step)

    def __enter__(self) -> "Monitor":
        if self._progress:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_first:
            if self._progress:
                self._progress.stop()
            self._writer.close()
            self._metrics.close()

    def roll_back(self, step: int) -> None:
        """Undo the records and events beyond a step."""
        if self.is_first:
            self._writer.close()
            self._metrics.close()
            self._open(step)
            self.advance(step)

    def say(self, text: str) -> None:
        """Print a line, as it stands."""
        if self._progress:
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
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
        self._metrics.write(json.dumps({"step": step, **known, **(notes or {})}) + "\n")
        self._metrics.flush()
        self.scalars(step, known)

    def scalars(self, step: int, values: Record) -> None:
        """Write numbers to TensorBoard."""
        if self.is_first:
            for name, value in values.items():
                if value is not None:
                    self._writer.add_scalar(name, value, step)

    def histograms(self, step: int, counts: dict[str, torch.Tensor]) -> None:
        """Write counts over equal bins of [0, 1] as TensorBoard histograms."""
        if not self.is_first:
            return
        for name, count in counts.items():
            values = count.double().cpu()
            edges = torch.linspace(0, 1, len(values) + 1, dtype=torch.float64)
            centers = (edges[:-1] + edges[1:]) / 2
            total = float(values.sum())
            self._writer.add_histogram_raw(
                name,
                min=0.0,
                max=1.0,
                num=int(total),
                sum=float((values * centers).sum()),
                sum_squares=float((values * centers**2).sum()),
                bucket_limits=edges[1:].tolist(),
                bucket_counts=values.tolist(),
                global_step=step,
            )

    def _open(self, last_step: int) -> None:
        """Open metrics.jsonl and TensorBoard's events, without what they hold beyond a step."""
        path = self._run_dir / "metrics.jsonl"
        _truncate(path, last_step)
        self._metrics = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open for the whole run)
        self._writer = SummaryWriter(str(self._run_dir / "tensorboard"), purge_step=last_step + 1, flush_secs=15)

    def flush(self) -> None:
        """Make everything that was recorded durable, as a checkpoint is about to rely on it."""
        if self.is_first:
            os.fsync(self._metrics.fileno())
            self._writer.flush()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run, in order; a last line that was cut off is left out.

    Raises:
        ConfigError: another line is no record.
    """
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            break
        try:
            record = json.loads(line)
            int(record["step"])
        except (ValueError, TypeError, KeyError):
            raise ConfigError(
                f"{path}: line {number} is not a record of a step; mend it, or take the line out"
            ) from None
        records.append(record)
    return records


def _truncate(path: Path, last_step: int) -> None:
    """Drop the records beyond `last_step` and a line that was cut off."""
    kept = [r for r in read_metrics(path.parent) if r["step"] <= last_step]
    write_whole(path, "".join(json.dumps(r) + "\n" for r in kept).encode())

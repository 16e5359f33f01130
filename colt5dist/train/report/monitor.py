"""Writes metrics.jsonl, TensorBoard, Weights & Biases and the console, all from rank 0."""

import json
import math
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from colt5dist.errors import ConfigError
from colt5dist.files import write_whole
from colt5dist.train.report.tensorboard.events import Events
from colt5dist.train.report.tensorboard.hyperparameters import hyperparameters
from colt5dist.train.report.tensorboard.tags import ROUTING as ROUTING_GROUP
from colt5dist.train.report.tensorboard.texts import code_block
from colt5dist.train.report.weights_and_biases import WeightsAndBiases

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
ROUTING = "routing"
"""Folder of the pictures of what is routed."""
PICTURES = f"{ROUTING_GROUP}/all_layers"
"""Beginning of their tags."""

Record = dict[str, float | int | None]
"""Numbers by name, as in metrics.jsonl; None is written as null."""


class Monitor:
    """Writes the records of a run; on ranks other than the first every call does nothing.

    Args:
        run_dir: folder of the run.
        is_first: whether this is rank 0.
        first_step: steps that are already done; records and events of later steps are removed.
        num_steps: last step, for the progress bar.
        wandb: what writes to Weights & Biases; None: nothing does.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        is_first: bool,
        first_step: int,
        num_steps: int,
        wandb: WeightsAndBiases | None = None,
    ) -> None:
        self.is_first = is_first
        self._progress: Progress | None = None
        if not is_first:
            return
        self._run_dir = run_dir
        self._metrics_path = run_dir / METRICS
        _truncate(self._metrics_path, first_step)
        self._metrics = os.open(self._metrics_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._unwritten = b""
        self._has_warned = False
        self._wandb = wandb
        keys = {key for record in read_metrics(run_dir) for key in record}
        self._events = Events(run_dir / TENSORBOARD, first_step, keys=keys - {"step"}, warn=self._warn)
        self._pictures = run_dir / ROUTING
        self._drop_pictures(first_step)
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

    def finish(self) -> None:
        """Wait until Weights & Biases, if it is in use, has all numbers of a run that did not fail."""
        if self.is_first and self._wandb:
            self._wandb.finish(failed=False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_first:
            if self._progress:
                self._progress.stop()
            self._write_metrics(b"")
            self._events.close()
            if self._wandb:
                self._wandb.finish(failed=error is not None)
            os.close(self._metrics)
        threading.excepthook = self._hook

    def _on_thread_error(self, arguments: threading.ExceptHookArgs) -> None:
        """Suppress the traceback of TensorBoard's writer thread when the disk is full: `_warn` reports it once."""
        if not (isinstance(arguments.exc_value, OSError) and type(arguments.thread).__name__ == "_AsyncWriterThread"):
            self._hook(arguments)

    def begin(self, settings: Mapping[str, Any], configuration: str, lines: Sequence[str], run_id: str) -> None:
        """Show in TensorBoard what is known at the start.

        Args:
            settings: value of each setting by its dotted key, and further values that runs are compared by.
            configuration: the resolved configuration as YAML.
            lines: what the start has printed.
            run_id: id of the run.
        """
        if self.is_first:
            texts = {"run/configuration": code_block(configuration), "run/start": code_block("\n".join(lines))}
            self._events.begin(texts, hyperparameters(settings, f"{self._run_dir.name} ({run_id[:8]})"))

    def roll_back(self, step: int) -> None:
        """Remove the records, events and pictures after a step."""
        if self.is_first:
            try:
                self._drop_metrics(step)
            except OSError as error:
                self._warn(error)
            self._events.roll_back(step)
            self._drop_pictures(step)
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
        """Append one object to metrics.jsonl, and its numbers to TensorBoard and Weights & Biases.

        Args:
            step: number of the step.
            record: numbers by name; one that is not finite is written as null, because JSON has no other notation.
            notes: further entries that are not numbers; they are written to metrics.jsonl only.
        """
        if not self.is_first:
            return
        known = {name: value if value is None or math.isfinite(value) else None for name, value in record.items()}
        self._write_metrics((json.dumps({"step": step, **known, **(notes or {})}) + "\n").encode())
        self._events.scalars(step, known)
        if self._wandb:
            self._wandb.log(step, known)

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

    def histograms(self, step: int, counts: dict[str, torch.Tensor]) -> None:
        """Write histograms to TensorBoard.

        Args:
            step: number of the step.
            counts: (bins,) counts over equal bins of [0, 1], by name.
        """
        if self.is_first:
            self._events.histograms(step, counts)

    def text(self, step: int, tag: str, text: str) -> None:
        """Write a text in Markdown to TensorBoard."""
        if self.is_first:
            self._events.text(step, tag, text)

    def picture(self, step: int, name: str, png: bytes, description: str) -> None:
        """Write a picture of what is routed to TensorBoard and to a file.

        Args:
            step: number of the step.
            name: what it is, as a part of the tag and of the file's name.
            png: the content of a PNG file.
            description: of the picture, in Markdown.
        """
        if self.is_first:
            self._events.image(step, f"{PICTURES}/{name}", png, description)
            try:
                self._pictures.mkdir(exist_ok=True)
                write_whole(self._pictures / f"step_{step:08d}_{name}.png", png)
            except OSError as error:
                self._warn(error)

    def flush(self) -> None:
        """Flush all records to disk, before a checkpoint relies on them."""
        if self.is_first:
            self._write_metrics(b"")
            try:
                os.fsync(self._metrics)
            except OSError as error:
                self._warn(error)
            self._events.flush()

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

    def _drop_pictures(self, last_step: int) -> None:
        """Remove the pictures of later steps; they are drawn again when the run comes there."""
        for path in self._pictures.glob("step_*_*.png"):
            step = path.name.split("_")[1]
            if step.isdecimal() and int(step) > last_step:
                with suppress(OSError):
                    path.unlink()

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


def _truncate(path: Path, last_step: int) -> None:
    """Remove the records after `last_step`, and a line that was cut off."""
    kept = [r for r in read_metrics(path.parent) if r["step"] <= last_step]
    write_whole(path, "".join(json.dumps(r) + "\n" for r in kept).encode())

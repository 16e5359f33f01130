"""Reads the next step's samples before the ranks agree on this step, so a rank without data does not hang them."""

import math
import queue
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress

import torch

from colt5dist.data.read.batch import Batch
from colt5dist.data.read.loader import DataWorkerError, TrainingBatches
from colt5dist.errors import ConfigError
from colt5dist.train.ranks import Ranks, raise_together

CHECK_SECONDS = 0.2
"""Time between two checks whether a stop is requested while data is awaited."""


class ReadAhead:
    """Holds this rank's micro-batches of one step, and an error of the data until all ranks know of it.

    Creating it reads the first step.

    Args:
        batches: the micro-batches of this rank, step after step.
        ranks: place of this rank.
        stop_wanted: whether a stop is requested; that ends every wait for data.
        first_seconds: seconds that reading the first step may take.

    Attributes:
        failure: why there is no data; None if there is.
    """

    def __init__(
        self, batches: TrainingBatches, ranks: Ranks, stop_wanted: Callable[[], bool], *, first_seconds: float
    ) -> None:
        self._batches = batches
        self._ranks = ranks
        self._stop_wanted = stop_wanted
        self._reader = _Reader()
        self._reading: Future[list[Batch]] | None = None
        self._next_step: list[Batch] = []
        self._num_bad_records = 0
        self.failure: ConfigError | DataWorkerError | None = None
        self.read(first_seconds)

    def read(self, seconds: float) -> None:
        """Read the next step, or keep the error if it cannot be read; returns early if a stop is requested.

        Args:
            seconds: time limit; less than the heartbeat allows, so that there is time for a checkpoint.
        """
        self._reading = self._reader.submit(lambda: next(self._batches))
        checks = math.ceil(seconds / CHECK_SECONDS)  # counted, not timed: a pause of all processes has no effect
        while not self._reading.done() and not self._stop_wanted():
            if checks == 0:
                self.failure = DataWorkerError(
                    f"no data arrived for {seconds:g} s; check the disk or network of the shards; if reading may "
                    "take so long, raise train.timeout_seconds (at start train.timeout_minutes)"
                )
                return
            checks -= 1
            with suppress(FutureTimeoutError):
                self._reading.exception(timeout=CHECK_SECONDS)
        if not self._reading.done():
            return  # the ranks will agree on the stop
        try:
            self._next_step = self._reading.result()
        except (ConfigError, DataWorkerError) as error:
            self.failure = error
        found = self._batches.new_bad_records()
        self._num_bad_records += len(found)
        for line in found:
            print(f"rank {self._ranks.rank}: damaged record: {line}", file=sys.stderr, flush=True)

    def take(self) -> list[Batch]:
        """Return the micro-batches of the step that was read."""
        step, self._next_step = self._next_step, []
        return step

    def count_bad_records(self) -> int:
        """Return the number of damaged records found since the last call."""
        count, self._num_bad_records = self._num_bad_records, 0
        return count

    def stop_together(self, *, bad_records: int = 0, allowed: int = 0) -> None:
        """Raise on all ranks if any rank has no data; collective.

        Args:
            bad_records: number of damaged records found by all ranks.
            allowed: largest number of them that is allowed.

        Raises:
            DataWorkerError: on all ranks, if a reader process of any rank was killed, or reads for too long.
            ConfigError: on all ranks, if any rank cannot read its samples, or too many records are damaged.
        """
        message = None if self.failure is None else f"rank {self._ranks.rank}: {self.failure}"
        fault = isinstance(self.failure, DataWorkerError)
        raise_together(message if fault else None, DataWorkerError)
        raise_together(None if fault else message and str(self.failure))
        if bad_records > allowed:
            raise_together(
                f"data.max_bad_records: {bad_records} damaged records were found, {allowed} are allowed; each is named "
                "above; copy or prepare the shards again"
            )

    def close(self) -> None:
        """Stop the reader processes."""
        if self._reading and not self._reading.done():
            self._batches.kill_workers()  # one may wait for a disk or a network for ever
        self._reader.close()
        self._batches.close()


class _Reader:
    """A thread that waits for data in place of the main thread; a daemon, so that a stuck read cannot delay the end."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[tuple[Future[list[Batch]], Callable[[], list[Batch]]] | None] = (
            queue.SimpleQueue()
        )
        self._device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        threading.Thread(target=self._run, name="read ahead", daemon=True).start()

    def submit(self, task: Callable[[], list[Batch]]) -> "Future[list[Batch]]":
        """Run a task on the thread."""
        future: Future[list[Batch]] = Future()
        self._tasks.put((future, task))
        return future

    def close(self) -> None:
        """End the thread after its current task."""
        self._tasks.put(None)

    def _run(self) -> None:
        if self._device is not None:
            torch.cuda.set_device(self._device)  # page-locked memory belongs to the thread's device
        while (item := self._tasks.get()) is not None:
            future, task = item
            try:
                future.set_result(task())
            except BaseException as error:
                future.set_exception(error)

"""The samples of the next step, read before the ranks agree on this one: so a rank that has none does not hang them."""

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

LOOK_SECONDS = 0.2


class ReadAhead:
    """One step's micro-batches of this rank, and what is wrong with the data, kept until all ranks know of it."""

    def __init__(
        self, batches: TrainingBatches, ranks: Ranks, stop_wanted: Callable[[], bool], *, first_seconds: float
    ) -> None:
        """Read the first step, for so many seconds at most; `stop_wanted` ends every wait for data."""
        self._batches = batches
        self._ranks = ranks
        self._stop_wanted = stop_wanted
        self._reader = _Reader()
        self._reading: Future[list[Batch]] | None = None
        self._coming: list[Batch] = []
        self._num_bad_records = 0
        self.failure: ConfigError | DataWorkerError | None = None
        self.read(first_seconds)

    def read(self, seconds: float) -> None:
        """Read the next step, or keep the reason why it cannot be read; a request to stop leaves it unread.

        Args:
            seconds: what it may take; less than the heartbeat allows, so that there is time for a checkpoint.
        """
        self._reading = self._reader.submit(lambda: next(self._batches))
        looks = math.ceil(seconds / LOOK_SECONDS)  # counted, not timed: in a pause of all processes none is made
        while not self._reading.done() and not self._stop_wanted():
            if looks == 0:
                self.failure = DataWorkerError(
                    f"no data came for {seconds:g} s; see that the disk or network of the shards is well; if that may "
                    "take so long, raise train.timeout_seconds (at start train.timeout_minutes)"
                )
                return
            looks -= 1
            with suppress(FutureTimeoutError):
                self._reading.exception(timeout=LOOK_SECONDS)
        if not self._reading.done():
            return  # the ranks are about to agree on the stop
        try:
            self._coming = self._reading.result()
        except (ConfigError, DataWorkerError) as error:
            self.failure = error
        found = self._batches.new_bad_records()
        self._num_bad_records += len(found)
        for line in found:
            print(f"rank {self._ranks.rank}: damaged record: {line}", file=sys.stderr, flush=True)

    def take(self) -> list[Batch]:
        """The step that was read."""
        step, self._coming = self._coming, []
        return step

    def count_bad_records(self) -> int:
        """Damaged records that were met since the last call."""
        count, self._num_bad_records = self._num_bad_records, 0
        return count

    def stop_together(self, *, bad_records: int = 0, allowed: int = 0) -> None:
        """See that all ranks have their data; all call this at the same time.

        Args:
            bad_records: damaged records that all ranks have met.
            allowed: as many may be.

        Raises:
            DataWorkerError: on all ranks, if a reader process of some rank was killed, or reads for too long.
            ConfigError: on all ranks, if some rank cannot read its samples, or more records are damaged than may be.
        """
        message = None if self.failure is None else f"rank {self._ranks.rank}: {self.failure}"
        fault = isinstance(self.failure, DataWorkerError)
        raise_together(message if fault else None, DataWorkerError)
        raise_together(None if fault else message and str(self.failure))
        if bad_records > allowed:
            raise_together(
                f"data.max_bad_records: {bad_records} damaged records were met, {allowed} are allowed; each is named "
                "above; copy or prepare the shards again"
            )

    def close(self) -> None:
        """Stop the reader processes."""
        if self._reading and not self._reading.done():
            self._batches.kill_workers()  # one waits for a disk or a network, perhaps for ever
        self._reader.close()
        self._batches.close()


class _Reader:
    """A thread that waits for data, so that the trainer's need not. A daemon: a read that never ends keeps nobody."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[tuple[Future[list[Batch]], Callable[[], list[Batch]]] | None] = (
            queue.SimpleQueue()
        )
        self._device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        threading.Thread(target=self._run, name="read ahead", daemon=True).start()

    def submit(self, task: Callable[[], list[Batch]]) -> "Future[list[Batch]]":
        """Have a task done."""
        future: Future[list[Batch]] = Future()
        self._tasks.put((future, task))
        return future

    def close(self) -> None:
        """End the thread after what it is doing."""
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

"""The training samples of one rank, step by step, read ahead by worker processes.

What is wrong with the data crosses from a worker as an item, in its place in the order, and reaches the trainer at the
step that it belongs to, so that all ranks can stop together.
"""

import atexit
import multiprocessing.connection
import signal
import threading
import weakref
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from colt5dist.data.config import DataConfig
from colt5dist.data.order.skip import SkipList
from colt5dist.data.read.batch import Batch, make_batch
from colt5dist.data.read.samples import Samples
from colt5dist.data.read.shards import ShardSet
from colt5dist.data.read.sources import Sources
from colt5dist.errors import ConfigError

STUCK_SECONDS = 1.0
"""What a worker process has to end by itself."""


def training_batches(
    shards: ShardSet | Sources,
    config: DataConfig,
    *,
    seed: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    first_sample: int,
    first_step: int = 1,
    pin_memory: bool = False,
) -> "TrainingBatches":
    """The micro-batches of one rank, without end.

    The samples of the run are numbered from 0; each global batch takes the next global_batch_size of them that
    data.skip does not leave out. Rank r of W gets samples r, r + W, ... of it, in order, cut into micro-batches. From
    the steps of the length schedule on they have other lengths.

    Args:
        shards: the training set.
        config: lengths and their schedule, mixture, samples to skip, workers.
        seed: seed of the order and of the masks.
        global_batch_size: samples of a step; a multiple of micro_batch_size * world_size.
        micro_batch_size: samples of a micro-batch, where the schedule says nothing else.
        rank: number of this rank.
        world_size: number of ranks.
        first_sample: number of the first sample that earlier steps have not used up.
        first_step: number of the first optimizer step, for the schedule.
        pin_memory: put the tensors in page-locked memory (needs a GPU).

    Returns:
        An iterator over steps; each is the list of this rank's micro-batches. Its `close` stops the worker processes.
    """
    share = global_batch_size // world_size
    sizes = [micro_batch_size] + [
        min(entry.micro_batch_size or micro_batch_size, share) for entry in config.length_schedule
    ]
    assert global_batch_size % world_size == 0 and 0 <= rank < world_size, (global_batch_size, rank, world_size)
    assert all(share % size == 0 for size in sizes), (share, sizes)
    first_steps = [1, *(entry.step for entry in config.length_schedule)]
    sampler = RankSampler(
        SkipList(config.skip),
        first_sample=first_sample,
        first_step=first_step,
        stages=list(zip(first_steps, sizes, strict=True)),
        rank=rank,
        world_size=world_size,
        global_batch_size=global_batch_size,
    )
    workers: dict[str, Any] = {}
    if config.num_workers:
        # fork: the mapped index is shared, and nothing has to be pickled
        workers = {"multiprocessing_context": "fork", "worker_init_fn": ignore_stop_signals, "prefetch_factor": 4}
    loader = DataLoader(
        MicroBatches(shards, config, seed=seed, stage=sampler.stage_at(first_step)),
        batch_size=None,
        sampler=sampler,
        num_workers=config.num_workers,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        # of its own, so that the trainer's random state is left alone
        generator=torch.Generator(),
        **workers,
    )
    return TrainingBatches(loader, rank)


@dataclass(frozen=True)
class Order:
    """What a worker is to make."""

    stage: int
    """Entry of the length schedule; 0 before the first."""
    numbers: list[int]
    """Numbers of the samples of one micro-batch."""
    ends_step: bool
    """Whether it is the rank's last of a step."""


class RankSampler(Sampler[Order]):
    """Yields what one rank needs, micro-batch after micro-batch, without end."""

    def __init__(
        self,
        skip: SkipList,
        *,
        first_sample: int,
        first_step: int,
        stages: list[tuple[int, int]],
        rank: int,
        world_size: int,
        global_batch_size: int,
    ) -> None:
        """Begin a step at sample `first_sample`; `stages` are pairs of a first step and a micro-batch size."""
        self._skip = skip
        self._first_sample = first_sample
        self._first_step = first_step
        self._stages = stages
        self._rank = rank
        self._world_size = world_size
        self._global_batch_size = global_batch_size

    def stage_at(self, step: int) -> int:
        """Number of the stage that a step belongs to."""
        return bisect_right([first for first, _ in self._stages], step) - 1

    def __iter__(self) -> Iterator[Order]:
        first = self._first_sample
        for step in count(self._first_step):
            stage = self.stage_at(step)
            size = self._stages[stage][1]
            numbers = self._skip.take(first, self._global_batch_size)
            first = int(numbers[-1]) + 1
            mine = numbers[self._rank :: self._world_size].tolist()
            for begin in range(0, len(mine), size):
                yield Order(stage, mine[begin : begin + size], begin + size == len(mine))


@dataclass(frozen=True)
class Item:
    """What a worker made."""

    batch: Batch | ConfigError
    """The micro-batch, or what is wrong with the data."""
    ends_step: bool
    """Whether it is the rank's last of a step."""
    bad_records: list[str]
    """Damaged records of the shards that the worker met for the first time, and replaced."""

    def pin_memory(self) -> "Item":
        """The same in page-locked memory; the loader calls it."""
        if isinstance(self.batch, ConfigError):
            return self
        pinned: Any = {name: tensor.pin_memory() for name, tensor in dict(self.batch).items()}  # type: ignore[attr-defined]
        return replace(self, batch=pinned)


class MicroBatches(Dataset[Item]):
    """Micro-batches by their sample numbers; an error is an item, so that it crosses from a worker as it is."""

    def __init__(self, shards: ShardSet | Sources, config: DataConfig, *, seed: int, stage: int) -> None:
        """Make batches of `shards`, of `stage` first: what it needs is shared by all workers."""
        self._shards = shards
        self._configs = config.stages()
        self._seed = seed
        self._samples = {stage: self._plan(stage)}

    def __getitem__(self, order: Order) -> Item:
        if order.stage not in self._samples:
            self._samples = {order.stage: self._plan(order.stage)}
        samples = self._samples[order.stage]
        batch: Batch | ConfigError
        try:
            batch = make_batch(samples, order.numbers)
        except ConfigError as error:
            batch = error
        return Item(batch, order.ends_step, samples.new_bad_records())

    def _plan(self, stage: int) -> Samples:
        return Samples(self._shards, self._configs[stage], seed=self._seed, stage=stage)


class DataWorkerError(RuntimeError):
    """A reader process of this rank has ended by itself, or brings no data."""


class TrainingBatches(Iterator[list[Batch]]):
    """An iterator over the steps of one rank."""

    def __init__(self, loader: DataLoader[Item], rank: int) -> None:
        """Take the items of `loader`."""
        # torch would raise from a signal handler, anywhere in the trainer, when a worker dies; it looks at the workers
        # while it waits for one, too, and so the error comes where it is expected
        handler = signal.getsignal(signal.SIGCHLD)
        self._iterator: Iterator[Item] | None = iter(loader)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler)
        self._workers: Sequence[BaseProcess] = tuple(getattr(self._iterator, "_workers", ()))
        self._rank = rank
        self._bad_records: dict[str, None] = {}
        self._new_bad_records: list[str] = []
        # the workers ignore SIGTERM, so an interpreter that ends with them alive would wait for ever
        atexit.register(_kill_if_alive, weakref.ref(self))

    def __next__(self) -> list[Batch]:
        """The micro-batches of the next step.

        Raises:
            ConfigError: the data is damaged beyond what is allowed, or cannot be read.
            DataWorkerError: a reader process was killed.
        """
        if self._iterator is None:
            raise StopIteration
        step: list[Batch] = []
        while True:
            try:
                item = next(self._iterator)
            except (RuntimeError, EOFError, ConnectionError) as error:
                lost = self._worker_was_lost(error)
                self.kill_workers()  # the error holds torch's iterator, which so would not stop the others
                self.close()
                if not lost:
                    raise
                reason = (str(error) or "it was cut off").splitlines()[0].rstrip(".")
                raise DataWorkerError(
                    f"a reader process of rank {self._rank} ended ({reason}); if it was killed for want of memory, "
                    "lower data.num_workers"
                ) from error
            new = [record for record in item.bad_records if record not in self._bad_records]
            self._bad_records.update(dict.fromkeys(new))
            self._new_bad_records += new
            if isinstance(item.batch, ConfigError):
                self.close()
                raise item.batch
            step.append(item.batch)
            if item.ends_step:
                return step

    def new_bad_records(self) -> list[str]:
        """Damaged records that this rank met, and replaced, since the last call; one line each."""
        found, self._new_bad_records = self._new_bad_records, []
        return found

    def close(self) -> None:
        """Stop the worker processes; further calls do nothing.

        One that waits for a disk or a network obeys neither a word nor a signal that it could catch, and is killed.
        """
        killing = threading.Timer(STUCK_SECONDS, self.kill_workers)
        killing.daemon = True
        killing.start()
        self._iterator = None  # torch's iterator stops its workers when nobody holds it
        killing.cancel()

    def kill_workers(self) -> None:
        """End the worker processes at once; they hold nothing that is lost."""
        for worker in self._workers:
            worker.kill()

    def _worker_was_lost(self, error: Exception) -> bool:
        """Whether what torch raised comes of a worker that has ended, not of one that raised it itself.

        One that dies while a batch is taken over from it closes its sockets before it can be seen that it is gone.
        """
        if str(error).startswith("Caught "):
            return False
        return bool(multiprocessing.connection.wait([worker.sentinel for worker in self._workers], STUCK_SECONDS))


def _kill_if_alive(reference: "weakref.ref[TrainingBatches]") -> None:
    batches = reference()
    if batches is not None:
        batches.kill_workers()


def ignore_stop_signals(worker: int) -> None:
    """Let the trainer decide when its readers end: a signal to the whole group must not kill them under it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _unchanged(item: Any) -> Any:
    return item

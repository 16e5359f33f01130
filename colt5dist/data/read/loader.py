"""The training batches of one rank, step by step, read ahead by worker processes.

An error in the data is sent from a worker as an item at its place in the order. It reaches the trainer at the step
that it belongs to, so that all ranks can stop together.
"""

import atexit
import gc
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
from colt5dist.data.order.batch_layout import BatchLayout
from colt5dist.data.order.skip import SkipList
from colt5dist.data.read.batch import Batch, make_batch
from colt5dist.data.read.samples import Samples
from colt5dist.data.read.shards import ShardSet
from colt5dist.data.read.sources import Sources
from colt5dist.errors import ConfigError

STUCK_SECONDS = 1.0
"""Time that a worker process is given to end by itself."""


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
    """Return the endless micro-batches of one rank.

    The samples of the run are numbered from 0. Each global batch takes the next global_batch_size of them that
    data.skip does not leave out; `order/batch_layout.py` divides it among ranks and micro-batches. From the steps of
    the length schedule on, samples have other lengths.

    Args:
        shards: the training set, or several.
        config: lengths and their schedule, mixture, samples to skip, number of workers.
        seed: seed of the order and of the masks.
        global_batch_size: samples per step; a multiple of micro_batch_size * world_size.
        micro_batch_size: samples per micro-batch, where the length schedule sets no other size.
        rank: number of this rank.
        world_size: number of ranks.
        first_sample: number of the first sample that earlier steps have not used.
        first_step: number of the first optimizer step, for the length schedule.
        pin_memory: put the tensors in page-locked memory (needs a GPU).

    Returns:
        An iterator over steps; each step is the list of this rank's micro-batches. Its `close` stops the workers.
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
        # fork: the memory-mapped index is shared, and nothing has to be pickled
        workers = {"multiprocessing_context": "fork", "worker_init_fn": prepare_worker, "prefetch_factor": 4}
    loader = DataLoader(
        MicroBatches(shards, config, seed=seed, stage=sampler.stage_at(first_step)),
        batch_size=None,
        sampler=sampler,
        num_workers=config.num_workers,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        # its own generator, so that the trainer's random state does not change
        generator=torch.Generator(),
        **workers,
    )
    return TrainingBatches(loader, rank)


@dataclass(frozen=True)
class MicroBatchRequest:
    """What a worker process is asked to make."""

    stage: int
    """Stage of the length schedule: 0 before its first entry, 1 from the first entry on, ..."""
    numbers: list[int]
    """Sample numbers of one micro-batch."""
    ends_step: bool
    """Whether it is the rank's last micro-batch of a step."""


class RankSampler(Sampler[MicroBatchRequest]):
    """Yields the micro-batches that one rank needs, in order and without end.

    Args:
        skip: samples that are left out.
        first_sample: number of the first sample of the first step.
        first_step: number of the first optimizer step.
        stages: a pair (first step, micro-batch size in samples) for each stage of the length schedule, in order.
        rank: number of this rank.
        world_size: number of ranks.
        global_batch_size: samples per step.
    """

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

    def __iter__(self) -> Iterator[MicroBatchRequest]:
        first = self._first_sample
        for step in count(self._first_step):
            stage = self.stage_at(step)
            size = self._stages[stage][1]
            numbers = self._skip.take(first, self._global_batch_size)
            first = int(numbers[-1]) + 1
            layout = BatchLayout(world_size=self._world_size, micro_batch_size=size)
            *earlier, last = layout.micro_batches(numbers, self._rank).tolist()
            for micro_batch in earlier:
                yield MicroBatchRequest(stage, micro_batch, ends_step=False)
            yield MicroBatchRequest(stage, last, ends_step=True)


@dataclass(frozen=True)
class Item:
    """What a worker process made."""

    batch: Batch | ConfigError
    """The micro-batch, or what is wrong with the data."""
    ends_step: bool
    """Whether it is the rank's last micro-batch of a step."""
    bad_records: list[str]
    """Damaged records that the worker found for the first time; their samples were replaced. One message each."""

    def pin_memory(self) -> "Item":
        """Return a copy in page-locked memory; PyTorch's DataLoader calls it."""
        if isinstance(self.batch, ConfigError):
            return self
        pinned: Any = {name: tensor.pin_memory() for name, tensor in dict(self.batch).items()}  # type: ignore[attr-defined]
        return replace(self, batch=pinned)


class MicroBatches(Dataset[Item]):
    """Micro-batches by their sample numbers.

    An error is returned as an item, so that it reaches the trainer's process unchanged.

    Args:
        shards: the shard set, or several.
        config: the data settings, with their length schedule.
        seed: seed of the order and of the masks.
        stage: the first stage that is asked for; its plan is made here, before the workers are forked, and shared by
            all of them.
    """

    def __init__(self, shards: ShardSet | Sources, config: DataConfig, *, seed: int, stage: int) -> None:
        self._shards = shards
        self._configs = config.stages()
        self._seed = seed
        self._samples = {stage: self._plan(stage)}

    def __getitem__(self, request: MicroBatchRequest) -> Item:
        if request.stage not in self._samples:
            self._samples = {request.stage: self._plan(request.stage)}
        samples = self._samples[request.stage]
        batch: Batch | ConfigError
        try:
            batch = make_batch(samples, request.numbers)
        except ConfigError as error:
            batch = error
        return Item(batch, request.ends_step, samples.new_bad_records())

    def _plan(self, stage: int) -> Samples:
        return Samples(self._shards, self._configs[stage], seed=self._seed, stage=stage)


class DataWorkerError(RuntimeError):
    """A reader process of this rank has ended by itself, or delivers no data."""


class TrainingBatches(Iterator[list[Batch]]):
    """An iterator over the steps of one rank.

    Args:
        loader: gives the micro-batches in order.
        rank: number of this rank, for error messages.
    """

    def __init__(self, loader: DataLoader[Item], rank: int) -> None:
        # when a worker dies, PyTorch's signal handler would raise an error anywhere in the trainer. It also checks the
        # workers while it waits for one of them, so without the handler the error is raised where it is expected
        handler = signal.getsignal(signal.SIGCHLD)
        self._iterator: Iterator[Item] | None = iter(loader)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler)
        self._workers: Sequence[BaseProcess] = tuple(getattr(self._iterator, "_workers", ()))
        self._rank = rank
        self._bad_records: dict[str, None] = {}
        self._new_bad_records: list[str] = []
        # the workers ignore SIGTERM, so an interpreter that exits while they run would wait for ever
        atexit.register(_kill_if_alive, weakref.ref(self))

    def __next__(self) -> list[Batch]:
        """Return the micro-batches of the next step.

        Raises:
            ConfigError: more of the data is damaged than data.max_bad_records allows, or it cannot be read.
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
                self.kill_workers()  # the error keeps PyTorch's iterator alive, so it would not stop the others
                self.close()
                if not lost:
                    raise
                reason = (str(error) or "it was cut off").splitlines()[0].rstrip(".")
                raise DataWorkerError(
                    f"a reader process of rank {self._rank} ended ({reason}); if it was killed because memory ran out, "
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
        """Return the damaged records that this rank found since the last call, one line each."""
        found, self._new_bad_records = self._new_bad_records, []
        return found

    def close(self) -> None:
        """Stop the worker processes; further calls do nothing.

        A worker that is blocked by a disk or a network does not answer a request to stop; it is killed after
        STUCK_SECONDS.
        """
        killing = threading.Timer(STUCK_SECONDS, self.kill_workers)
        killing.daemon = True
        killing.start()
        self._iterator = None  # PyTorch's iterator stops its workers when the last reference to it is gone
        killing.cancel()

    def kill_workers(self) -> None:
        """Kill the worker processes at once; nothing is lost with them."""
        for worker in self._workers:
            worker.kill()

    def _worker_was_lost(self, error: Exception) -> bool:
        """Whether PyTorch raised `error` because a worker ended, not because a worker raised it itself.

        A worker that dies while its batch is received closes its sockets some time before its end can be seen; hence
        the wait of up to STUCK_SECONDS.
        """
        if str(error).startswith("Caught "):
            return False
        return bool(multiprocessing.connection.wait([worker.sentinel for worker in self._workers], STUCK_SECONDS))


def _kill_if_alive(reference: "weakref.ref[TrainingBatches]") -> None:
    batches = reference()
    if batches is not None:
        batches.kill_workers()


def prepare_worker(worker: int) -> None:
    """Let a worker collect garbage by itself, and ignore SIGTERM and SIGINT.

    The trainer it was forked from may have switched the collector off. A signal to the whole process group must not end
    the trainer's readers.
    """
    gc.enable()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _unchanged(item: Any) -> Any:
    return item

"""The training batches of one rank, step by step, read ahead by worker processes.

An error in the data is sent from a worker as an item at its place in the order. It reaches the trainer at the step
that it belongs to, so that all ranks can stop together.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from multiprocessing.connection import Connection
from typing import Any

from torch import Tensor

from colt5dist.data.config import DataConfig
from colt5dist.data.order.batch_layout import BatchLayout
from colt5dist.data.order.skip import SkipList
from colt5dist.data.read.batch import Batch, make_batch
from colt5dist.data.read.readers import Item, Readers, receive
from colt5dist.data.read.samples import Samples
from colt5dist.data.read.shards import ShardSet
from colt5dist.data.read.sources import Sources
from colt5dist.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Job:
    """Which micro-batches to make: the settings of `training_batches`, in a form that a reader process can be sent."""

    config: DataConfig
    seed: int
    global_batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int
    first_sample: int
    first_step: int


def start_readers(shards: ShardSet | Sources, config: DataConfig) -> Readers | None:
    """Start what `training_batches` needs to make reader processes; call it before a GPU is touched.

    Args:
        shards: the training set, or several.
        config: the data settings.

    Returns:
        The readers; None if data.num_workers is 0.
    """
    return Readers(partial(_items, shards)) if config.num_workers else None


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
    readers: Readers | None = None,
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
        readers: of `start_readers` with the same shards; those that work for it now are ended. None: they are started
            here, which a process that has used a GPU should avoid.

    Returns:
        An iterator over steps; each step is the list of this rank's micro-batches. Its `close` stops the workers.
    """
    share = global_batch_size // world_size
    sizes = [micro_batch_size] + [
        min(entry.micro_batch_size or micro_batch_size, share) for entry in config.length_schedule
    ]
    assert global_batch_size % world_size == 0 and 0 <= rank < world_size, (global_batch_size, rank, world_size)
    assert all(share % size == 0 for size in sizes), (share, sizes)
    job = Job(
        config=config,
        seed=seed,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        rank=rank,
        world_size=world_size,
        first_sample=first_sample,
        first_step=first_step,
    )
    if not config.num_workers:
        return TrainingBatches(_items(shards, job), rank, pin_memory=pin_memory)
    owned = readers is None
    readers = readers or Readers(partial(_items, shards))
    try:
        pipes = readers.start(job, config.num_workers)
    except BaseException as error:
        if owned:
            readers.close()
        if isinstance(error, (EOFError, OSError)):
            raise DataWorkerError(f"the process that starts the readers of rank {rank} was killed") from error
        raise
    return TrainingBatches(pipes, rank, pin_memory=pin_memory, readers=readers, owns_readers=owned)


def _items(shards: ShardSet | Sources, job: Job) -> Iterator[Callable[[], Item]]:
    """The micro-batches of a job, in order and without end: what each call makes is the item of that number."""
    share = job.global_batch_size // job.world_size
    schedule = job.config.length_schedule
    sizes = [job.micro_batch_size, *(min(entry.micro_batch_size or job.micro_batch_size, share) for entry in schedule)]
    first_steps = [1, *(entry.step for entry in schedule)]
    sampler = RankSampler(
        SkipList(job.config.skip),
        first_sample=job.first_sample,
        first_step=job.first_step,
        stages=list(zip(first_steps, sizes, strict=True)),
        rank=job.rank,
        world_size=job.world_size,
        global_batch_size=job.global_batch_size,
    )
    made = MicroBatches(shards, job.config, seed=job.seed, stage=sampler.stage_at(job.first_step))
    return (partial(made.make, request) for request in sampler)


@dataclass(frozen=True)
class MicroBatchRequest:
    """What a worker process is asked to make."""

    stage: int
    """Stage of the length schedule: 0 before its first entry, 1 from the first entry on, ..."""
    numbers: list[int]
    """Sample numbers of one micro-batch."""
    ends_step: bool
    """Whether it is the rank's last micro-batch of a step."""


class RankSampler:
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


class MicroBatches:
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

    def make(self, request: MicroBatchRequest) -> Item:
        """Make a micro-batch."""
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
        source: the items in order, each made by a call; or the pipe of each reader process, which take turns.
        rank: number of this rank, for error messages.
        pin_memory: put the tensors in page-locked memory (needs a GPU).
        readers: the reader processes, if there are any.
        owns_readers: whether `close` also ends what starts them.
    """

    def __init__(
        self,
        source: Iterator[Callable[[], Item]] | list[Connection],
        rank: int,
        *,
        pin_memory: bool = False,
        readers: Readers | None = None,
        owns_readers: bool = False,
    ) -> None:
        self._source: Iterator[Callable[[], Item]] | None = source if not isinstance(source, list) else None
        if isinstance(source, list):
            self._source = (partial(receive, pipe, pin_memory=pin_memory) for _ in count() for pipe in source)
        self._pins_here = pin_memory and not isinstance(source, list)
        self._rank = rank
        self._readers = readers
        self._owns_readers = owns_readers
        self._bad_records: dict[str, None] = {}
        self._new_bad_records: list[str] = []

    def __next__(self) -> list[Batch]:
        """Return the micro-batches of the next step.

        Raises:
            ConfigError: more of the data is damaged than data.max_bad_records allows, or it cannot be read.
            DataWorkerError: a reader process was killed.
        """
        if self._source is None:
            raise StopIteration
        step: list[Batch] = []
        while True:
            try:
                item = next(self._source)()
            except (EOFError, OSError) as error:
                self.close()
                if self._readers is None:
                    raise
                reason = (str(error) or "it was cut off").splitlines()[0].rstrip(".")
                raise DataWorkerError(
                    f"a reader process of rank {self._rank} ended ({reason}); if it was killed because memory ran out, "
                    "lower data.num_workers"
                ) from error
            except BaseException:
                self.close()
                raise
            new = [record for record in item.bad_records if record not in self._bad_records]
            self._bad_records.update(dict.fromkeys(new))
            self._new_bad_records += new
            if isinstance(item.batch, ConfigError):
                self.close()
                raise item.batch
            step.append(_pinned(item.batch) if self._pins_here else item.batch)
            if item.ends_step:
                return step

    def new_bad_records(self) -> list[str]:
        """Return the damaged records that this rank found since the last call, one line each."""
        found, self._new_bad_records = self._new_bad_records, []
        return found

    def close(self) -> None:
        """Stop the reader processes, also one that is blocked by a disk or a network; further calls do nothing."""
        if self._source is None:
            return
        self._source = None
        self.kill_workers()
        if self._readers and self._owns_readers:
            self._readers.close()

    def kill_workers(self) -> None:
        """Kill the reader processes at once; nothing is lost with them."""
        if self._readers:
            self._readers.kill()


def _pinned(batch: Batch) -> Batch:
    tensors: dict[str, Tensor] = dict(batch)  # type: ignore[arg-type]
    pinned: Any = {name: tensor.pin_memory() for name, tensor in tensors.items()}
    return pinned

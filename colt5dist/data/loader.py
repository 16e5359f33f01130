"""The training samples of one rank, step by step, read ahead by worker processes."""

import atexit
import signal
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from colt5dist.data.batch import Batch, make_batch
from colt5dist.data.config import DataConfig
from colt5dist.data.samples import Samples
from colt5dist.data.shards import ShardSet
from colt5dist.errors import ConfigError


def training_batches(
    shards: ShardSet,
    config: DataConfig,
    *,
    seed: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    first_sample: int,
    pin_memory: bool = False,
) -> "TrainingBatches":
    """The micro-batches of one rank, without end.

    The samples of the run are numbered from 0; each global batch takes the next global_batch_size of them. Rank r of W
    gets samples r, r + W, ... of it, in order, cut into micro-batches.

    Args:
        shards: the training set.
        config: lengths, mixture, workers.
        seed: seed of the order and of the masks.
        global_batch_size: samples of a step; a multiple of micro_batch_size * world_size.
        micro_batch_size: samples of a micro-batch.
        rank: number of this rank.
        world_size: number of ranks.
        first_sample: samples of the run that earlier steps have used up.
        pin_memory: put the tensors in page-locked memory (needs a GPU).

    Returns:
        An iterator over steps; each is the list of this rank's micro-batches. Its `close` stops the worker processes.
    """
    assert global_batch_size % (micro_batch_size * world_size) == 0, (global_batch_size, micro_batch_size, world_size)
    sampler = RankSampler(first_sample + rank, world_size, micro_batch_size, global_batch_size)
    workers: dict[str, Any] = {}
    if config.num_workers:
        # fork: the mapped index is shared, and nothing has to be pickled
        workers = {"multiprocessing_context": "fork", "worker_init_fn": ignore_stop_signals, "prefetch_factor": 4}
    loader = DataLoader(
        MicroBatches(Samples(shards, config, seed=seed)),
        batch_size=None,
        sampler=sampler,
        num_workers=config.num_workers,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        # of its own, so that the trainer's random state is left alone
        generator=torch.Generator(),
        **workers,
    )
    return TrainingBatches(loader, global_batch_size // (micro_batch_size * world_size))


class RankSampler(Sampler[list[int]]):
    """Yields the sample numbers of one rank's micro-batches, without end."""

    def __init__(self, first: int, stride: int, micro_batch_size: int, global_batch_size: int) -> None:
        """Begin at sample `first` and take every stride-th."""
        assert global_batch_size % (stride * micro_batch_size) == 0
        self._first = first
        self._stride = stride
        self._micro_batch_size = micro_batch_size

    def __iter__(self) -> Iterator[list[int]]:
        # as the stride divides the global batch, it goes on over the end of a step
        first, length = self._first, self._stride * self._micro_batch_size
        while True:
            yield list(range(first, first + length, self._stride))
            first += length


Item = Batch | ConfigError


class MicroBatches(Dataset[Item]):
    """Micro-batches by their sample numbers; an error is an item, so that it crosses from a worker as it is."""

    def __init__(self, samples: Samples) -> None:
        """Make batches of `samples`."""
        self._samples = samples

    def __getitem__(self, numbers: list[int]) -> Item:
        try:
            return make_batch(self._samples, numbers)
        except ConfigError as error:
            return error


class TrainingBatches(Iterator[list[Batch]]):
    """An iterator over the steps of one rank."""

    def __init__(self, loader: DataLoader[Item], micro_batches: int) -> None:
        """Take `micro_batches` items of `loader` a step."""
        self._iterator: Iterator[Item] | None = iter(loader)
        self._micro_batches = micro_batches
        # the workers ignore SIGTERM, so an interpreter that ends with them alive would wait for ever
        atexit.register(_close_if_alive, weakref.ref(self))

    def __next__(self) -> list[Batch]:
        if self._iterator is None:
            raise StopIteration
        step = []
        for _ in range(self._micro_batches):
            item = next(self._iterator)
            if isinstance(item, ConfigError):
                self.close()
                raise item
            step.append(item)
        return step

    def close(self) -> None:
        """Stop the worker processes; further calls do nothing."""
        self._iterator = None


def _close_if_alive(reference: "weakref.ref[TrainingBatches]") -> None:
    batches = reference()
    if batches is not None:
        batches.close()


def ignore_stop_signals(worker: int) -> None:
    """Let the trainer decide when its readers end: a signal to the whole group must not kill them under it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _unchanged(item: Any) -> Any:
    return item

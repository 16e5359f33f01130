"""Forward, loss and backward of a micro-batch as one CUDA graph: one launch, however slow the host is.

A graph is captured for each form of micro-batch: its shapes, and whether any input is padded. All share one memory
pool, because one runs after the other. Padding costs attention a little more work, so rows are arranged such that as
few micro-batches as possible have any.
"""

import gc
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, cast

import torch

from colt5dist.data.read.batch import Batch
from colt5dist.model.colt5 import CoLT5Output

Pass = Callable[[Batch, torch.Tensor], CoLT5Output]


@dataclass(frozen=True)
class Captured:
    """What is replayed, and the memory that it reads and writes."""

    replay: Callable[[], None]
    batch: Batch
    output: CoLT5Output


class MicroBatchGraphs:
    """Captures and replays forward and backward passes, on the current stream, which must not be the default one.

    Args:
        run: forward and backward of a micro-batch on the device, given the global batch's number of targets; adds the
            gradients to memory that stays where it is.
        device: the GPU.
    """

    def __init__(self, run: Pass, device: torch.device) -> None:
        self._run = run
        self.device = device
        self._num_targets = torch.ones((), device=device)
        self._forms: dict[Hashable, Captured] = {}
        self._pool: Any = None

    def add(self, batch: Batch, num_targets: torch.Tensor) -> None:
        """Capture the passes over micro-batches of this form, which have run before, so that nothing is left to load.

        The gradients of the capture go nowhere: nothing runs in it.
        """
        static = to_device(batch, self.device)
        self._num_targets.copy_(num_targets)
        replay, output = self._capture(without_needless_mask(static, batch))
        self._forms[form_of(batch)] = Captured(replay, static, output)

    def run(self, batch: Batch, num_targets: torch.Tensor) -> tuple[Batch, CoLT5Output]:
        """Run a micro-batch that is on the host.

        Returns:
            The micro-batch on the device, and the output: memory that the next call overwrites.
        """
        captured = self._forms[form_of(batch)]
        inputs = cast(dict[str, torch.Tensor], captured.batch)
        for name, tensor in cast(dict[str, torch.Tensor], batch).items():
            inputs[name].copy_(tensor, non_blocking=True)
        self._num_targets.copy_(num_targets)
        captured.replay()
        return captured.batch, captured.output

    def _capture(self, batch: Batch) -> tuple[Callable[[], None], CoLT5Output]:
        """Record the passes; returns what repeats them, and the output that it writes."""
        torch.cuda.synchronize(self.device)
        gc.collect()
        torch.cuda.empty_cache()  # what earlier passes left would be kept beside the graph's own memory
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream(self.device)
        # thread_local: the thread that reads ahead may page-lock memory meanwhile
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            output = self._run(batch, self._num_targets)
        self._pool = graph.pool()
        return graph.replay, output


def form_of(batch: Batch) -> Hashable:
    """What a graph is made for: shapes, and whether any input is padded."""
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in cast(dict[str, torch.Tensor], batch).items())
    return is_padded(batch), shapes


def is_padded(batch: Batch) -> bool:
    """Whether any input of a micro-batch on the host has padding."""
    return not bool(batch["input_mask"].all())


def with_other_padding(batch: Batch) -> Batch:
    """A micro-batch of the same shapes whose inputs have padding if those of this one have none, and the reverse."""
    mask = torch.ones_like(batch["input_mask"])
    mask[:, -1] = is_padded(batch)
    return Batch(**{**batch, "input_mask": mask})  # type: ignore[typeddict-item]


def without_needless_mask(on_device: Batch, batch: Batch) -> Batch:
    """The micro-batch on the device, without its input mask where the same micro-batch on the host has no padding."""
    return on_device if is_padded(batch) else cast(Batch, {**on_device, "input_mask": None})


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch to the device, without waiting where its memory is page-locked."""
    tensors = cast(dict[str, torch.Tensor], batch)
    return cast(Batch, {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


def arrange(micro_batches: list[Batch]) -> list[Batch]:
    """The same rows, those without padding first, so that as many micro-batches as possible need no mask.

    Which rows share a micro-batch changes neither the loss nor the gradient of the global batch, but for rounding.
    """
    if len(micro_batches) == 1:
        return micro_batches
    padded = [(~batch["input_mask"]).any(dim=1) for batch in micro_batches]
    size = len(padded[0])
    num_padded = sum(int(rows.sum()) for rows in padded)
    if sum(bool(rows.any()) for rows in padded) <= -(-num_padded // size):
        return micro_batches
    order = torch.cat(padded).to(torch.int8).argsort(stable=True)
    arranged: dict[str, tuple[torch.Tensor, ...]] = {}
    for name, first in cast(dict[str, torch.Tensor], micro_batches[0]).items():
        rows = torch.cat([cast(dict[str, torch.Tensor], batch)[name] for batch in micro_batches])
        out = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=first.is_pinned())
        arranged[name] = torch.index_select(rows, 0, order, out=out).split(size)
    return [cast(Batch, dict(zip(arranged, parts, strict=True))) for parts in zip(*arranged.values(), strict=True)]

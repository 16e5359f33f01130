"""Forward, loss and backward of a micro-batch as one CUDA graph: a launch, whatever the host does.

A graph is captured for each form of micro-batch that comes: its shapes, and whether any input is padded. All share one
memory pool, for one runs after the other. Padding needs masks, and with a mask PyTorch's attention kernels take half
as long again; so rows are arranged such that as few micro-batches as possible have any.
"""

import gc
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, cast

import torch

from colt5dist.data.read.batch import Batch
from colt5dist.model.colt5 import CoLT5Output

WARM_UP_RUNS = 2
"""Runs before the capture, which compile, choose kernels and make the workspaces that they need."""

Pass = Callable[[Batch, torch.Tensor], CoLT5Output]


@dataclass(frozen=True)
class _Captured:
    """A graph and the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    batch: Batch
    output: CoLT5Output


class MicroBatchGraphs:
    """Captures and replays forward and backward passes, on the current stream, which is not the default one.

    Args:
        run: forward and backward of a micro-batch on the device, given the global batch's number of targets; adds the
            gradients to memory that stays where it is.
        warm_up: the same, whose gradients go nowhere.
        say: takes a line for the log about each graph.
    """

    def __init__(self, run: Pass, warm_up: Pass, say: Callable[[str], None]) -> None:
        self._run, self._warm_up, self._say = run, warm_up, say
        self._stream = torch.cuda.current_stream()
        self.device = device = self._stream.device
        self._num_targets = torch.ones((), device=device)
        self._graphs: dict[Hashable, _Captured] = {}
        self._pool: Any = None

    def __call__(self, batch: Batch, num_targets: torch.Tensor) -> tuple[Batch, CoLT5Output]:
        """Run a micro-batch that is on the host; returns it on the device, and the output: the next call's memory."""
        padded = bool((~batch["input_mask"]).any())
        tensors = cast(dict[str, torch.Tensor], batch)
        key = padded, tuple((name, tuple(tensor.shape)) for name, tensor in tensors.items())
        captured = self._graphs.get(key)
        if captured is None:
            begin = time.monotonic()
            captured = self._graphs[key] = self._capture(tensors, padded, num_targets)
            size, n = batch["input_ids"].shape
            form = f"{size} x {n} inputs {'with' if padded else 'without'} padding"
            seconds = time.monotonic() - begin
            self._say(f"compile: forward and backward of {form} in one CUDA graph, made in {seconds:.1f} s")
        inputs = cast(dict[str, torch.Tensor], captured.batch)
        for name, tensor in tensors.items():
            inputs[name].copy_(tensor, non_blocking=True)
        self._num_targets.copy_(num_targets)
        captured.graph.replay()
        return captured.batch, captured.output

    def _capture(self, tensors: dict[str, torch.Tensor], padded: bool, num_targets: torch.Tensor) -> _Captured:
        """Record the passes over a micro-batch of this form."""
        batch = cast(Batch, {name: tensor.to(self.device) for name, tensor in tensors.items()})
        given = batch if padded else cast(Batch, {**batch, "input_mask": None})
        self._num_targets.copy_(num_targets)
        for _ in range(WARM_UP_RUNS):
            self._warm_up(given, self._num_targets)
        torch.cuda.synchronize(self.device)
        gc.collect()
        torch.cuda.empty_cache()  # what the warm-up left would be kept beside the graph's own memory
        graph = torch.cuda.CUDAGraph()
        # thread_local: the thread that reads ahead may page-lock memory meanwhile
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            output = self._run(given, self._num_targets)
        self._pool = graph.pool()
        return _Captured(graph, batch, output)


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

"""Time and tokens of the steps since the last logged step, and the slowest rank."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from colt5dist.train.losses import LossMeans
from colt5dist.train.ranks import gather_rows
from colt5dist.train.report.accounting import peak_flops, peak_memory_bytes
from colt5dist.train.report.monitor import Record


class Meter:
    """Measures time and tokens per step; `read` returns the means and starts a new interval.

    Args:
        device: device of this rank.
        hosts: host name of every rank.
        step_flops: floating-point operations of an optimizer step, over all devices.

    Attributes:
        slowest: after a read, text that names the slowest rank; empty with one rank.
    """

    def __init__(self, device: torch.device, hosts: list[str], step_flops: int) -> None:
        self.device = device
        self.hosts = hosts
        self.step_flops = step_flops
        self.peak_flops = peak_flops(device)
        self.slowest = ""
        self.total_tokens = 0
        self.total_seconds = 0.0
        self._start()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Measure a whole step, including the optimizer's."""
        begin = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - begin
        self._steps += 1

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Measure the wait for a step's samples."""
        begin = time.perf_counter()
        yield
        self._data_wait += time.perf_counter() - begin

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Measure a forward pass, or a CUDA graph: work that waits for no other rank, which so tells the slow one."""
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._forward_events.append((begin, end))
        else:
            start = time.perf_counter()
            yield
            self._forward += time.perf_counter() - start

    def count(self, means: LossMeans) -> None:
        """Add a step's tokens; call it after the step's host read, when its passes have finished on the device.

        Args:
            means: losses and tokens of the global batch.
        """
        self._tokens += means.input_tokens + means.target_tokens
        self._forward += sum(begin.elapsed_time(end) / 1000 for begin, end in self._forward_events)
        self._forward_events.clear()

    def read(self) -> Record:
        """Return the means per step since the last read, and start a new interval; collective.

        Returns:
            Speed, times, MFU and memory under their names in metrics.jsonl.
        """
        steps = max(self._steps, 1)
        row = [self._seconds / steps, self._data_wait / steps, self._forward / steps, peak_memory_bytes(self.device)]
        rows = gather_rows([float(value) for value in row], self.device)
        seconds = max(r[0] for r in rows)
        rate = self._tokens / self._seconds if self._seconds else 0.0
        self.total_tokens += self._tokens
        self.total_seconds += self._seconds
        self.slowest = self._describe(rows)
        mfu = None
        if self.peak_flops and seconds:
            mfu = self.step_flops / seconds / (self.peak_flops * len(rows))
        self._start()
        return {
            "tokens_per_second": rate,
            "step_seconds": seconds,
            "data_wait_seconds": max(r[1] for r in rows),
            "mfu": mfu,
            "peak_memory_bytes": int(max(r[3] for r in rows)),
        }

    @property
    def seconds(self) -> float:
        """Seconds of all steps since the last read, on this rank."""
        return self._seconds

    @property
    def mean_rate(self) -> float | None:
        """Valid input and target tokens per second over all steps that were read; None before the first read."""
        return self.total_tokens / self.total_seconds if self.total_seconds else None

    def _describe(self, rows: list[list[float]]) -> str:
        """Step time by host, and the rank whose data and computation take longest."""
        if len(rows) == 1:
            return ""
        by_host: dict[str, list[float]] = {}
        for host, r in zip(self.hosts, rows, strict=True):
            by_host.setdefault(host, []).append(r[0])
        times = ", ".join(f"{host} {max(seconds):.3f} s" for host, seconds in by_host.items())
        busy = [r[1] + r[2] for r in rows]
        rank = max(range(len(busy)), key=busy.__getitem__)
        return (
            f"{times}; slowest rank {rank} on {self.hosts[rank]}: data and forward {busy[rank]:.3f} s, "
            f"median {statistics.median(busy):.3f}"
        )

    def _start(self) -> None:
        self._seconds = 0.0
        self._steps = 0
        self._data_wait = 0.0
        self._forward = 0.0
        self._tokens = 0
        self._forward_events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

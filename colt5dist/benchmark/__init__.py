"""The measured tables, a module each with a `main(arguments)`: what `launch/benchmark.py NAME` runs.

Here is what they share: how a call is timed, how far its numbers may be off, and how a table is reported.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

MAX_ERROR = 0.02
"""Relative error of a bf16 result beyond which it is called wrong, and no time is reported."""
SLEEP_CYCLES = 50_000_000
"""A pause of the GPU, some 25 ms, in which the host queues the calls that are then timed without waiting for it."""


@dataclass(frozen=True)
class Row:
    """One line of a table: what ran on which shape, its relative error, and the medians in milliseconds, None where
    the error is too large."""

    name: str
    shape: str
    error: float
    wall_ms: float | None
    gpu_ms: float | None

    @property
    def times(self) -> tuple[float | None, float | None]:
        """Both medians."""
        return self.wall_ms, self.gpu_ms


def measure(name: str, shape: str, call: Callable[[], Sequence[Tensor]], error: float, repeats: int) -> Row:
    """Time `call`, unless its relative error is too large."""
    if not error <= MAX_ERROR:
        return Row(name, shape, error, None, None)
    on_gpu = call()[0].is_cuda
    wall = median_milliseconds(call, repeats, queued=1, on_gpu=on_gpu)
    return Row(name, shape, error, wall, median_milliseconds(call, repeats, queued=4, on_gpu=True) if on_gpu else None)


def median_milliseconds(call: Callable[[], object], repeats: int, *, queued: int, on_gpu: bool) -> float:
    """Median time of one call, by CUDA events on a GPU.

    queued 1: from an idle device, so that the host's own time counts. More: that many calls are queued behind a pause
    of the device, and it is its work alone that is measured.
    """
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        if not on_gpu:
            begin = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - begin))
            continue
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if queued > 1:
            torch.cuda._sleep(SLEEP_CYCLES)
        first.record()
        for _ in range(queued):
            call()
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last) / queued)
    return statistics.median(times)


def relative_error(actual: Sequence[Tensor], expected: Sequence[Tensor], share: float = 0.98) -> float:
    """The largest over the tensors (..., dim) of |actual - expected| / |expected| in the row than which that share of
    the rows is not worse; infinite where a number is not finite.

    Not of the worst row: where 16-bit rounding lets a routing decision fall the other way, a token differs in earnest.
    A wrong branch shows, though it be one of a sixteenth of the tokens.
    """
    worst = 0.0
    for here, there in zip(actual, expected, strict=True):
        wanted = there.double().flatten(0, -2)
        errors = (here.double().flatten(0, -2) - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1e-12)
        error = errors.sort().values[int(share * (len(errors) - 1))].item()
        worst = max(worst, error if errors.isfinite().all() else float("inf"))
    return worst


def device_line() -> str:
    """The device and the versions, as a figure has to name them."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    return f"{device}, torch {torch.__version__}, Triton {triton_version}, {time.strftime('%Y-%m-%d')}"


def report(title: str, measurements: Iterable[Row], output: Path | None) -> int:
    """Print the table, each line when it is measured, and write it to the folder `output` as JSON and a plot; 1 if a
    result was wrong, else 0."""
    print(f"{title}\n{device_line()}\n")
    print(f"{'':40} {'shape':>14} {'ms (wall)':>10} {'ms (GPU)':>10} {'error':>9}", flush=True)
    rows = []
    for row in measurements:
        times = [f"{'wrong' if row.wall_ms is None else '-' if ms is None else f'{ms:.3f}':>10}" for ms in row.times]
        print(f"{row.name:40} {row.shape:>14} {' '.join(times)} {row.error:>9.1e}", flush=True)
        rows.append(row)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        contents = {"title": title, "device": device_line(), "rows": [asdict(row) for row in rows]}
        (output / "results.json").write_text(json.dumps(contents, indent=1), encoding="utf-8")
        measured = [row for row in rows if row.wall_ms is not None]
        bars = [(row.wall_ms if row.gpu_ms is None else row.gpu_ms) or 0.0 for row in measured]
        plot_bars(title, [f"{row.name}, {row.shape}" for row in measured], bars, "ms", output / "results.png")
    return int(any(row.wall_ms is None for row in rows))


def plot_bars(title: str, names: Sequence[str], values: Sequence[float], unit: str, path: Path) -> None:
    """Write a bar for each value to `path`; without matplotlib, say that there is no plot."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed; pip install 'colt5dist[bench]'")
        return
    figure = Figure(figsize=(8, 1 + 0.4 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    axes.bar_label(axes.barh(list(names), list(values)), fmt="%.2f", padding=3)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.set_title(f"{title}\n{device_line()}", fontsize=9)
    figure.savefig(path, dpi=150)

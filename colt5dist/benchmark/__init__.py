"""The benchmarks that `launch/benchmark.py NAME` runs: one module each, with a function `main(arguments)`.

This file holds what they share: how a call is timed, how large its error may be, how a table is printed, and which
differences are beyond the noise of random seeds. The first line of a module's docstring is its line in
`launch/benchmark.py --help`.
"""

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from colt5dist.errors import ConfigError

MAX_ERROR = 0.02
"""Largest relative error of a bf16 result. A result with a larger error is called wrong, and no time is reported."""
SLEEP_CYCLES = 50_000_000
"""Clock cycles of a pause of the GPU, about 25 ms, in which the host queues the calls that are then timed."""


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    name: str
    """What ran."""
    shape: str
    """Shape of its input."""
    error: float
    """Relative error of its result."""
    wall_ms: float | None
    """Median wall-clock time in milliseconds; None where the error is too large."""
    gpu_ms: float | None
    """Median GPU time in milliseconds; None where the error is too large, or on a CPU."""

    @property
    def times(self) -> tuple[float | None, float | None]:
        """Both medians."""
        return self.wall_ms, self.gpu_ms


def require_gpu(benchmark: str) -> None:
    """Check that Triton kernels can run: on a GPU, or in Triton's interpreter for a trial.

    Args:
        benchmark: name of the benchmark, for the message.

    Raises:
        ConfigError: there is no GPU, and TRITON_INTERPRET=1 is not set.
    """
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            f"benchmark {benchmark}: needs a GPU, and PyTorch finds none; run it on a machine with a GPU (for a slow "
            "trial on small shapes without one, set TRITON_INTERPRET=1)"
        )


def measure(name: str, shape: str, call: Callable[[], Sequence[Tensor]], error: float, repeats: int) -> Row:
    """Time a call, unless its relative error is too large.

    Args:
        name: what runs.
        shape: shape of its input, for the table.
        call: what is timed.
        error: relative error of its result.
        repeats: number of measurements, of which the median is taken.
    """
    if not error <= MAX_ERROR:
        return Row(name, shape, error, None, None)
    on_gpu = call()[0].is_cuda
    wall = median_milliseconds(call, repeats, queued=1, on_gpu=on_gpu)
    return Row(name, shape, error, wall, median_milliseconds(call, repeats, queued=4, on_gpu=True) if on_gpu else None)


def median_milliseconds(call: Callable[[], object], repeats: int, *, queued: int, on_gpu: bool) -> float:
    """Return the median time of one call in milliseconds, by CUDA events on a GPU.

    Args:
        call: what is timed.
        repeats: number of measurements.
        queued: 1 starts from an idle GPU, so that the host's own time counts. More: that many calls are queued while
            the GPU pauses, so that only the GPU's work is measured.
        on_gpu: whether the call runs on a GPU.
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
    """Return the relative error |actual - expected| / |expected| of the rows, as a quantile over the rows.

    The worst rows are left out on purpose: where 16-bit rounding reverses a routing decision, a token's result really
    differs. An error in a whole branch still shows, even if the branch processes only a sixteenth of the tokens.

    Args:
        actual: tensors (..., dim) to check; a row is the last dimension.
        expected: tensors of the same shapes.
        share: the quantile: this share of the rows has at most the returned error.

    Returns:
        The largest of the quantiles of all tensors; infinite where a number is not finite.
    """
    worst = 0.0
    for here, there in zip(actual, expected, strict=True):
        wanted = there.double().flatten(0, -2)
        errors = (here.double().flatten(0, -2) - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1e-12)
        error = errors.sort().values[int(share * (len(errors) - 1))].item()
        worst = max(worst, error if errors.isfinite().all() else float("inf"))
    return worst


def device_line() -> str:
    """Return the device, the versions and the date, which every published figure names."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    return f"{device}, torch {torch.__version__}, Triton {triton_version}, {time.strftime('%Y-%m-%d')}"


def report(title: str, measurements: Iterable[Row], output: Path | None) -> int:
    """Print a table, each line as soon as it is measured, and write it to a folder.

    Args:
        title: what was measured.
        measurements: the lines.
        output: folder for results.json and results.png; None writes nothing.

    Returns:
        The exit status: 1 if a result was wrong, else 0.
    """
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
    """Draw one bar per value to the PNG file `path`."""
    from matplotlib.figure import Figure  # imported here: it takes most of a second

    figure = Figure(figsize=(8, 1 + 0.4 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    axes.bar_label(axes.barh(list(names), list(values)), fmt="%.2f", padding=3)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.set_title(f"{title}\n{device_line()}", fontsize=9)
    figure.savefig(path, dpi=150)


class Interval(NamedTuple):
    """Mean of some values, and half the width of its 95 % interval (None for a single value)."""

    mean: float
    half: float | None

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + (f" ± {self.half:.4f}" if self.half is not None else "")


def t_quantile(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t distribution with 1 or more degrees of freedom."""
    low, high = 0.0, 20.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if _share_within(middle, freedom) < 0.95 else (low, middle)
    return high


def _share_within(t: float, freedom: int) -> float:
    """Probability of a value in [-t, t], by the finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for number in range(1 + odd, freedom, 2):
        total += term
        term *= math.cos(angle) ** 2 * number / (number + 1)
    total *= math.sin(angle)
    return (angle + total) * 2 / math.pi if odd else total


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of one or more values with its 95 % t interval."""
    if len(values) < 2:
        return Interval(values[0], None)
    half = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(statistics.fmean(values), half)


def verdict(difference: Interval) -> str:
    """Say whether a first variant is below a second one beyond seed noise, by the interval of the differences."""
    if difference.half is None:
        return "one seed: no interval"
    if abs(difference.mean) <= difference.half:
        return "not told apart"
    return "below" if difference.mean < 0 else "above"


Points = dict[int, float]
"""Held-out loss in nats per token by step."""


def loss_at(points: Points, step: float) -> float | None:
    """Return the loss at a step between evaluations, linear in log(step); None outside of the evaluations."""
    before = max((s for s in points if s <= step), default=None)
    after = min((s for s in points if s >= step), default=None)
    if before is None or after is None:
        return None
    if before == after:
        return points[before]
    share = math.log(step / before) / math.log(after / before)
    return points[before] + share * (points[after] - points[before])


def compare(
    first: Mapping[int, Points], second: Mapping[int, Points], seconds: tuple[float | None, float | None]
) -> dict[str, Any] | None:
    """Compare two variants, seed by seed.

    Args:
        first: held-out losses of the first variant by seed.
        second: the same of the second.
        seconds: seconds of a step of both, where they were measured.

    Returns:
        `step`, the last that both have evaluated with some seed, and the `seeds` that have it; `equal_steps` and
        `equal_time`: mean and half of the difference first - second, and the verdict; `gpu_seconds` of equal_time, the
        longest time that both trained with all of these seeds. None if no seed has a step in common.
    """
    common = {seed: first[seed].keys() & second[seed].keys() for seed in first.keys() & second.keys()}
    step = max((step for steps in common.values() for step in steps), default=None)
    if step is None:
        return None
    seeds = sorted(seed for seed, steps in common.items() if step in steps)

    def of(differences: list[float]) -> dict[str, Any]:
        difference = interval(differences)
        return {**difference._asdict(), "verdict": verdict(difference)}

    result: dict[str, Any] = {"step": step, "seeds": seeds, "equal_time": None, "gpu_seconds": None}
    result["equal_steps"] = of([first[seed][step] - second[seed][step] for seed in seeds])
    measured = [own for own in seconds if own is not None]
    if len(measured) == 2:
        last = [min(max(of_variant[seed]) for seed in seeds) for of_variant in (first, second)]
        time_of = [steps * own for steps, own in zip(last, measured, strict=True)]
        # the one that sets the time ends exactly at its last step: rounded, that might lie behind the last evaluation
        steps = [own if t == min(time_of) else own * (min(time_of) / t) for own, t in zip(last, time_of, strict=True)]
        pairs = [(loss_at(first[seed], steps[0]), loss_at(second[seed], steps[1])) for seed in seeds]
        known = [a - b for a, b in pairs if a is not None and b is not None]
        if len(known) == len(seeds):
            result |= {"equal_time": of(known), "gpu_seconds": min(time_of)}
    return result

"""Time of soft top-k: our Triton kernels, the published form, torch.compile and colt5-attention.

Forward and backward are measured. GPU time is that of a CUDA graph of both; for the other implementations, which cannot
all be captured in a graph, it is that of calls queued while the GPU pauses. `eager` is the time of a call without a
graph, and `host` the part of it that the host spends. Both run the backward in the calling thread, so that they do not
include waking autograd's own thread. Errors are those of the result and of the gradient of the scores, relative to
float64: ||difference|| / ||float64 result||. An implementation whose error is above the tolerance gets no time.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from colt5dist.benchmark import device_line, median_milliseconds, plot_bars
from colt5dist.ops.soft_topk import soft_topk
from colt5dist.ops.soft_topk.schedule import epsilon_schedule

SHAPES = ((16, 16_384), (16, 65_536), (1, 1_048_576))
EPS, EPS_INIT, EPS_DECAY = 0.03, 4.0, 0.7
FORWARD_TOLERANCE = 2e-6
BACKWARD_TOLERANCE = 2e-5
OTHERS_TOLERANCE = 1e-3
"""Of colt5-attention and the published form, which round n values per row in every iteration."""

Weights = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Times are medians in microseconds; None where an error is too large or there is no GPU.
    """

    name: str
    """Implementation."""
    shape: str
    """Rows and scores per row."""
    forward_us: float | None
    """GPU time of the forward."""
    gpu_us: float | None
    """GPU time of forward and backward."""
    eager_us: float | None
    """Wall-clock time of forward and backward without a CUDA graph."""
    host_us: float | None
    """The part of eager_us that the host spends."""
    forward_error: float
    """Relative error of the result."""
    backward_error: float
    """Relative error of the gradient of the scores."""
    saved_bytes: int | None
    """Bytes saved for the backward, besides the scores."""


def main(arguments: list[str]) -> int:
    """Run the benchmark and return the exit status, 1 if a result of our implementations is wrong."""
    parser = argparse.ArgumentParser(prog="benchmark.py soft_topk", description=__doc__)
    parser.add_argument("--shape", type=_shape, action="append", help="ROWSxN, may be repeated", metavar="ROWSxN")
    parser.add_argument("--n-iters", type=int, default=20, help="iterations of coordinate descent")
    parser.add_argument("--std", type=float, default=1.0, help="standard deviation of the scores")
    parser.add_argument("--only-ours", action="store_true", help="leave out colt5-attention and the other forms")
    parser.add_argument("--repeats", type=int, default=30, help="measurements, of which the median is taken")
    parser.add_argument("--output", type=Path, help="folder for the figures as JSON and as a plot")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    title = f"Soft top-k, T = {options.n_iters}, eps 4 * 0.7^t down to 0.03, k = 9/64 n, scores N(0, {options.std:g}^2)"
    _print_head(title)
    rows = []
    for shape in options.shape or SHAPES:
        for row in _measure_shape(shape, options, device):
            _print_row(row)
            rows.append(row)
    if options.output is not None:
        _write(rows, title, options.output)
    return int(any(row.eager_us is None for row in rows if row.name.startswith("ours")))


def _shape(text: str) -> tuple[int, int]:
    rows, n = text.split("x")
    return int(rows), int(n)


def _measure_shape(shape: tuple[int, int], options: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Yield the line of each implementation on one input of `shape` (rows, scores per row)."""
    torch.manual_seed(0)
    scores, upstream = torch.randn(shape, device=device) * options.std, torch.randn(shape, device=device)
    n_iters, repeats = options.n_iters, options.repeats
    k = shape[1] / 8 * 9 / 8
    descent = partial(soft_topk, k=k, n_iters=n_iters, eps=EPS, eps_init=EPS_INIT, eps_decay=EPS_DECAY)
    exact = partial(soft_topk, k=k, eps=EPS, solver="newton")
    fast = "triton" if device.type == "cuda" else "scalar"
    wide = {form: _gradients(partial(form, implementation="scalar"), scores, upstream) for form in (descent, exact)}
    ours = {
        f"ours, {fast}": (partial(descent, implementation=fast), descent),
        f"ours, {fast}, 4 segments": (
            partial(descent, implementation=fast, checkpoint_segments=min(4, n_iters)),
            descent,
        ),
        f"ours, newton, {fast}": (partial(exact, implementation=fast), exact),
    }
    for name, (ours_call, form) in ours.items():
        yield _measure(name, ours_call, wide[form], scores, upstream, repeats, True)
    if options.only_ours:
        return
    others: dict[str, Weights] = {"as published": partial(descent, implementation="reference")}
    if device.type == "cuda":
        others["scalar form, torch.compile"] = torch.compile(partial(scalar_form, k=k, n_iters=n_iters), dynamic=False)
    others |= _colt5_attention(k, n_iters)
    for name, call in others.items():
        try:
            yield _measure(name, call, wide[descent], scores, upstream, repeats, False)
        except Exception as error:  # a limit of the other package, which must not end the benchmark
            print(f"{name}, {shape[0]} x {shape[1]:,}: {type(error).__name__}: {str(error).splitlines()[0][:100]}")


def scalar_form(scores: Tensor, k: float, n_iters: int) -> Tensor:
    """Coordinate descent on one scalar per row in PyTorch's own operators, with autograd: the input to torch.compile.

    Args:
        scores: (rows, n) scores.
        k: number of scores to select per row.
        n_iters: iterations.

    Returns:
        (rows, n) weights.
    """
    epsilons = epsilon_schedule(EPS, EPS_INIT, EPS_DECAY, n_iters)
    a = torch.full_like(scores[..., :1], epsilons[0] * math.log(k / scores.shape[-1]))
    for eps in epsilons[1:-1]:
        a = eps * (math.log(k) - (torch.minimum(scores, -a) / eps).logsumexp(dim=-1, keepdim=True))
    return ((scores + a).clamp(max=0) / epsilons[-1]).exp()


def _colt5_attention(k: float, n_iters: int) -> dict[str, Weights]:
    """Implementations of the package colt5-attention; none where it is not installed."""
    try:
        from colt5_attention.coor_descent import coor_descent
    except ImportError:
        print("no comparison with colt5-attention, which is not installed; pip install 'colt5dist[bench]'")
        return {}
    implementations: dict[str, Weights] = {}
    settings = {"k": k, "n_iters": n_iters, "eps": EPS, "eps_init": EPS_INIT, "eps_decay": EPS_DECAY}
    if torch.cuda.is_available():
        from colt5_attention.triton_coor_descent import triton_coor_descent

        segments = max(1, n_iters // 5)
        implementations["colt5-attention, Triton"] = partial(
            triton_coor_descent, checkpoint_segments=segments, **settings
        )
    return implementations | {"colt5-attention, PyTorch": partial(coor_descent, **settings)}


def _gradients(weights: Weights, scores: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and gradient of the scores in float64."""
    wide = scores.double().requires_grad_()
    result = weights(wide)
    return result.detach(), torch.autograd.grad(result, wide, upstream.double())[0]


def _measure(
    name: str,
    weights: Weights,
    expected: tuple[Tensor, Tensor],
    scores: Tensor,
    upstream: Tensor,
    repeats: int,
    tight: bool,
) -> Row:
    """Errors and bytes of one implementation, and its times if its errors are within the tolerance."""
    errors, saved_bytes = _errors(weights, expected, scores, upstream)
    tolerances = (FORWARD_TOLERANCE, BACKWARD_TOLERANCE) if tight else (OTHERS_TOLERANCE, OTHERS_TOLERANCE)
    shape = f"{scores.shape[0]} x {scores.shape[1]:,}"
    if not (errors[0] <= tolerances[0] and errors[1] <= tolerances[1]):
        return Row(name, shape, None, None, None, None, *errors, saved_bytes)
    inputs = scores.clone().requires_grad_()

    def forward() -> Tensor:
        with torch.no_grad():
            return weights(inputs)

    def both() -> Tensor:
        return torch.autograd.grad(weights(inputs), inputs, upstream)[0]

    gpu: tuple[float | None, float | None] = (None, None)
    if scores.is_cuda and tight:
        gpu = graph_microseconds(forward, repeats), graph_microseconds(both, repeats)
    elif scores.is_cuda:
        # colt5-attention cannot be captured in a graph: GPU time of calls that were queued while the GPU paused
        queued = (median_milliseconds(call, 5, queued=4, on_gpu=True) for call in (forward, both))
        gpu = next(queued) * 1e3, next(queued) * 1e3
    with torch.autograd.set_multithreading_enabled(False):
        eager, host = eager_microseconds(both, repeats)
    return Row(name, shape, *gpu, eager, host, *errors, saved_bytes)


def _errors(
    weights: Weights, expected: tuple[Tensor, Tensor], scores: Tensor, upstream: Tensor
) -> tuple[tuple[float, float], int]:
    """Errors of weights and of the gradient of the scores, and bytes saved for the backward, scores excluded."""
    inputs = scores.clone().requires_grad_()
    storages: dict[int, int] = {}

    def note(saved: Tensor) -> Tensor:
        storages[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        result = weights(inputs)
    saved_bytes = sum(nbytes for address, nbytes in storages.items() if address != inputs.data_ptr())
    (gradient,) = torch.autograd.grad(result, inputs, upstream)
    # elements that are within 4 units in the last place of a threshold may end on its other side
    difference = (gradient.double() - expected[1]).abs().flatten()
    difference = difference.sort().values[: -max(1, difference.numel() // 100_000)]
    forward_error = float((result.detach().double() - expected[0]).norm() / expected[0].norm())
    return (forward_error, float(difference.norm() / expected[1].norm())), saved_bytes


def graph_microseconds(call: Callable[[], object], repeats: int, calls: int = 10) -> float:
    """Return the median GPU time of one call in microseconds, from `calls` calls captured in a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    times = []
    for _ in range(repeats):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        times.append(1e3 * first.elapsed_time(last) / calls)
    return statistics.median(times)


def eager_microseconds(call: Callable[[], object], repeats: int, calls: int = 20) -> tuple[float, float]:
    """Return the median time of one call in microseconds: until the GPU has finished, and until the host has.

    Args:
        call: what is timed.
        repeats: number of measurements.
        calls: calls in a row per measurement.
    """
    walls, hosts = [], []
    for _ in range(repeats):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        hosts.append(1e6 * (time.perf_counter() - begin) / calls)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        walls.append(1e6 * (time.perf_counter() - begin) / calls)
    return statistics.median(walls), statistics.median(hosts)


def _print_head(title: str) -> None:
    """Print the title and the names of the columns."""
    print(f"{title}\n{device_line()}\n")
    names = ("forward", "fwd + bwd", "eager", "host", "error", "error ds", "saved")
    print(f"{'us':28} {'rows x n':>14} " + " ".join(f"{name:>9}" for name in names), flush=True)


def _print_row(row: Row) -> None:
    """Print a line of the table."""
    times = (row.forward_us, row.gpu_us, row.eager_us, row.host_us)
    cells = ["wrong" if row.eager_us is None else "-" if us is None else f"{us:.1f}" for us in times]
    cells += [f"{row.forward_error:.1e}", f"{row.backward_error:.1e}", f"{row.saved_bytes:,}"]
    print(f"{row.name:28} {row.shape:>14} " + " ".join(f"{cell:>9}" for cell in cells), flush=True)


def _write(rows: Sequence[Row], title: str, output: Path) -> None:
    """Write the table to the folder `output` as JSON and a plot."""
    output.mkdir(parents=True, exist_ok=True)
    contents = {"title": title, "device": device_line(), "rows": [asdict(row) for row in rows]}
    (output / "soft_topk.json").write_text(json.dumps(contents, indent=1), encoding="utf-8")
    measured = [(f"{row.name}, {row.shape}", row.gpu_us or row.eager_us) for row in rows if row.eager_us is not None]
    plot_bars(title, [name for name, _ in measured], [us or 0.0 for _, us in measured], "us", output / "soft_topk.png")

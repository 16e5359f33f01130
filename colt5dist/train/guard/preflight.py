"""Before the first step (`train.preflight`): is each device right and as fast as the others, and so is each link?

Each rank multiplies matrices whose product is known exactly, then all ranks sum a tensor whose sum is known, and send
one around in rings. A device that computes wrongly ends the start; one that is slow, and a slow link, are named.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist

from colt5dist.errors import TrainingFault
from colt5dist.train.ranks import Ranks, barrier, describe_ranks, gather_rows
from colt5dist.wording import count

SLOW = 0.8
"""Share of the median rate below which a device or a link is named."""
WINDOWS = 3
"""Measurements of each rate, of which the fastest counts: the others may have met another process."""
WINDOW_SECONDS = 0.2
"""About how long one measurement of products takes."""
MOST_PRODUCTS = 200
"""Products of one measurement, at most."""
MULTIPLIERS = 15
"""Factors of rows and columns are 1 to this; two of them multiplied are exact in bf16."""
PATTERN = 8
"""The numbers that are summed over the ranks repeat after so many elements, and are below it."""

Multiply = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Sizes(NamedTuple):
    """How much a device computes and sends."""

    order: int
    """Rows and columns of the matrices, a power of two."""
    summed: int
    """float32 numbers that are summed over the ranks, a multiple of PATTERN."""
    sent: int
    """float32 numbers that a rank sends to another one."""


SIZES = {"cuda": Sizes(8192, 2**26, 2**24), "cpu": Sizes(512, 2**20, 2**18)}


class Measured(NamedTuple):
    """What one rank measured."""

    local_rank: float
    """Number of the rank on its host."""
    product_rate: float
    """Floating-point operations per second in matrix products."""
    wrong_products: float
    """Elements of products that were wrong."""
    sum_seconds: float
    """Seconds of a sum over all ranks; 0 with one rank."""
    wrong_sums: float
    """Elements of that sum that were wrong."""
    inside_seconds: float
    """Seconds to send to the next rank of the host while the one before sends to this one; 0 where there is none."""
    between_seconds: float
    """The same with the ranks in the same place on the next host and on the one before."""


def preflight(ranks: Ranks, hosts: list[str], device: torch.device, *, multiply: Multiply = torch.mm) -> None:
    """Check the devices and the links of all ranks; collective.

    Rank 0 prints one line of rates, and one on stderr for each device and link that is slow.

    Args:
        ranks: place of this rank.
        hosts: host name of every rank.
        device: device of this rank.
        multiply: the matrix product that is measured.

    Raises:
        TrainingFault: on all ranks, if a product or a sum is wrong; rank 0 has printed whose.
    """
    began = time.perf_counter()
    sizes, inside, between = SIZES[device.type], ring_inside_hosts(hosts), ring_between_hosts(hosts)
    with parts_summed_in_float32():
        rate, wrong_products = measure_products(sizes.order, device, multiply)
    sum_seconds, wrong_sums = measure_sum(sizes.summed, ranks, device) if len(hosts) > 1 else (0.0, 0)
    rings = [measure_ring(sizes.sent, ring, ranks.rank, device) for ring in (inside, between)]
    mine = Measured(ranks.local_rank, rate, wrong_products, sum_seconds, wrong_sums, *rings)
    rows = [Measured(*row) for row in gather_rows(list(mine), device)]
    places = [
        f"rank {rank} on {host} ({f'cuda:{int(row.local_rank)}' if device.type == 'cuda' else 'cpu'})"
        for rank, (host, row) in enumerate(zip(hosts, rows, strict=True))
    ]
    warnings = slow_devices([row.product_rate for row in rows], places, on_gpu=device.type == "cuda")
    warnings += slow_links([row.inside_seconds for row in rows], inside, 4 * sizes.sent, hosts)
    warnings += slow_links([row.between_seconds for row in rows], between, 4 * sizes.sent, hosts)
    faults = wrong_results(rows, places)
    if ranks.is_first:
        print(_line(rows, 4 * sizes.summed, time.perf_counter() - began), flush=True)
        for text in (*(f"WARNING: preflight: {line}" for line in warnings), *(f"error: {line}" for line in faults)):
            print(text, file=sys.stderr, flush=True)
    barrier()  # a launcher ends all ranks with the first that fails: not before rank 0 has printed
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    if faults:
        raise TrainingFault("; ".join(faults))


@contextmanager
def parts_summed_in_float32() -> Iterator[None]:
    """Let matrix products add up parts of their sums in float32; PyTorch's default allows bf16.

    A library may cut the sums into any parts, and bf16 does not hold all of those exactly: a sound GPU could be called
    wrong.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction_split_k
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


def measure_products(order: int, device: torch.device, multiply: Multiply) -> tuple[float, int]:
    """Measure matrix products on this device, and count their wrong elements.

    The rows of a Hadamard matrix are orthogonal. So with whole numbers as factors r of the rows and c of the columns,
    the product of (r H) and (H c) is order * r * c on the diagonal and 0 elsewhere, exactly, in whatever order it is
    summed in float32, and its elements are whole numbers that bf16 holds.

    Args:
        order: rows and columns of the matrices, a power of two.
        device: the device; GPUs multiply in bf16, CPUs in fp32.
        multiply: the product.

    Returns:
        Floating-point operations per second, and the number of wrong elements.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hadamard = torch.ones(1, 1, dtype=dtype, device=device)
    while len(hadamard) < order:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    number = torch.arange(order, device=device)
    of_rows, of_columns = (number % MULTIPLIERS + 1).to(dtype), (7 * number % MULTIPLIERS + 1).to(dtype)
    left, right = of_rows[:, None] * hadamard, hadamard * of_columns
    expected = torch.diag(order * of_rows * of_columns)

    product = multiply(left, right)  # the first one also loads libraries
    once = _seconds(device, lambda: multiply(left, right))
    repeats = max(1, min(MOST_PRODUCTS, int(WINDOW_SECONDS / max(once, 1e-9))))
    wrong, seconds = int((product != expected).sum()), []

    def window() -> None:
        nonlocal product
        for _ in range(repeats):
            product = multiply(left, right)

    for _ in range(WINDOWS):
        barrier()
        seconds.append(_seconds(device, window) / repeats)
        wrong = max(wrong, int((product != expected).sum()))
    return 2 * order**3 / min(seconds), wrong


def measure_sum(length: int, ranks: Ranks, device: torch.device) -> tuple[float, int]:
    """Measure an all-reduce of float32 numbers, and count the wrong elements of a sum; collective.

    Args:
        length: how many numbers, a multiple of PATTERN.
        ranks: place of this rank.
        device: device of this rank.

    Returns:
        Seconds of an all-reduce, and the number of wrong elements of a sum whose parts are whole numbers.
    """
    number = torch.arange(PATTERN, device=device)
    sums = [sum((element + rank) % PATTERN for rank in range(ranks.world_size)) for element in range(PATTERN)]
    values = ((number + ranks.rank) % PATTERN).float().repeat(length // PATTERN)
    dist.all_reduce(values)
    wrong = (values.view(-1, PATTERN) != torch.tensor(sums, device=device).float()).sum()
    values.zero_()
    seconds = []
    for _ in range(WINDOWS):
        barrier()
        seconds.append(_seconds(device, lambda: dist.all_reduce(values)))
    return min(seconds), int(wrong)


def ring_inside_hosts(hosts: list[str]) -> list[int]:
    """Return for every rank the next rank of its host, in a ring.

    Args:
        hosts: host name of every rank.
    """
    of_host = {host: [rank for rank, other in enumerate(hosts) if other == host] for host in hosts}
    return [_after(rank, of_host[host]) for rank, host in enumerate(hosts)]


def ring_between_hosts(hosts: list[str]) -> list[int]:
    """Return for every rank the rank that has the same place on the next host, in a ring: the first after the first.

    Args:
        hosts: host name of every rank.
    """
    places = [hosts[:rank].count(host) for rank, host in enumerate(hosts)]
    return [_after(rank, [r for r, other in enumerate(places) if other == place]) for rank, place in enumerate(places)]


def _after(rank: int, ring: list[int]) -> int:
    return ring[(ring.index(rank) + 1) % len(ring)]


def measure_ring(length: int, ring: list[int], rank: int, device: torch.device) -> float:
    """Measure one sending of float32 numbers from every rank to the next one of its ring, at once; collective.

    Args:
        length: how many numbers a rank sends.
        ring: for every rank the one that it sends to; one that sends to itself is alone.
        rank: number of this rank.
        device: device of this rank.

    Returns:
        Seconds until this rank has sent and received; 0 if it is alone.
    """
    if ring == list(range(len(ring))):
        return 0.0
    sent, received = torch.zeros(length, device=device), torch.empty(length, device=device)

    def exchange() -> None:
        if ring[rank] != rank:
            both = [dist.P2POp(dist.isend, sent, ring[rank]), dist.P2POp(dist.irecv, received, ring.index(rank))]
            for work in dist.batch_isend_irecv(both):
                work.wait()

    exchange()  # connects them
    seconds = []
    for _ in range(WINDOWS):
        barrier()
        seconds.append(_seconds(device, exchange))
    return min(seconds) if ring[rank] != rank else 0.0


def slow_devices(rates: list[float], places: list[str], *, on_gpu: bool) -> list[str]:
    """Name the ranks whose products are slow.

    Args:
        rates: floating-point operations per second of every rank.
        places: every rank in words.
        on_gpu: whether the devices are GPUs.
    """
    median = statistics.median(rates)
    follows = "training continues, and every step waits for this rank"
    if not on_gpu:
        follows += "; does something else use its cores?"
    return [
        f"{place}: products {_flops(rate)}, {rate / median:.0%} of the median {_flops(median)}; {follows}"
        for place, rate in zip(places, rates, strict=True)
        if rate < SLOW * median
    ]


def slow_links(seconds: list[float], ring: list[int], sent: int, hosts: list[str]) -> list[str]:
    """Name the links of rings that are slow.

    A rank ends when it has both sent and received. So a link is as slow as the faster of its two ranks, because the
    other one may have waited for its other neighbour.

    Args:
        seconds: of every rank; zeros: not measured.
        ring: for every rank the one that it sends to.
        sent: bytes.
        hosts: host name of every rank.
    """
    rates = {(a, b): sent / min(seconds[a], seconds[b]) for a, b in enumerate(ring) if a != b}
    median = statistics.median(rates.values()) if rates else 0.0
    return [
        f"link from rank {a} on {hosts[a]} to rank {b} on {hosts[b]}: {_bytes(rate)}, {rate / median:.0%} of the "
        f"median {_bytes(median)}"
        for (a, b), rate in rates.items()
        if rate < SLOW * median
    ]


def wrong_results(rows: list[Measured], places: list[str]) -> list[str]:
    """Name the ranks whose products or sums are wrong.

    Args:
        rows: what every rank measured.
        places: every rank in words.
    """
    advice = "leave this device out, or start without this check (train.preflight=false)"
    lines = [
        f"train.preflight: {place} computes wrongly: {count(int(row.wrong_products), 'wrong element')} in a matrix "
        f"product; {advice}"
        for place, row in zip(places, rows, strict=True)
        if row.wrong_products
    ]
    if wrong := [rank for rank, row in enumerate(rows) if row.wrong_sums]:
        lines.append(
            f"train.preflight: the sum over all ranks is wrong on {describe_ranks(wrong)}; check the links between the "
            "devices, or start without this check (train.preflight=false)"
        )
    return lines


def _line(rows: list[Measured], summed: int, seconds: float) -> str:
    """The line of rates; that of the all-reduce is the bytes that each rank sends, per second."""
    rates = sorted(row.product_rate for row in rows)
    parts = [f"preflight: {count(len(rows), 'rank')}", f"products {_span(rates)}"]
    if len(rows) > 1:
        sent = 2 * (len(rows) - 1) / len(rows) * summed
        parts.append(f"all-reduce {_bytes(sent / max(row.sum_seconds for row in rows))}")
    return f"{', '.join(parts)}; took {seconds:.1f} s"


def _span(rates: list[float]) -> str:
    """Smallest and largest of some rates: `610-640 TFLOP/s`."""
    lowest, highest = _flops(rates[0]), _flops(rates[-1])
    if lowest.split()[1] == highest.split()[1] and lowest != highest:
        lowest = lowest.split()[0]
    return highest if lowest == highest else f"{lowest}-{highest}"


def _flops(rate: float) -> str:
    return f"{rate / 1e12:.0f} TFLOP/s" if rate >= 1e13 else f"{rate / 1e9:.0f} GFLOP/s"


def _bytes(rate: float) -> str:
    return f"{rate / 1e9:.0f} GB/s" if rate >= 1e10 else f"{rate / 1e9:.2f} GB/s"


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds until a device has done some work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began

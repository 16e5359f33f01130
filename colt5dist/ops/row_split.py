"""How the rows of an operator are shared out among the programs of a kernel, and how the programs of one row agree.

A row that is longer than a program can hold is split over several programs, each of which keeps its part in registers
for the whole kernel. When they need a sum over the row, each writes its own term to a slot in global memory, together
with the number of the exchange, as one 8-byte word; all read all slots until the number is the awaited one. That is one
hop through the L2 cache, while a counter with atomic additions takes three. The terms are added in the order of the
parts: the sum is the same every time.

Such a kernel waits, so all its programs have to run at once. It is launched as a cooperative grid, which the driver
starts only when there is room for all of it (or refuses, which is an error and no hang), with at most one program per
multiprocessor; rows beyond that are taken in turn.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# (kernels: a type beside an argument would mean something else to Triton)

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from colt5dist.ops.triton_rows import INTERPRETED

LONGEST_WHOLE_ROW = 16_384
"""Columns up to which a row is left to one program: splitting costs as much as it saves."""
SMALLEST_PART = 4_096
"""Columns below which a part of a row is not made smaller."""
LARGEST_PART = 16_384
"""Columns that a program can hold in registers."""
LARGEST_COUNT = 65_535
"""Columns of a part whose number can be exchanged."""
STREAMED_BLOCK = 8_192
"""Columns that a program reads at a time where its part of the row does not fit into registers."""
SMALLEST_SPREAD_PART = 1_024
"""As `SMALLEST_PART`, for a kernel that exchanges once."""
SPREAD_BLOCK = 8_192
"""Most columns that such a kernel holds at a time."""


class RowSplit(NamedTuple):
    """A split of rows.

    Args:
        parts: programs per row.
        block: columns that a program holds at a time.
        blocks: how many of them a program has (1: it keeps its part in registers).
        groups: rows that are worked on at once.
        num_warps: warps per program.
    """

    parts: int
    block: int
    blocks: int
    groups: int
    num_warps: int

    @property
    def launch(self) -> dict[str, Any]:
        """Keyword arguments of the kernel's launch."""
        constants = {
            "LANES": lanes(self.parts),
            "REPLICAS": replicas(self.parts),
            "BLOCK": self.block,
            "num_warps": self.num_warps,
        }
        return constants if self.parts == 1 else constants | {"launch_cooperative_grid": True}


@lru_cache(maxsize=1024)
def lanes(parts: int) -> int:
    """Elements of the block that holds a term of each part: 1 where a row is not split."""
    return triton.next_power_of_2(parts)


@lru_cache(maxsize=1024)
def replicas(parts: int) -> int:
    """How many times each part writes its word, so that not all others wait at one place of the cache."""
    return max(1, lanes(parts) // 16)


@lru_cache(maxsize=1024)
def split_rows(num_rows: int, n: int, device: torch.device | None) -> RowSplit:
    """The split of `num_rows` rows of n columns that are read once and searched many times.

    device None: no program waits for another. The split depends on nothing that differs between two calls of one kind
    on one kind of device, so that a recomputation adds in the same order.
    """
    block = triton.next_power_of_2(n)
    if block <= LONGEST_WHOLE_ROW:
        return RowSplit(1, block, 1, num_rows, max(1, min(block // 1024, 8)))
    if device is None or INTERPRETED:
        return RowSplit(1, STREAMED_BLOCK, triton.cdiv(n, STREAMED_BLOCK), num_rows, 16)
    room = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = max(room // num_rows, triton.cdiv(n, LARGEST_PART))
    block = max(triton.next_power_of_2(triton.cdiv(n, min(wanted, room))), SMALLEST_PART)
    blocks = 1
    if block > LARGEST_PART:
        block = STREAMED_BLOCK
        blocks = triton.cdiv(triton.cdiv(n, room), block)
        if block * blocks > LARGEST_COUNT:
            return RowSplit(1, block, triton.cdiv(n, block), num_rows, 16)
    parts = triton.cdiv(n, block * blocks)
    groups = num_rows if parts == 1 else min(num_rows, room // parts)
    return RowSplit(parts, block, blocks, groups, 16 if blocks > 1 else max(4, block // 2048))


@lru_cache(maxsize=1024)
def spread_rows(num_rows: int, n: int, device: torch.device | None) -> RowSplit:
    """The split of `num_rows` rows of n columns that are read twice: over all multiprocessors."""
    parts = 1
    if device is not None and not INTERPRETED:
        room = torch.cuda.get_device_properties(device).multi_processor_count
        parts = max(1, min(room // num_rows, triton.cdiv(n, SMALLEST_SPREAD_PART)))
    columns = triton.cdiv(n, parts)
    block = min(triton.next_power_of_2(columns), SPREAD_BLOCK)
    blocks = triton.cdiv(columns, block)
    parts = triton.cdiv(n, block * blocks)
    groups = num_rows if parts == 1 else min(num_rows, room // parts)
    return RowSplit(parts, block, blocks, groups, max(1, min(block // 256, 16)))


class Messages(NamedTuple):
    """Memory through which the programs of a launch exchange numbers.

    Args:
        words: int64, zero at first and never cleared.
        stride: words per group. The first counts the group's exchanges, from launch to launch.
    """

    words: Tensor
    stride: int


_HEADER = tl.constexpr(16)
_RESERVE = 1 << 17
_of_stream: dict[tuple[int, int, int], Messages] = {}
_reserves: dict[int, Tensor] = {}


def messages(layout: RowSplit, like: Tensor) -> Messages:
    """Memory for the exchanges of one launch on the current stream; where nothing is exchanged, any tensor.

    Launches of one stream follow each other: those with rows of equally many parts share it. What is captured into a
    CUDA graph may be replayed beside anything, so each captured launch has memory of its own: cut from a reserve that
    was zeroed before, or when that is used up (or the capture came first), zeroed by the graph.
    """
    if layout.parts == 1:
        return Messages(like, 0)
    device = like.device.index
    stride = 2 * replicas(layout.parts) * lanes(layout.parts) + 16
    if torch.cuda.is_current_stream_capturing():
        size = layout.groups * stride
        reserve = _reserves.get(device)
        if reserve is None or reserve.numel() < size:
            return Messages(torch.zeros(size, dtype=torch.int64, device=like.device), stride)
        _reserves[device] = reserve[size:]
        return Messages(reserve[:size], stride)
    stream = torch.cuda.current_stream(device)
    key = (device, stream.cuda_stream, layout.parts)
    shared = _of_stream.get(key)
    if shared is None:
        if device not in _reserves:
            _reserves[device] = _lasting_zeros(_RESERVE, stream)
            stream.synchronize()  # once: graphs may use it on other streams
        room = torch.cuda.get_device_properties(device).multi_processor_count
        shared = _of_stream[key] = Messages(_lasting_zeros(room // layout.parts * stride, stream), stride)
    return shared


def _lasting_zeros(size: int, stream: torch.cuda.Stream) -> Tensor:
    """Memory that is kept, zeroed on `stream`.

    From a thread of its own: while PyTorch's compiler warms up a CUDA graph, the calling thread's memory comes from the
    graph's pool, which is given to others afterwards.
    """

    def allocate() -> Tensor:
        with torch.cuda.stream(stream):
            return torch.zeros(size, dtype=torch.int64, device=stream.device)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(allocate).result()


@triton.jit
def first_sequence(messages, stride, group, LANES: tl.constexpr):
    """Number of the group's exchanges in earlier launches."""
    if LANES > 1:
        return tl.load(messages + group.to(tl.int64) * stride)
    return tl.full((), 0, tl.int64)


@triton.jit
def finish(messages, stride, group, part, sequence, LANES: tl.constexpr):
    """Keep the number of exchanges. By now all programs of the group have read the one before the launch."""
    if LANES > 1 and part == 0:
        tl.store(messages + group.to(tl.int64) * stride, sequence)


@triton.jit
def post(messages, stride, group, part, sequence, value, count, LANES: tl.constexpr, REPLICAS: tl.constexpr):
    """Give the row's other programs a float32 and an integer in 0 .. 65,535, in the exchange of number `sequence`."""
    slots = messages + group.to(tl.int64) * stride + _HEADER + (sequence % 2) * (LANES * REPLICAS)
    payload = (value.to(tl.int32, bitcast=True).to(tl.int64) << 32) | ((count.to(tl.int64) & 0xFFFF) << 16)
    if REPLICAS == 1:
        tl.store(slots + part, payload | (sequence & 0xFFFF))
    else:
        words = tl.full([REPLICAS], 0, tl.int64) + (payload | (sequence & 0xFFFF))
        tl.store(slots + tl.arange(0, REPLICAS) * LANES + part, words)


@triton.jit
def collect(messages, stride, group, part, parts, sequence, LANES: tl.constexpr, REPLICAS: tl.constexpr):
    """What the row's programs gave in the exchange of number `sequence`: two blocks of LANES, 0 beyond `parts`.

    Two slots in turn are enough: a program posts its term of the exchange after the next only when it has the next
    one's terms from all others, who by then have read this one's. So a slot holds the term that is awaited or the one
    two exchanges earlier, and 16 bits of the number tell them apart.
    """
    tag = sequence & 0xFFFF
    lane = tl.arange(0, LANES)
    there = lane < parts
    # lanes beyond the last part look at its word
    slots = messages + group.to(tl.int64) * stride + _HEADER + (sequence % 2) * (LANES * REPLICAS)
    slots += (part % REPLICAS) * LANES + tl.where(there, lane, parts - 1)
    words = tl.load(slots, volatile=True)
    while tl.sum(((words & 0xFFFF) != tag).to(tl.int32)) > 0:
        words = tl.load(slots, volatile=True)
    words = tl.where(there, words, 0)
    return (words >> 32).to(tl.int32).to(tl.float32, bitcast=True), (words >> 16).to(tl.int32) & 0xFFFF


@triton.jit
def exchange(messages, stride, group, part, parts, sequence, value, count, LANES: tl.constexpr, REPLICAS: tl.constexpr):
    """`post` and `collect`."""
    post(messages, stride, group, part, sequence, value, count, LANES, REPLICAS)
    return collect(messages, stride, group, part, parts, sequence, LANES, REPLICAS)

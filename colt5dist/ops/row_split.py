"""How the rows of an operator are laid over the programs of a Triton kernel, and how the programs of one row agree.

A row that is longer than a program can hold is split over several programs, each of which keeps its part in registers
for the whole kernel. When they need a sum over the row, each writes its own term to a slot in global memory, together
with the number of the exchange, as one 8-byte word; all read all slots until the number is the awaited one. That is one
hop through the L2 cache, while a counter with atomic additions takes three. The terms are added in the order of the
parts: the sum is the same every time.

Such a kernel waits, so all its programs have to run at once. It is launched as a cooperative grid, which the driver
starts only when there is room for all of it (or refuses, which is an error and no hang), with at most one program a
multiprocessor; rows beyond that are taken in turn.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# (kernels: a type beside an argument would mean something else to Triton)

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
LARGEST_PART = 32_768
"""Columns that a program can hold in registers."""
STREAMED_BLOCK = 4_096
"""Columns that a program reads at a time where its part of the row does not fit into registers."""


class RowSplit(NamedTuple):
    """parts: programs a row; block: columns that a program holds at a time; blocks: how many of them a program has (1:
    it keeps its part in registers); groups: rows that are worked on at once; num_warps: warps a program."""

    parts: int
    block: int
    blocks: int
    groups: int
    num_warps: int

    @property
    def launch(self) -> dict[str, Any]:
        """Keyword arguments of the kernel's launch."""
        constants = {"LANES": lanes(self.parts), "BLOCK": self.block, "num_warps": self.num_warps}
        return constants if self.parts == 1 else constants | {"launch_cooperative_grid": True}

    def messages(self, like: Tensor, words: int) -> Tensor:
        """Memory for exchanges of up to `words` words: its content matters, so it is not left uninitialised."""
        size = 2 * self.groups * words * lanes(self.parts) if self.parts > 1 else 0
        return torch.zeros(size, dtype=torch.int64, device=like.device) if size else like


def lanes(parts: int) -> int:
    """Elements of the block that holds a term of each part: 1 where a row is not split."""
    return triton.next_power_of_2(parts)


@lru_cache(maxsize=1024)
def split_rows(num_rows: int, n: int, device: torch.device | None) -> RowSplit:
    """The split of `num_rows` rows of n columns on a CUDA device; device None: no program waits for another.

    It depends on nothing that differs between two calls of one kind on one kind of device, so that a recomputation
    adds in the same order.
    """
    block = triton.next_power_of_2(n)
    if device is None or INTERPRETED:
        block, blocks = (block, 1) if block <= LONGEST_WHOLE_ROW else (STREAMED_BLOCK, triton.cdiv(n, STREAMED_BLOCK))
        return RowSplit(1, block, blocks, num_rows, _num_warps(block))
    if n <= LONGEST_WHOLE_ROW:
        return RowSplit(1, block, 1, num_rows, _num_warps(block))
    room = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = max(room // num_rows, triton.cdiv(n, LARGEST_PART))
    block = max(triton.next_power_of_2(triton.cdiv(n, min(wanted, room))), SMALLEST_PART)
    blocks = 1
    if block > LARGEST_PART:
        blocks = triton.cdiv(triton.cdiv(n, room), STREAMED_BLOCK)
        block = STREAMED_BLOCK
    parts = triton.cdiv(n, block * blocks)
    return RowSplit(parts, block, blocks, min(num_rows, room // parts), _num_warps(block))


def _num_warps(block: int) -> int:
    return max(1, min(block // 1024, 16))


@triton.jit
def exchange(messages, group, part, parts, sequence, value, count, LANES: tl.constexpr):
    """Give the row's other programs a float32 and an int32, and get theirs: two blocks of LANES, 0 beyond `parts`.

    sequence counts the exchanges of this launch from 1. Two slots in turn are enough: a program writes its term of the
    exchange after the next only when it has the next one's terms from all others, who by then have read this one's.
    """
    tag = sequence.to(tl.int64) & 0xFFFFFFFF
    slots = messages + (group * 2 + sequence % 2) * (2 * LANES)
    tl.store(slots + part, (value.to(tl.int32, bitcast=True).to(tl.int64) << 32) | tag)
    tl.store(slots + LANES + part, (count.to(tl.int64) << 32) | tag)
    lane = tl.arange(0, LANES)
    there = lane < parts
    values = tl.load(slots + lane, mask=there, other=0, volatile=True)
    counts = tl.load(slots + LANES + lane, mask=there, other=0, volatile=True)
    missing = tl.sum((there & (((values & 0xFFFFFFFF) != tag) | ((counts & 0xFFFFFFFF) != tag))).to(tl.int32))
    while missing > 0:
        values = tl.load(slots + lane, mask=there, other=0, volatile=True)
        counts = tl.load(slots + LANES + lane, mask=there, other=0, volatile=True)
        missing = tl.sum((there & (((values & 0xFFFFFFFF) != tag) | ((counts & 0xFFFFFFFF) != tag))).to(tl.int32))
    return (values >> 32).to(tl.int32).to(tl.float32, bitcast=True), (counts >> 32).to(tl.int32)

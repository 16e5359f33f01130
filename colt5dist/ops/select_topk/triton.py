"""The selection in one Triton kernel: a search for the smallest selected score, bit by bit, then compaction.

A score becomes an integer in the same order. The search finds the largest key v for which at least num_tokens keys are
v or more, two bits a round; it ends early where exactly num_tokens are. Then every key above v is taken, and of those
equal to v as many as are missing, those at smaller positions first. A row may be split over several programs, which
exchange the counts of each round (`colt5dist.ops.row_split`).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# (kernels: a type beside an argument would mean something else to Triton)

import torch
import triton
import triton.language as tl
from torch import Tensor

from colt5dist.ops.row_split import RowSplit, exchange, split_rows
from colt5dist.ops.triton_rows import row_arguments, row_tile


@triton.jit(do_not_specialize=["num_rows", "num_tokens", "parts"])
def _select_kernel(
    scores,
    row_stride,
    column_stride,
    mask,
    mask_row_stride,
    mask_column_stride,
    positions,
    messages,
    num_rows,
    n,
    num_tokens,
    parts,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    source = (scores, row_stride, column_stride, mask, mask_row_stride, mask_column_stride)
    part = tl.program_id(0) % parts
    group = tl.program_id(0) // parts
    earlier = tl.arange(0, LANES) < part
    sequence = 0
    for task in tl.range(group, num_rows, tl.num_programs(0) // parts):
        row = tl.full((), 0, tl.int64) + task
        tile, _valid, columns = row_tile(source, row, part * BLOCK, n, BLOCK, HAS_MASK, tl.float32)
        # integers in the order of the scores: masked ones and NaN like -inf, what is beyond n below that
        tile = tl.where(tile == tile, tile, float("-inf"))
        bits = (tile + 0.0).to(tl.int32, bitcast=True)  # + 0.0: -0 and 0 are equal
        keys = tl.where(columns < n, bits ^ ((bits >> 31) & 0x7FFFFFFF), -2147483648)

        lowest = tl.full((), -2147483648, tl.int64)
        width = tl.full((), 1 << 30, tl.int64)
        while width > 0:
            one = tl.sum((keys >= (lowest + width).to(tl.int32)).to(tl.int32))
            two = tl.sum((keys >= (lowest + 2 * width).to(tl.int32)).to(tl.int32))
            three = tl.sum((keys >= (lowest + 3 * width).to(tl.int32)).to(tl.int32))
            if LANES > 1:
                # a part has less than 2 ** 16 columns: two counts travel in one word
                sequence += 1
                pair = (one | (two << 16)).to(tl.float32, bitcast=True)
                pairs, threes = exchange(messages, group, part, parts, sequence, pair, three, LANES)
                both = pairs.to(tl.int32, bitcast=True)
                one = tl.sum(both & 0xFFFF)
                two = tl.sum((both >> 16) & 0xFFFF)
                three = tl.sum(threes)
            digit = (one >= num_tokens).to(tl.int64) + (two >= num_tokens).to(tl.int64)
            lowest += (digit + (three >= num_tokens).to(tl.int64)) * width
            exact = (one == num_tokens) | (two == num_tokens) | (three == num_tokens)
            # an exact count: all keys from `lowest` on are taken, and none of those equal to a threshold below it
            lowest = tl.where(exact, lowest - 1, lowest)
            width = tl.where(exact, 0, width >> 2)
        threshold = lowest.to(tl.int32)

        above = (keys > threshold).to(tl.int32)
        equal = (keys == threshold).to(tl.int32)
        num_above = tl.sum(above)
        above_before = 0
        equal_before = 0
        if LANES > 1:
            sequence += 1
            pair = num_above.to(tl.float32, bitcast=True)
            aboves, equals = exchange(messages, group, part, parts, sequence, pair, tl.sum(equal), LANES)
            aboves = aboves.to(tl.int32, bitcast=True)
            num_above = tl.sum(aboves)
            above_before = tl.sum(tl.where(earlier, aboves, 0))
            equal_before = tl.sum(tl.where(earlier, equals, 0))
        num_missing = num_tokens - num_above
        rank = equal_before + tl.cumsum(equal, 0)
        selected = above + tl.where((equal > 0) & (rank <= num_missing), 1, 0)
        before = above_before + tl.where(equal_before < num_missing, equal_before, num_missing)
        place = before + tl.cumsum(selected, 0) - 1
        tl.store(positions + row * num_tokens + place, columns, mask=selected > 0)


def can_select(scores: Tensor) -> RowSplit | None:
    """How the rows are split, or None where the kernel does not serve: float64, and rows too long for registers."""
    if scores.dtype == torch.float64:
        return None
    n = scores.shape[-1]
    layout = split_rows(scores.numel() // n, n, scores.device if scores.is_cuda else None)
    return layout if layout.blocks == 1 else None


def select_topk_triton(scores: Tensor, num_tokens: int, mask: Tensor | None, layout: RowSplit) -> Tensor:
    """As `select_topk_reference`."""
    n = scores.shape[-1]
    num_rows = scores.numel() // n
    positions = torch.empty((*scores.shape[:-1], num_tokens), dtype=torch.int64, device=scores.device)
    with torch.cuda.device_of(scores):
        _select_kernel[(layout.parts * layout.groups,)](
            *row_arguments(scores, mask),
            positions,
            layout.messages(positions, 2),
            num_rows,
            n,
            num_tokens,
            layout.parts,
            HAS_MASK=mask is not None,
            **layout.launch,
        )
    return positions

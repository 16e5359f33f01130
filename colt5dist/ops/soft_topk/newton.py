"""The exact soft top-k by a bracketed Newton iteration, in PyTorch; its gradient is implicit and replays nothing.

The names are those of the derivation in `colt5dist.ops.soft_topk`.
"""

import torch
from torch import Tensor

from colt5dist.ops.soft_topk.operator import budgets, define_newton, empty_budget_gradient
from colt5dist.ops.soft_topk.scalar_state import difference, masked_rows, output

MAX_PASSES = 64
"""Passes over a row after which the iteration ends, whatever it has reached: also with NaN."""


def tolerance(dtype: torch.dtype) -> float:
    """Error of a / eps, which is the relative error of the unclipped mass, at which the iteration ends."""
    return 1e-6 if dtype == torch.float32 else 1e-14


def _unclipped_mass(offset: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Number of entries with offset >= 0; log of the sum of exp(offset / eps) over the others, -inf if there is none.

    The sum is taken relative to its largest term: it does not vanish where all of them are far below the threshold.
    """
    below = offset.masked_fill(offset >= 0, float("-inf"))
    largest = below.amax(dim=-1)
    pivot = largest.masked_fill(largest.isneginf(), 0.0)
    total = ((below - pivot.unsqueeze(-1)) / eps).exp().sum(dim=-1, dtype=torch.float64)
    return (offset >= 0).sum(dim=-1), total.log() + pivot.to(torch.float64) / eps


def midpoint(low: Tensor, high: Tensor, eps: float) -> Tensor:
    """Middle of the bracket on the scale of asinh(a / eps): linear within eps of 0, logarithmic beyond.

    About 32 of these separate any two float32 numbers, while the middle itself would take 130 for scores of 1e38.
    """
    return eps * (((low / eps).asinh() + (high / eps).asinh()) / 2).sinh()


def solve(scores: Tensor, k: Tensor, mask: Tensor | None, eps: float) -> tuple[Tensor, int]:
    """Root a (..., float64) of sum_i min(1, exp((s_i + a) / eps)) = min(k, n_valid), and the number of passes taken.

    On the CPU it ends when all rows have converged; elsewhere it makes `MAX_PASSES` passes: to ask would be to wait.
    """
    rows, row_max, num_valid = masked_rows(scores, mask)
    row_min = -masked_rows(-scores, mask)[1]
    target = torch.minimum(k, num_valid)
    accuracy = tolerance(rows.dtype)
    total = (difference(rows, row_max) / eps).exp().sum(dim=-1, dtype=torch.float64).clamp(min=1.0)
    high = -row_min
    low = torch.minimum(eps * (target.log() - total.log() - 16 * accuracy) - row_max, high)
    a = torch.where(k >= num_valid, high, low)
    done = (k >= num_valid) | row_max.isnan()
    passes = 0
    while passes < MAX_PASSES:
        if rows.device.type == "cpu" and bool(done.all()):
            break
        num_clipped, log_mass = _unclipped_mass(difference(rows, -a), eps)
        remainder = target - num_clipped
        # never above the root, since the sum is concave in exp(a / eps); says nothing where the clipped alone fill k
        newton = torch.where(remainder > 0, a + eps * (remainder.clamp(min=1e-300).log() - log_mass), float("-inf"))
        high = torch.where(newton < a, torch.minimum(high, a), high)
        # a long step has the error of the offsets that it was computed from, which must not carry it over the root
        low = torch.minimum(torch.maximum(low, newton - accuracy * (newton - a).abs()), high)
        resolution = eps * accuracy + 2.0**-51 * a.abs()
        now = done | ((newton - a).abs() <= resolution) | (high - low <= resolution)
        bisect = (high - low > 4 * eps) & (passes % 2 == 0)
        following = torch.where(bisect, midpoint(low, high, eps), low)
        a = torch.where(done, a, torch.where(now, low, following))
        done = now
        passes += 1
    return torch.where(row_max.isnan(), row_max, a), passes


def _forward(scores: Tensor, k: Tensor | None, mask: Tensor | None, budget: float, eps: float) -> tuple[Tensor, Tensor]:
    """scores (..., n), k (...) or, if None, the number `budget` for all rows -> result (..., n), and the root a (...)
    float64."""
    a, _ = solve(scores, budgets(scores, k, budget), mask, eps)
    rows, _, _ = masked_rows(scores, mask)
    return output(rows, a, eps, mask), a


def _backward(
    grad: Tensor, scores: Tensor, k: Tensor | None, mask: Tensor | None, a: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients to the scores, in their type, and to k, float64 (no elements where k is a number)."""
    rows, _, _ = masked_rows(scores, mask)
    offset = difference(rows, -a)
    free = offset < 0 if mask is None else (offset < 0) & mask
    grad = grad.to(rows.dtype).masked_fill(~free, 0.0)
    below = offset.masked_fill(~free, float("-inf"))
    # where the unclipped mass underflows, its mean gradient does not: weights relative to the largest
    largest = below.amax(dim=-1, keepdim=True)
    weights = ((below - largest.masked_fill(largest.isneginf(), 0.0)) / eps).exp()
    total = weights.sum(dim=-1, dtype=torch.float64)
    # float64: where one entry has nearly all the mass, its own gradient less this mean cancels
    mean = (weights.double() * grad.double()).sum(dim=-1) / total.masked_fill(total == 0, 1.0)
    grad_rows = (below / eps).exp() / eps * difference(grad, mean)
    spoiled = a.isnan()
    grad_rows = grad_rows.masked_fill(
        spoiled.unsqueeze(-1) if mask is None else spoiled.unsqueeze(-1) & mask, float("nan")
    )
    grad_k = empty_budget_gradient(None, scores) if k is None else torch.where(spoiled, a, mean)
    return grad_rows.to(scores.dtype).contiguous(), grad_k


soft_topk_newton_forward = define_newton("soft_topk_newton", _forward, _backward)

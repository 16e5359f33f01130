"""Soft top-k with one scalar of state per row, in PyTorch: for any device, and to read the Triton kernels against.

The names are those of the derivation in `colt5dist.ops.soft_topk`. Row scalars are float64 whatever the scores are: an
element within one float32 ulp of the threshold would otherwise change sides and spoil the gradient.
"""

import torch
from torch import Tensor

from colt5dist.ops.soft_topk.operator import arithmetic_dtype, budget_gradient, budgets, define_coordinate_descent
from colt5dist.ops.soft_topk.schedule import epsilon_schedule, segment_ends


def masked_rows(scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (..., n) with -inf where masked; of each row the maximum and the number of valid entries, both float64.

    The maximum is 0 in a row without a valid entry, and NaN in a row with a valid NaN.
    """
    rows = scores.to(arithmetic_dtype(scores))
    if mask is None:
        num_valid = torch.full(scores.shape[:-1], scores.shape[-1], dtype=torch.float64, device=scores.device)
        return rows, rows.amax(dim=-1).to(torch.float64), num_valid
    rows = rows.masked_fill(~mask, float("-inf"))
    num_valid = mask.sum(dim=-1).to(torch.float64)
    return rows, rows.amax(dim=-1).to(torch.float64).masked_fill(num_valid == 0, 0.0), num_valid


def difference(rows: Tensor, pivot: Tensor) -> Tensor:
    """rows (..., n) - pivot (..., float64), in the type of `rows` and with the sign that float64 would give.

    The pivot is split into two values of the type of `rows`; where the result is small, the first subtraction is exact.
    """
    high = pivot.to(rows.dtype)
    low = (pivot - high.to(torch.float64)).to(rows.dtype)
    return (rows - high.unsqueeze(-1)) - low.unsqueeze(-1)


def output(rows: Tensor, a: Tensor, eps: float, mask: Tensor | None) -> Tensor:
    """exp(min(s + a, 0) / eps), and 0 where masked, also in a row that a NaN has spoiled."""
    selected = (difference(rows, -a).clamp(max=0.0) / eps).exp()
    return (selected if mask is None else selected.masked_fill(~mask, 0.0)).contiguous()


def _first(log_k: Tensor, row_max: Tensor, num_valid: Tensor, eps: float) -> Tensor:
    """a_1, which needs no scores; the NaN of a spoiled row is passed on."""
    return torch.where(row_max.isnan(), row_max, eps * (log_k - num_valid.clamp(min=1.0).log()))


def _next(rows: Tensor, row_max: Tensor, log_k: Tensor, a: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """a_{t-1} -> a_t and the number of clipped entries, those with s > -a_{t-1}."""
    pivot = torch.minimum(row_max, -a)  # the maximum of min(s, -a), without a pass over the row
    offset = difference(rows, pivot)
    num_clipped = (offset > 0).sum(dim=-1, dtype=torch.float64)
    total = (offset.clamp(max=0.0) / eps).exp().sum(dim=-1, dtype=torch.float64)
    # the largest term is exactly 1, so only a row without a valid entry is below that
    return eps * (log_k - total.clamp(min=1.0).log()) - pivot, num_clipped


def _forward(
    scores: Tensor,
    k: Tensor | None,
    mask: Tensor | None,
    budget: float,
    eps: float,
    eps_init: float,
    eps_decay: float,
    n_iters: int,
    segments: int,
) -> tuple[Tensor, Tensor]:
    """scores (..., n), k (...) or, if None, the number `budget` for all rows -> result (..., n), and float64 (...,
    segments, 2): the kept a-values and counts of clipped entries."""
    rows, row_max, num_valid = masked_rows(scores, mask)
    log_k = budgets(scores, k, budget).log()
    epsilons = epsilon_schedule(eps, eps_init, eps_decay, n_iters)
    ends = set(segment_ends(n_iters, segments))
    a = _first(log_k, row_max, num_valid, epsilons[0])
    num_clipped = torch.zeros_like(a)
    kept = []
    for iteration in range(1, n_iters + 1):
        if iteration > 1:
            a, num_clipped = _next(rows, row_max, log_k, a, epsilons[iteration - 1])
        if iteration in ends:
            kept.append(torch.stack((a, num_clipped), dim=-1))
    return output(rows, a, epsilons[-1], mask), torch.stack(kept, dim=-2)


def _backward(
    grad: Tensor,
    scores: Tensor,
    k: Tensor | None,
    mask: Tensor | None,
    kept: Tensor,
    budget: float,
    eps: float,
    eps_init: float,
    eps_decay: float,
    n_iters: int,
) -> tuple[Tensor, Tensor]:
    """Gradients to the scores, in their type, and to k, float64 (no elements where k is a number)."""
    given, k = k, budgets(scores, k, budget)
    rows, row_max, num_valid = masked_rows(scores, mask)
    epsilons = epsilon_schedule(eps, eps_init, eps_decay, n_iters)
    a, num_clipped = _replay(rows, row_max, num_valid, k.log(), epsilons, kept)

    offset = difference(rows, -a[-1])
    direct = grad.to(rows.dtype) * (offset / epsilons[-1]).exp() / epsilons[-1]
    # `> 0` is false for NaN, so that a spoiled row keeps its NaN
    grad_rows = direct.masked_fill(offset > 0, 0.0)
    if mask is not None:
        grad_rows = grad_rows.masked_fill(~mask, 0.0)
    grad_a = grad_rows.sum(dim=-1, dtype=torch.float64)
    grad_k = torch.zeros_like(k)
    for step in range(n_iters - 1, 0, -1):
        before = difference(rows, -a[step - 1])  # which the next pass takes, too
        softmax = (offset / epsilons[step]).exp().masked_fill(before > 0, 0.0)
        offset = before
        grad_rows = grad_rows - (grad_a / k).to(rows.dtype).unsqueeze(-1) * softmax
        grad_k = grad_k + grad_a * epsilons[step] / k
        # clipped entries have a weight below 1 in all; where there are none, the exponential may overflow
        weight = ((a[step] - a[step - 1]) / epsilons[step]).exp().masked_fill(num_clipped[step] == 0, 0.0)
        grad_a = grad_a * num_clipped[step] * weight / k
    if mask is not None:
        grad_rows = grad_rows.masked_fill(~mask, 0.0)
    return grad_rows.to(scores.dtype).contiguous(), budget_gradient(given, grad_k + grad_a * epsilons[0] / k)


def _replay(
    rows: Tensor,
    row_max: Tensor,
    num_valid: Tensor,
    log_k: Tensor,
    epsilons: list[float],
    kept: Tensor,
) -> tuple[list[Tensor], list[Tensor]]:
    """Every a_t and clipped count from those at the segments' ends: the forward's operations on the same values."""
    n_iters = len(epsilons) - 1
    columns = {end: column for column, end in enumerate(segment_ends(n_iters, kept.shape[-2]))}
    states: list[Tensor] = []
    counts: list[Tensor] = []
    for iteration in range(1, n_iters + 1):
        if iteration in columns:
            a, num_clipped = kept[..., columns[iteration], :].unbind(-1)
        elif iteration == 1:
            a = _first(log_k, row_max, num_valid, epsilons[0])
            num_clipped = torch.zeros_like(a)
        else:
            a, num_clipped = _next(rows, row_max, log_k, states[-1], epsilons[iteration - 1])
        states.append(a)
        counts.append(num_clipped)
    return states, counts


soft_topk_scalar_forward = define_coordinate_descent("soft_topk_scalar", _forward, _backward)

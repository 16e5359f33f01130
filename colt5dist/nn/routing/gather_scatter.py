"""Moving the routed tokens out of the sequence and back into it.

The positions of one routed set differ from each other, so a set is moved by copies: nothing is added with atomics, and
where several sets meet in one token they are added one after another. Results and gradients do not depend on the order
in which a device works.
"""

from typing import Any

import torch
from torch import Tensor


def _flat_positions(indices: Tensor, length: int) -> Tensor:
    """Positions (b, ..., m) within samples of `length` tokens -> positions (b * ... * m) in all samples laid end to
    end."""
    first = torch.arange(indices.shape[0], device=indices.device) * length
    return (indices + first.view(-1, *(1,) * (indices.dim() - 1))).flatten()


def _rows(x: Tensor, indices: Tensor) -> Tensor:
    """x (b, n, d) at indices (b, ..., m) -> (b * ... * m, d)."""
    return x.flatten(0, 1).index_select(0, _flat_positions(indices, x.shape[1]))


def _copy_into(base: Tensor, rows: Tensor, indices: Tensor) -> Tensor:
    """base (b, n, d), made here and contiguous, with rows (b * m, d) written over what is at indices (b, m)."""
    base.view(-1, base.shape[-1]).index_copy_(0, _flat_positions(indices, base.shape[1]), rows)
    return base


class _Gather(torch.autograd.Function):
    """Rows of x (b, n, d) at indices (b, r, m) -> (b, r, m, d)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.length = x.shape[1]
        return _rows(x, indices).view(*indices.shape, x.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        grad_x = grads[0].new_zeros(indices.shape[0], ctx.length, grads[0].shape[-1])
        for route in range(indices.shape[1]):
            rows = grads[0][:, route].flatten(0, 1)
            rows = rows if route == 0 else rows + _rows(grad_x, indices[:, route])
            _copy_into(grad_x, rows, indices[:, route])
        return grad_x, None


class _Add(torch.autograd.Function):
    """base (b, n, d) with tokens (b, m, d) added at indices (b, m)."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, tokens: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        rows = _rows(base, indices) + tokens.flatten(0, 1)
        return _copy_into(base.clone(memory_format=torch.contiguous_format), rows, indices)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (indices,) = ctx.saved_tensors
        return grads[0], _rows(grads[0], indices).view(*indices.shape, grads[0].shape[-1]), None


class _AddOrFill(torch.autograd.Function):
    """base (b, n, d) with tokens (b, m, d) added at indices (b, m), and fill (d,) everywhere else."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, tokens: Tensor, fill: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        rows = _rows(base, indices) + tokens.flatten(0, 1)
        # what is written into comes straight out of an operator that makes it: where a call that may return its own
        # argument (`contiguous`, `add_`) is between, the compiler of PyTorch 2.11 loses every gradient
        return _copy_into(base.contiguous() + fill, rows, indices)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (indices,) = ctx.saved_tensors
        routed = _rows(grads[0], indices)
        elsewhere = grads[0].clone(memory_format=torch.contiguous_format)
        _copy_into(elsewhere, torch.zeros_like(routed), indices)
        return grads[0], routed.view(*indices.shape, routed.shape[-1]), elsewhere.sum((0, 1)), None


def gather_tokens(x: Tensor, indices: Tensor) -> Tensor:
    """x (b, n, d) at indices (b, m) or (b, r, m) -> (b, m, d) or (b, r, m, d); x is not repeated over r routes."""
    if indices.dim() == 2:
        return _Gather.apply(x, indices.unsqueeze(1)).squeeze(1)
    return _Gather.apply(x, indices)


def gather_positions(table: Tensor, indices: Tensor) -> Tensor:
    """table (n, d), the same for every sample, at indices (..., m) -> (..., m, d)."""
    return table.index_select(0, indices.flatten()).view(*indices.shape, table.shape[-1])


def add_routed(base: Tensor, tokens: Tensor, indices: Tensor, fill: Tensor | None = None) -> Tensor:
    """Add routed tokens at their positions, and something else everywhere else.

    Args:
        base: (b, n, d).
        tokens: (b, m, d).
        indices: (b, m) int64, positions of the tokens.
        fill: (d,), added where no token is; None: nothing.

    Returns:
        A new tensor (b, n, d) of the type of `base`.
    """
    tokens = tokens.to(base.dtype)
    return (
        _Add.apply(base, tokens, indices)
        if fill is None
        else _AddOrFill.apply(base, tokens, fill.to(base.dtype), indices)
    )

"""Top-k that hands a gradient to the scores that were not picked, too, by way of the soft top-k."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from colt5dist.errors import ConfigError
from colt5dist.ops.checks import is_number, is_whole_number, not_a_number, not_whole
from colt5dist.ops.select_topk import select_topk
from colt5dist.ops.soft_topk import soft_topk

__all__ = ["TopkReturn", "topk"]


class TopkReturn(NamedTuple):
    """What `topk` returns, all (..., k) and in the order of falling values.

    Args:
        values: of the type of x.
        indices: int64.
        coor_descent_values: in [0, 1], the soft top-k at `indices`; None if not differentiable.
        gates: exactly 1 (0 at masked entries), with the gradient of coor_descent_values; None if not differentiable.
    """

    values: Tensor
    indices: Tensor
    coor_descent_values: Tensor | None
    gates: Tensor | None


def topk(
    x: Tensor,
    k: int,
    coor_descent_k_ratio: float = 9 / 8,
    n_iters: int = 20,
    eps: float = 0.1,
    eps_init: float | None = None,
    eps_decay: float = 1.0,
    mask: Tensor | None = None,
    fused: bool = False,
    non_differentiable: bool = False,
) -> TopkReturn:
    """The k largest entries of each row, times gates of value 1 that carry the soft top-k's gradient.

    Args:
        x: (..., n), any floating-point type.
        k: entries to pick from each row, 1 to n. Of equal entries the one at the smaller position comes first.
        coor_descent_k_ratio: sum of the soft top-k for each picked entry, 1 or more; the sum is n at the most.
        n_iters: iterations of the soft top-k, see `soft_topk`.
        eps: final temperature of the soft top-k, above 0, in units of x.
        eps_init: temperature of the first iteration; None: eps.
        eps_decay: factor of the temperature from one iteration to the next, in (0, 1].
        mask: (..., n) bool, True = valid. Masked entries are picked only where fewer than k are valid, and their values
            are 0.
        fused: changes nothing: CUDA tensors are given to the Triton kernels anyway. Kept from the signature of
            colt5-attention.
        non_differentiable: whether there are no gates; the gradient is then that of `torch.topk`.

    Returns:
        `TopkReturn`: values, indices, the soft top-k at the indices, and the gates.

    Raises:
        ConfigError: an argument has a wrong type or value, or the mask does not fit.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ConfigError(f"x: {given}; use a floating-point tensor (..., n)")
    if mask is not None and not isinstance(mask, Tensor):
        raise ConfigError(f"mask: {type(mask).__name__}; use a bool tensor of the shape of x")
    if not is_whole_number(k):
        raise ConfigError(not_whole("k", k))
    if not is_number(coor_descent_k_ratio):
        raise ConfigError(not_a_number("coor_descent_k_ratio", coor_descent_k_ratio))
    if x.dim() == 0 or not 1 <= k <= x.shape[-1]:
        raise ConfigError(f"k: {k} of rows {tuple(x.shape)}; use 1 to the rows' length")
    if not 1 <= coor_descent_k_ratio < math.inf:
        raise ConfigError(f"coor_descent_k_ratio: {coor_descent_k_ratio}; use 1 or more")
    indices = select_topk(x, k, mask)
    valid = None if mask is None else mask.gather(-1, indices)
    picked = x.detach().gather(-1, indices)
    order = _falling(picked if valid is None else picked.masked_fill(~valid, -math.inf))
    indices = indices.gather(-1, order)
    values = x.gather(-1, indices)
    soft = gates = None
    if not non_differentiable:
        weights = soft_topk(
            x,
            min(k * coor_descent_k_ratio, x.shape[-1]),
            mask=mask,
            eps=eps,
            eps_init=eps_init,
            eps_decay=eps_decay,
            n_iters=n_iters,
        )
        soft = weights.gather(-1, indices).to(x.dtype)
        gates = soft + (1 - soft).detach()
        if valid is not None:
            gates = gates.masked_fill(~valid.gather(-1, order), 0.0)
        values = values * gates
    if valid is not None:
        # whatever the masked entries are, NaN too
        values = values.masked_fill(~valid.gather(-1, order), 0.0)
    return TopkReturn(values, indices, soft, gates)


def _falling(values: Tensor) -> Tensor:
    """Places of the values (..., k) from the largest to the smallest, equal ones in the order of their positions."""
    return torch.sort(values, dim=-1, descending=True, stable=True).indices

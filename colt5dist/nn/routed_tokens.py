"""Moving the routed tokens out of the sequence and back into it.

The positions of one routed set differ from each other, so every sum below has one term a position: the result does not
depend on the order in which a device adds, forward and backward.
"""

import torch
from torch import Tensor


def _flat_positions(indices: Tensor, length: int) -> Tensor:
    """Positions (b, ..., m) within samples of `length` tokens -> positions (b * ... * m) in all samples laid end to
    end."""
    first = torch.arange(indices.shape[0], device=indices.device) * length
    return (indices + first.view(-1, *(1,) * (indices.dim() - 1))).flatten()


def gather_tokens(x: Tensor, indices: Tensor) -> Tensor:
    """x (b, n, d) at indices (b, m) or (b, r, m) -> (b, m, d) or (b, r, m, d); x is not repeated over r routes."""
    flat = _flat_positions(indices, x.shape[1])
    return x.flatten(0, 1).index_select(0, flat).view(*indices.shape, x.shape[-1])


def gather_positions(table: Tensor, indices: Tensor) -> Tensor:
    """table (n, d), the same for every sample, at indices (..., m) -> (..., m, d)."""
    return table.index_select(0, indices.flatten()).view(*indices.shape, table.shape[-1])


def add_routed(base: Tensor, tokens: Tensor, indices: Tensor) -> Tensor:
    """base (b, n, d) with tokens (b, m, d) added at indices (b, m); a new tensor of the type of `base`."""
    flat = _flat_positions(indices, base.shape[1])
    return base.flatten(0, 1).index_add(0, flat, tokens.flatten(0, 1).to(base.dtype)).view_as(base)


def replace_routed(base: Tensor, tokens: Tensor, indices: Tensor) -> Tensor:
    """base (b, n, d) with tokens (b, m, d) in place of what is at indices (b, m); a new tensor of the type of
    `base`."""
    flat = _flat_positions(indices, base.shape[1])
    return base.flatten(0, 1).index_copy(0, flat, tokens.flatten(0, 1).to(base.dtype)).view_as(base)

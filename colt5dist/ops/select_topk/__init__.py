"""Which tokens are routed: the positions of the largest scores, the same set in the same order on every device.

Selection by the scores themselves, not by their soft top-k: that saturates at 1 and so has ties by construction, while
the two orders agree wherever it does not.
"""

import torch
from torch import Tensor

from colt5dist.errors import ConfigError

__all__ = ["select_topk"]


@torch.library.custom_op("colt5dist::select_topk", mutates_args=())
def _select_topk(scores: Tensor, num_tokens: int, mask: Tensor | None) -> Tensor:
    if scores.numel() == 0 or num_tokens == 0:
        return torch.zeros((*scores.shape[:-1], num_tokens), dtype=torch.int64, device=scores.device)
    unusable = scores.isnan() if mask is None else scores.isnan() | ~mask
    scores = scores.masked_fill(unusable, float("-inf"))
    # only the value of the last selected score is used: which of equal scores topk returns is not defined
    threshold = scores.topk(num_tokens, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    above = scores > threshold
    equal = scores == threshold
    num_equal = num_tokens - above.sum(dim=-1, keepdim=True)
    selected = above | (equal & (equal.cumsum(dim=-1) <= num_equal))
    # the j-th selected position is where the running count first reaches j: neither a sort nor a host synchronisation
    rank = torch.arange(1, num_tokens + 1, device=scores.device).expand(*scores.shape[:-1], num_tokens)
    return torch.searchsorted(selected.cumsum(dim=-1), rank.contiguous())


@_select_topk.register_fake
def _(scores: Tensor, num_tokens: int, mask: Tensor | None) -> Tensor:
    return scores.new_empty((*scores.shape[:-1], num_tokens), dtype=torch.int64)


def select_topk(scores: Tensor, num_tokens: int, mask: Tensor | None = None) -> Tensor:
    """Positions of the `num_tokens` largest scores of each row, ascending.

    scores (..., n) of any floating type, finite where valid; mask (..., n) bool, True = valid. Of equal scores the one
    at the smaller position is taken first; masked (and -inf or NaN) entries come last of all, those at smaller
    positions first. Returns (..., num_tokens) int64. No gradient, no host synchronisation, and no sum whose order
    matters: the result is a function of the values alone. Registered as `colt5dist::select_topk`, for selective
    activation checkpointing to keep.

    Raises ConfigError where num_tokens is not within 0 .. n, or the mask's shape or type is wrong.
    """
    if not 0 <= num_tokens <= scores.shape[-1]:
        raise ConfigError(f"num_tokens: {num_tokens} of rows of {scores.shape[-1]} scores; use 0 to {scores.shape[-1]}")
    if mask is not None and (mask.shape != scores.shape or mask.dtype != torch.bool):
        raise ConfigError(
            f"mask: {tuple(mask.shape)} of {mask.dtype} for scores {tuple(scores.shape)}; use bool of the scores' shape"
        )
    return _select_topk(scores.detach(), num_tokens, mask)

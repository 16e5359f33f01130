"""The selection in PyTorch, for any device and type: what the Triton kernel is read against."""

import torch
from torch import Tensor


def select_topk_reference(scores: Tensor, num_tokens: int, mask: Tensor | None) -> Tensor:
    """scores (..., n) with n >= num_tokens >= 1, mask (..., n) bool or None -> positions (..., num_tokens) int64."""
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

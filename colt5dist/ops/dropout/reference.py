"""Which elements stay, computed with 32-bit words held in int64: exact, and easy to follow."""

import torch
from torch import Tensor

from colt5dist.ops.counter_random import counter_words


def kept_elements_reference(keys: Tensor, num_tokens: int, num_features: int, *, rate: float, place: int) -> Tensor:
    """What `kept_elements` returns, (b, n, d) bool; the arguments are the same."""
    words = torch.empty(keys.shape[0], num_tokens, num_features, dtype=torch.int64, device=keys.device)
    tokens = counter_words(keys, num_tokens, stream=place, seed=0)
    for feature in range(num_features):
        words[..., feature] = (tokens + 0x9E3779B9 * feature) % 2**32
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        words = words ^ (words >> shift)
        low, high = words % 2**16, words >> 16
        words = (low * factor + (high * factor % 2**16) * 2**16) % 2**32
    words = words ^ (words >> 16)
    # the top bit is turned, because the fast form compares signed words
    return (words ^ 2**31) >= round(rate * 2**32)

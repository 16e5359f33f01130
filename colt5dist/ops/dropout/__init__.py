"""Dropout whose masks are a function of keys and positions: the same on every device and in every second run.

An element's number is a mixed 32-bit word of its token's word (`counter_words`: key, place, token) and its feature, and
the element is dropped where the number is below rate * 2^32. `reference.py` computes it with exact 64-bit arithmetic.
PyTorch computes it with int32, whose products wrap around modulo 2^32, and Triton in one launch. To PyTorch's compiler
the mask is one operation; the reason is that of `counter_random`.
"""

import torch
from torch import Tensor
from torch.library import Library, register_fake

from colt5dist.ops.counter_random.reference import counter_words_reference, start_state
from colt5dist.ops.implementation import HAS_TRITON, choose_implementation

if HAS_TRITON:
    from colt5dist.ops.dropout.triton import kept_elements_triton

__all__ = ["drop_elements", "kept_elements"]

GOLDEN = 0x9E3779B9
"""Odd; a feature's multiple of it is added to the token's word. Of two tokens whose words differ by chance by such a
multiple the masks are shifted copies; about one pair of tokens in three million is one."""
_MIX = (0x7FEB352D, 0x846CA68B - 2**32)
"""Factors of the mixing function of `counter_random`, as int32."""

_LIBRARY = Library("colt5dist", "FRAGMENT")
_LIBRARY.define(
    "kept_elements(Tensor keys, int num_tokens, int num_features, float rate, int place, str implementation) -> Tensor"
)


def _kept(keys: Tensor, num_tokens: int, num_features: int, rate: float, place: int, implementation: str) -> Tensor:
    first, second = start_state(0, place)
    if choose_implementation(implementation, keys, plain="int32") == "triton":
        return kept_elements_triton(keys, num_tokens, num_features, threshold(rate), first, second)
    tokens = (counter_words_reference(keys, num_tokens, first, second) - 2**31).to(torch.int32) ^ -(2**31)
    features = torch.arange(num_features, dtype=torch.int32, device=keys.device)
    words = tokens.unsqueeze(-1) + features * (GOLDEN - 2**32)
    words = (words ^ ((words >> 16) & 0xFFFF)) * _MIX[0]
    words = (words ^ ((words >> 15) & 0x1FFFF)) * _MIX[1]
    words = words ^ ((words >> 16) & 0xFFFF)
    return words >= threshold(rate) - 2**31


def _fake(keys: Tensor, num_tokens: int, num_features: int, rate: float, place: int, implementation: str) -> Tensor:
    return keys.new_empty((keys.shape[0], num_tokens, num_features), dtype=torch.bool)


_LIBRARY.impl("kept_elements", _kept, "CompositeExplicitAutograd")
register_fake("colt5dist::kept_elements", _fake, lib=_LIBRARY)


def kept_elements(
    keys: Tensor, num_tokens: int, num_features: int, *, rate: float, place: int, implementation: str = "auto"
) -> Tensor:
    """Which elements stay.

    Args:
        keys: (b,) int64, any values.
        num_tokens: tokens n of a row.
        num_features: features d of a token, up to 2^31.
        rate: share that is dropped, in [0, 1).
        place: number of the place in the layer; equal keys give other masks in another one.
        implementation: "triton" (CUDA tensors; CPU tensors under TRITON_INTERPRET=1), "int32" (PyTorch), or "auto":
            triton for CUDA tensors.

    Returns:
        (b, n, d) bool; an element is a function of its key, the place, its token's and its feature's number, and rate.
    """
    return torch.ops.colt5dist.kept_elements(keys, num_tokens, num_features, rate, place, implementation)


def threshold(rate: float) -> int:
    """The number, of 2^32, below which a word means that its element is dropped."""
    return min(round(rate * 2**32), 2**32 - 1)


def drop_elements(x: Tensor, keys: Tensor, *, rate: float, place: int) -> Tensor:
    """Dropout: elements of x are 0, or divided by 1 - rate.

    Args:
        x: (b, n, d), of any floating type.
        keys: (b,) int64.
        rate: share that is dropped, in [0, 1).
        place: as in `kept_elements`.

    Returns:
        (b, n, d), of the type of x.
    """
    kept = kept_elements(keys, x.shape[1], x.shape[2], rate=rate, place=place)
    return (x * (1 / (1 - rate))).masked_fill(~kept, 0.0)

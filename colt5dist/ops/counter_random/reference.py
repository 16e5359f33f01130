"""Keys and words in PyTorch: 32-bit words held in int64, with products below 2^63 in size."""

from typing import TypeVar

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
Words = TypeVar("Words", int, Tensor)
"""Words of 32 bits: one, or a tensor of them."""


def mix(words: Words) -> Words:
    """A bijection of 32-bit words in which every bit of the result depends on every bit of the argument."""
    words = ((words ^ (words >> 16)) * 0x7FEB352D) & _WORD
    words = ((words ^ (words >> 15)) * (0x846CA68B - 2**32)) & _WORD  # modulo 2^32 the same factor, but a small product
    return words ^ (words >> 16)


def _add(first: Words, second: Words, number: Words) -> tuple[Words, Words]:
    """Mix both halves of a number of 64 bits into the two words of a state."""
    for word in (number & _WORD, (number >> 32) & _WORD):
        first = mix(first ^ word)
        second = mix((second + first) & _WORD)
    return first, second


def start_state(seed: int, stream: int) -> tuple[int, int]:
    """The two words of a state that has taken in seed and stream, and takes in keys next.

    Args:
        seed: an integer, taken modulo 2^64.
        stream: an integer, taken modulo 2^64.
    """
    return _add(*_add(0x243F6A88, 0x85A308D3, seed), stream)


def _key_state(keys: Tensor, first: int, second: int) -> tuple[Tensor, Tensor]:
    """Two 32-bit words for each key, so that different keys practically never share a row of numbers."""
    return _add(torch.full_like(keys, first), torch.full_like(keys, second), keys)


def counter_keys_reference(keys: Tensor, first: int, second: int) -> Tensor:
    """What `counter_keys` returns, of a state that has taken in seed and stream."""
    of_key, other = _key_state(keys, first, second)
    return of_key | ((other >> 1) << 32)


def counter_words_reference(keys: Tensor, num: int, first: int, second: int) -> Tensor:
    """What `counter_words` returns, of a state that has taken in seed and stream."""
    of_key, other = _key_state(keys, first, second)
    position = torch.arange(num, dtype=torch.int64, device=keys.device)
    words = mix(position ^ of_key.unsqueeze(-1))
    return mix((words + other.unsqueeze(-1)) & _WORD)

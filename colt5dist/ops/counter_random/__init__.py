"""Random numbers that are a pure function of what they are for: no generator, no state, the same on every device.

Random routing draws from here with the sample's number as key and one stream for each router, and dropout with keys
that are derived from it, so neither the world size nor the order of the samples, a restart or a recomputed layer
changes them.

All arithmetic is on 32-bit words held in int64, with products below 2^49: exact, never an overflow, thus bit-equal
wherever PyTorch runs. The mixing function is that of C. Wellons' hash prospector ("lowbias32", public domain).
"""

import torch
from torch import Tensor

from colt5dist.errors import ConfigError

__all__ = ["counter_keys", "counter_uniform", "counter_words"]

_WORD = 0xFFFFFFFF


def _multiply(words: Tensor, factor: int) -> Tensor:
    """words * factor modulo 2^32, of 32-bit words, by halves of 16 bits."""
    return ((words & 0xFFFF) * factor + ((((words >> 16) * factor) & 0xFFFF) << 16)) & _WORD


def _mix(words: Tensor) -> Tensor:
    """A bijection of 32-bit words in which every bit of the result depends on every bit of the argument."""
    words = _multiply(words ^ (words >> 16), 0x7FEB352D)
    words = _multiply(words ^ (words >> 15), 0x846CA68B)
    return words ^ (words >> 16)


def _key_state(keys: Tensor, stream: int | Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Two 32-bit words for each key, so that different keys practically never share a row of numbers."""
    first, second = torch.full_like(keys, 0x243F6A88), torch.full_like(keys, 0x85A308D3)
    for word in (seed, seed >> 32, stream, stream >> 32, keys, keys >> 32):
        first = _mix(first ^ (word & _WORD))
        second = _mix((second + first) & _WORD)
    return first, second


def counter_keys(keys: Tensor, *, stream: int | Tensor, seed: int = 0) -> Tensor:
    """Derive further keys: each is a function of (seed, stream, key) only.

    Args:
        keys: (b,) int64, any values.
        stream: an integer, or (r, 1) int64: r keys for each key.
        seed: an integer, taken modulo 2^64.

    Returns:
        (b,) int64, or (r, b), from 0 to 2^63 - 1.
    """
    first, second = _key_state(keys, stream, seed)
    return first | ((second >> 1) << 32)


def counter_words(keys: Tensor, num: int, *, stream: int, seed: int) -> Tensor:
    """Uniform 32-bit words: row i is a function of (seed, stream, keys[i]) and the position only.

    The arguments are those of `counter_uniform`.

    Returns:
        (b, num) int64, from 0 to 2^32 - 1.
    """
    first, second = _key_state(keys, stream, seed)
    position = torch.arange(num, dtype=torch.int64, device=keys.device)
    words = _mix(position ^ first.unsqueeze(-1))
    return _mix((words + second.unsqueeze(-1)) & _WORD)


def counter_uniform(keys: Tensor, num: int, *, stream: int, seed: int) -> Tensor:
    """Uniform numbers in [0, 1): row i is a function of (seed, stream, keys[i]) and the position only.

    Args:
        keys: (b,) int64, any values.
        num: numbers in each row, 0 or more.
        stream: an integer, taken modulo 2^64.
        seed: an integer, taken modulo 2^64.

    Returns:
        (b, num) float32, multiples of 2^-24, so equal numbers occur within long rows.

    Raises:
        ConfigError: keys are not a vector of int64, or num is negative.
    """
    if keys.dtype != torch.int64 or keys.dim() != 1:
        raise ConfigError(f"keys: {tuple(keys.shape)} of {keys.dtype}; use a vector of int64")
    if num < 0:
        raise ConfigError(f"num: {num} numbers a row; use 0 or more")
    return (counter_words(keys, num, stream=stream, seed=seed) >> 8).to(torch.float32) * 2.0**-24

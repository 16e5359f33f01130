"""Random numbers that are a pure function of what they are for: no generator, no state, the same on every device.

Random routing draws from here with the sample's number as key and one stream for each router, and dropout with keys
that are derived from it, so neither the world size nor the order of the samples, a restart or a recomputed layer
changes them.

PyTorch computes on 32-bit words held in int64, with products below 2^63: exact, never an overflow, thus bit-equal
wherever it runs; Triton computes on unsigned words, in one launch. To PyTorch's compiler a function is one operation:
it would put a word's computation into every place that uses the word, 8 for each mixing, and those multiply until it
does not end. The mixing function is that of C. Wellons' hash prospector ("lowbias32", public domain).
"""

import torch
from torch import Tensor
from torch.library import Library, register_fake

from colt5dist.errors import ConfigError
from colt5dist.ops.counter_random.reference import counter_keys_reference, counter_words_reference, start_state
from colt5dist.ops.implementation import HAS_TRITON, choose_implementation

if HAS_TRITON:
    from colt5dist.ops.counter_random.triton import counter_keys_triton, counter_words_triton

__all__ = ["counter_keys", "counter_uniform", "counter_words"]

_LIBRARY = Library("colt5dist", "FRAGMENT")
_LIBRARY.define("counter_keys(Tensor keys, int first, int second, str implementation) -> Tensor")
_LIBRARY.define("counter_words(Tensor keys, int num, int first, int second, str implementation) -> Tensor")


def _counter_keys(keys: Tensor, first: int, second: int, implementation: str) -> Tensor:
    if choose_implementation(implementation, keys, plain="reference") == "triton":
        return counter_keys_triton(keys, first, second)
    return counter_keys_reference(keys, first, second)


def _counter_words(keys: Tensor, num: int, first: int, second: int, implementation: str) -> Tensor:
    if choose_implementation(implementation, keys, plain="reference") == "triton":
        return counter_words_triton(keys, num, first, second)
    return counter_words_reference(keys, num, first, second)


def _fake_keys(keys: Tensor, first: int, second: int, implementation: str) -> Tensor:
    return keys.new_empty(keys.shape)


def _fake_words(keys: Tensor, num: int, first: int, second: int, implementation: str) -> Tensor:
    return keys.new_empty((keys.shape[0], num))


for _name, _function, _fake in (
    ("counter_keys", _counter_keys, _fake_keys),
    ("counter_words", _counter_words, _fake_words),
):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    register_fake(f"colt5dist::{_name}", _fake, lib=_LIBRARY)


def counter_keys(keys: Tensor, *, stream: int, seed: int = 0, implementation: str = "auto") -> Tensor:
    """Derive further keys: each is a function of (seed, stream, key) only.

    Args:
        keys: (b,) int64, any values.
        stream: an integer, taken modulo 2^64.
        seed: an integer, taken modulo 2^64.
        implementation: "triton" (CUDA tensors; CPU tensors under TRITON_INTERPRET=1), "reference" (PyTorch), or "auto":
            triton for CUDA tensors.

    Returns:
        (b,) int64, from 0 to 2^63 - 1.
    """
    return torch.ops.colt5dist.counter_keys(keys, *start_state(seed, stream), implementation)


def counter_words(keys: Tensor, num: int, *, stream: int, seed: int, implementation: str = "auto") -> Tensor:
    """Uniform 32-bit words: row i is a function of (seed, stream, keys[i]) and the position only.

    The arguments are those of `counter_uniform`, and `implementation` is as in `counter_keys`.

    Returns:
        (b, num) int64, from 0 to 2^32 - 1.
    """
    return torch.ops.colt5dist.counter_words(keys, num, *start_state(seed, stream), implementation)


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

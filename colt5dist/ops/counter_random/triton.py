"""Keys and words in one launch, of unsigned 32-bit words, whose products wrap around."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# (kernels: a type beside an argument would mean something else to Triton)

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def mix(words):
    words = (words ^ (words >> 16)) * 0x7FEB352D
    words = (words ^ (words >> 15)) * 0x846CA68B
    return words ^ (words >> 16)


@triton.jit
def key_state(key, first, second):
    first, second = first.to(tl.uint32), second.to(tl.uint32)
    first = mix(key.to(tl.uint32) ^ first)
    second = mix(first + second)
    first = mix((key >> 32).to(tl.uint32) ^ first)
    return first, mix(first + second)


@triton.jit(do_not_specialize=["first", "second"])
def _keys_kernel(keys, results, num_keys, first, second, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = places < num_keys
    first, second = key_state(tl.load(keys + places, mask=inside, other=0), first, second)
    results += places
    tl.store(results, first.to(tl.int64) | ((second >> 1).to(tl.int64) << 32), mask=inside)


@triton.jit
def words_at(places, first, second):
    """Of the key whose state is given."""
    return mix(mix(places.to(tl.uint32) ^ first) + second)


@triton.jit(do_not_specialize=["first", "second"])
def _words_kernel(keys, results, num, first, second, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first, second = key_state(tl.load(keys + row), first, second)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(results + row * num + places, words_at(places, first, second).to(tl.int64), mask=places < num)


def counter_keys_triton(keys: Tensor, first: int, second: int) -> Tensor:
    """As `counter_keys_reference`, for one stream."""
    keys = keys.contiguous()
    results = torch.empty_like(keys)
    if keys.numel():
        grid = (triton.cdiv(keys.numel(), BLOCK),)
        _keys_kernel[grid](keys, results, keys.numel(), first, second, BLOCK=BLOCK, num_warps=4)
    return results


def counter_words_triton(keys: Tensor, num: int, first: int, second: int) -> Tensor:
    """As `counter_words_reference`."""
    keys = keys.contiguous()
    results = keys.new_empty(keys.shape[0], num)
    if results.numel():
        grid = (keys.shape[0], triton.cdiv(num, BLOCK))
        _words_kernel[grid](keys, results, num, first, second, BLOCK=BLOCK, num_warps=4)
    return results

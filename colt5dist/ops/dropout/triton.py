"""Which elements stay, in one launch."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# (kernels: a type beside an argument would mean something else to Triton)

import torch
import triton
import triton.language as tl
from torch import Tensor

from colt5dist.ops.counter_random.triton import key_state, mix, words_at

NUM_TOKENS = 8
"""Of a program."""
MOST_FEATURES = 512
"""Of a program, and at least a power of two."""


@triton.jit(do_not_specialize=["threshold", "first", "second"])
def _kept_kernel(
    keys, kept, num_tokens, num_features, threshold, first, second, TOKENS: tl.constexpr, FEATURES: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    first, second = key_state(tl.load(keys + row), first, second)
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    features = tl.program_id(2) * FEATURES + tl.arange(0, FEATURES)
    words = words_at(tokens, first, second)[:, None] + (features.to(tl.uint32) * 0x9E3779B9)[None, :]
    # signed words are compared, whose order is that of unsigned ones with the top bit turned
    words = mix(words) ^ 0x80000000
    places = (row * num_tokens + tokens)[:, None] * num_features + features[None, :]
    inside = (tokens < num_tokens)[:, None] & (features < num_features)[None, :]
    tl.store(kept + places, (words >= threshold.to(tl.uint32)).to(tl.uint8), mask=inside)


def kept_elements_triton(
    keys: Tensor, num_tokens: int, num_features: int, threshold: int, first: int, second: int
) -> Tensor:
    """As `kept_elements`, of a state that has taken in the place."""
    kept = torch.empty(keys.shape[0], num_tokens, num_features, dtype=torch.uint8, device=keys.device)
    if kept.numel():
        width = min(MOST_FEATURES, triton.next_power_of_2(num_features))
        grid = (keys.shape[0], triton.cdiv(num_tokens, NUM_TOKENS), triton.cdiv(num_features, width))
        _kept_kernel[grid](
            keys.contiguous(),
            kept,
            num_tokens,
            num_features,
            threshold,
            first,
            second,
            TOKENS=NUM_TOKENS,
            FEATURES=width,
            num_warps=4,
        )
    return kept.view(torch.bool)

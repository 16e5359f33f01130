"""Long inputs on one GPU: forward and backward run, everything is finite, and memory grows in step with the length.

`pytest -m gpu -s tests/nn/test_length_gpu.py` prints the peaks at n, 2n and 4n.
"""

import pytest
import torch

from colt5dist import nn

pytestmark = pytest.mark.gpu
D = 512
HEADS = {"light_heads": 4, "heavy_heads": 8}


def peak_bytes(module, *inputs, **arguments):
    """Most memory that forward and backward hold beside the module and its inputs, the last of which has a gradient."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    module(*inputs, **arguments).float().square().mean().backward()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    gradients = [inputs[-1].grad, *(parameter.grad for parameter in module.parameters())]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert inputs[-1].grad.count_nonzero() > 0
    module.zero_grad()
    return peak


def tokens(*shape):
    return torch.randn(*shape, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)


def assert_linear(name, peaks):
    print(f"\n{name}: " + ", ".join(f"{n:,}: {peak / 2**20:,.0f} MiB" for n, peak in peaks.items()))
    smallest, *_, largest = peaks
    # what does not grow, weights' gradients for instance, may make it less than proportional
    assert peaks[largest] <= 1.1 * (largest / smallest) * peaks[smallest]


def test_self_attention_at_65536_tokens():
    peaks = {}
    for n in (16_384, 32_768, 65_536):
        module = nn.ConditionalRoutedAttention(
            D, num_heavy_tokens_q=n // 16, num_heavy_tokens_kv=n // 8, **HEADS, rotary_emb=True
        )
        peaks[n] = peak_bytes(module.cuda().bfloat16(), tokens(1, n))
    assert_linear("self-attention", peaks)


@pytest.mark.parametrize("sets", [1, 2])
def test_cross_attention_at_1048576_context_tokens(sets):
    """With one token in 128 of the context routed, to each set."""
    peaks = {}
    for n in (262_144, 524_288, 1_048_576):
        module = nn.ConditionalRoutedCrossAttention(D, num_tokens_q=512, num_tokens_kv=n // 128, num_sets_kv=sets)
        peaks[n] = peak_bytes(module.cuda().bfloat16(), tokens(1, 4096), tokens(1, n))
    assert_linear(f"cross-attention, {sets} sets", peaks)


def test_image_attention_routes_over_a_map_of_256_by_256():
    peaks = {}
    for side in (64, 128, 256):
        n = side * side
        module = nn.ConditionalRoutedImageAttention(
            D, num_heavy_tokens_q=n // 16, num_heavy_tokens_kv=n // 8, light_window_size=16, **HEADS
        )
        peaks[n] = peak_bytes(module.cuda().bfloat16(), tokens(1, side, side))
    assert_linear("image attention", peaks)


@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_heavy_attention_holds_no_matrix(sets, masked, dtype):
    """4096 queries and 8192 keys, with the null key an odd number, of 8 heads: the matrix would be 512 MiB or more."""
    module = nn.Attention(D, heads=8).cuda().to(dtype)
    x = torch.randn(1, 4096, D, device="cuda", dtype=dtype)
    context = torch.randn(1, sets, 8192, D, device="cuda", dtype=dtype, requires_grad=True)
    arguments = {"normalized_scores_kv": torch.ones(1, sets, 8192, device="cuda")}
    if masked:
        arguments["mask"] = torch.rand(1, sets, 8192, device="cuda") > 0.1
    matrix = 8 * 4096 * 8193 * x.element_size()
    assert peak_bytes(module, x, context, **arguments) < 0.6 * matrix

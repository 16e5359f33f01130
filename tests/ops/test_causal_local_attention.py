"""Both implementations of causal local attention, with colt5-attention's windows, against dense attention."""

import pytest
import torch

from colt5dist.ops.local_attention import local_attention

each_implementation = pytest.mark.parametrize("implementation", ["reference", "windows"])


def dense(q, k, v, radius, mask):
    position = torch.arange(q.shape[2], device=q.device)
    behind = position[:, None] // radius - position[None, :] // radius
    allowed = ((behind <= 1) & (position[None, :] <= position[:, None])) & mask[:, None, None, :]
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~allowed, float("-inf")).softmax(dim=-1)
    return weights @ v


def tensors(b, h, n, d, dtype=torch.float64):
    generator = torch.Generator().manual_seed(n)
    return [torch.randn(b, h, n, d, dtype=dtype, generator=generator).requires_grad_() for _ in range(3)]


@each_implementation
@pytest.mark.parametrize("radius", [1, 7, 64])
@pytest.mark.parametrize("n", [1, 7, 128, 150])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_dense_attention(radius, n, implementation, masked):
    q, k, v = tensors(2, 3, n, 8)
    # the first key of each window stays, so that no query is without one
    position = torch.arange(n)
    mask = (position % 3 != 1) | (position % radius == 0)
    mask = torch.stack((mask, torch.ones_like(mask))) if masked else None
    out = local_attention(q, k, v, radius=radius, causal=True, mask=mask, implementation=implementation)
    expected = dense(q, k, v, radius, torch.ones(2, n, dtype=torch.bool) if mask is None else mask)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    upstream = torch.randn_like(out)
    for actual, wanted in zip(
        torch.autograd.grad(out, (q, k, v), upstream), torch.autograd.grad(expected, (q, k, v), upstream), strict=True
    ):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)


@each_implementation
def test_later_tokens_move_nothing_by_one_bit(implementation):
    q, k, v = (t.detach() for t in tensors(2, 2, 50, 8, torch.float32))
    first = local_attention(q, k, v, radius=6, causal=True, implementation=implementation)
    for position in range(1, 50):
        later = (torch.arange(50) >= position)[:, None]
        moved = [torch.where(later, 9 * torch.randn_like(t), t) for t in (q, k, v)]
        second = local_attention(*moved, radius=6, causal=True, implementation=implementation)
        assert torch.equal(first[:, :, :position], second[:, :, :position])


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_windows_on_the_gpu(dtype, tolerance):
    q, k, v = (t.detach().cuda().to(dtype).requires_grad_() for t in tensors(2, 4, 1000, 64))
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    out = local_attention(q, k, v, radius=128, causal=True)
    expected = local_attention(*wide, radius=128, causal=True, implementation="reference")
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)
    upstream = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), upstream)
    for actual, wanted in zip(grads, torch.autograd.grad(expected, wide, upstream.double()), strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=4 * tolerance)

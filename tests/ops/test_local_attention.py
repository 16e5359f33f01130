"""Both implementations of local attention against dense attention with a band mask."""

import pytest
import torch

from colt5dist.ops.local_attention import local_attention

each_implementation = pytest.mark.parametrize("implementation", ["reference", "windows"])


def dense_local_attention(q, k, v, radius, mask):
    n = q.shape[2]
    position = torch.arange(n)
    allowed = ((position[:, None] - position[None, :]).abs() <= radius)[None, None] & mask[:, None, None, :]
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~allowed, float("-inf")).softmax(dim=-1)
    return weights @ v


def tensors(b, h, n, d, dtype=torch.float64):
    generator = torch.Generator().manual_seed(n)
    return [torch.randn(b, h, n, d, dtype=dtype, generator=generator).requires_grad_() for _ in range(3)]


@each_implementation
@pytest.mark.parametrize("radius", [1, 7, 127])
@pytest.mark.parametrize("n", [1, 7, 128, 300])
def test_equals_dense_attention_with_band_mask(radius, n, implementation):
    q, k, v = tensors(2, 3, n, 8)
    out = local_attention(q, k, v, radius=radius, implementation=implementation)
    expected = dense_local_attention(q, k, v, radius, torch.ones(2, n, dtype=torch.bool))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    upstream = torch.randn_like(out)
    actual_grads = torch.autograd.grad(out, (q, k, v), upstream)
    expected_grads = torch.autograd.grad(expected, (q, k, v), upstream)
    for actual, wanted in zip(actual_grads, expected_grads, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)


@each_implementation
@pytest.mark.parametrize("n", [20, 61])
def test_mask(n, implementation):
    q, k, v = tensors(2, 2, n, 8)
    # an eighth of the keys is masked, and never a whole neighbourhood
    mask = torch.arange(n).remainder(8) != 3
    mask = torch.stack((mask, torch.ones_like(mask)))
    out = local_attention(q, k, v, radius=5, mask=mask, implementation=implementation)
    torch.testing.assert_close(out, dense_local_attention(q, k, v, 5, mask), rtol=0, atol=1e-12)


@each_implementation
def test_masked_keys_do_not_move_valid_positions_by_one_bit(implementation):
    q, k, v = (t.detach() for t in tensors(2, 2, 50, 8, torch.float32))
    mask = torch.arange(50)[None] < torch.tensor([[50], [31]])
    first = local_attention(q, k, v, radius=6, mask=mask, implementation=implementation)
    pads = ~mask[:, None, :, None]
    second = local_attention(
        q, k.masked_fill(pads, 9.0), v.masked_fill(pads, -77.0), radius=6, mask=mask, implementation=implementation
    )
    valid = mask[:, None, :, None].expand_as(first)
    assert torch.equal(first[valid], second[valid])


@each_implementation
def test_wholly_masked_sample_is_finite_forward_and_backward(implementation):
    q, k, v = tensors(2, 1, 30, 4, torch.float32)
    mask = torch.zeros(2, 30, dtype=torch.bool)
    mask[0] = True
    out = local_attention(q, k, v, radius=4, mask=mask, implementation=implementation)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(t.isfinite().all() for t in (out, *grads))


@each_implementation
def test_reaches_exactly_the_radius(implementation):
    q, k, v = tensors(1, 1, 300, 4)
    (grad,) = torch.autograd.grad(
        local_attention(q, k, v, radius=127, implementation=implementation)[0, 0, 150].sum(), v
    )
    reached = grad[0, 0].abs().sum(-1).nonzero().flatten()
    assert reached.tolist() == list(range(150 - 127, 150 + 127 + 1))


@pytest.mark.parametrize(
    ("shape", "mask", "radius"),
    [
        ((1, 1, 8, 4), None, 0),
        ((1, 8, 4), None, 2),
        ((1, 1, 8, 4), torch.ones(1, 7, dtype=torch.bool), 2),
        ((1, 1, 8, 4), torch.ones(1, 8), 2),
    ],
)
def test_refuses_what_does_not_fit(shape, mask, radius):
    x = torch.zeros(shape)
    with pytest.raises(ValueError, match="use"):
        local_attention(x, x, x, radius=radius, mask=mask)


def test_unknown_implementation_is_refused():
    x = torch.zeros(1, 1, 8, 4)
    with pytest.raises(ValueError, match="implementation"):
        local_attention(x, x, x, radius=2, implementation="dense")


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("masked", [False, True])
def test_windows_on_the_gpu(dtype, tolerance, masked):
    q, k, v = (t.detach().cuda().to(dtype).requires_grad_() for t in tensors(2, 4, 1000, 64))
    mask = torch.arange(1000, device="cuda")[None] < torch.tensor([[1000], [600]], device="cuda") if masked else None
    valid = torch.ones(2, 1000, dtype=torch.bool, device="cuda") if mask is None else mask
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    out = local_attention(q, k, v, radius=127, mask=mask) * valid[:, None, :, None]
    expected = local_attention(*wide, radius=127, mask=mask, implementation="reference") * valid[:, None, :, None]
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)
    upstream = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), upstream)
    for actual, wanted in zip(grads, torch.autograd.grad(expected, wide, upstream.double()), strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=4 * tolerance)

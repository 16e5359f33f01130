"""All implementations of local attention against dense attention with a band mask."""

import pytest
import torch

from colt5dist.ops.local_attention import local_attention

# an implementation, the type of numbers that it is tried in here, and how far it may be from dense attention
each_implementation = pytest.mark.parametrize(
    ("implementation", "dtype", "tolerance"),
    [("reference", torch.float64, 1e-12), ("windows", torch.float64, 1e-12), ("triton", torch.float32, 1e-5)],
    ids=["reference", "windows", "triton"],
)


def dense_local_attention(q, k, v, radius, mask, bias=None):
    q, k, v = q.double(), k.double(), v.double()
    position = torch.arange(q.shape[2], device=q.device)
    offset = position[None, :] - position[:, None]
    allowed = (offset.abs() <= radius)[None, None] & mask[:, None, None, :]
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if bias is not None:
        scores = scores + bias.double()[:, (offset + radius).clamp(0, 2 * radius)]
    return scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1) @ v


def tensors(b, h, n, d, dtype=torch.float64):
    generator = torch.Generator().manual_seed(n)
    return [torch.randn(b, h, n, d, dtype=torch.float64, generator=generator).to(dtype).requires_grad_() for _ in "qkv"]


def assert_gradients(out, expected, inputs, tolerance):
    upstream = torch.randn_like(expected)
    actual_grads = torch.autograd.grad(out, inputs, upstream.to(out.dtype))
    for actual, wanted in zip(actual_grads, torch.autograd.grad(expected, inputs, upstream), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=tolerance)


@each_implementation
@pytest.mark.parametrize("radius", [1, 7, 127])
@pytest.mark.parametrize("n", [1, 7, 64, 100])
def test_equals_dense_attention_with_band_mask(radius, n, implementation, dtype, tolerance):
    q, k, v = tensors(2, 2, n, 8, dtype)
    out = local_attention(q, k, v, radius=radius, implementation=implementation)
    assert out.dtype == dtype
    expected = dense_local_attention(q, k, v, radius, torch.ones(2, n, dtype=torch.bool))
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)
    assert_gradients(out, expected, (q, k, v), tolerance)


@each_implementation
@pytest.mark.parametrize("n", [20, 61, 100])
def test_mask(n, implementation, dtype, tolerance):
    q, k, v = tensors(2, 2, n, 8, dtype)
    # an eighth of the keys is masked, and never a whole neighbourhood
    mask = torch.arange(n).remainder(8) != 3
    mask = torch.stack((mask, torch.ones_like(mask)))
    out = local_attention(q, k, v, radius=5, mask=mask, implementation=implementation)
    expected = dense_local_attention(q, k, v, 5, mask)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)
    assert_gradients(out, expected, (q, k, v), tolerance)


@each_implementation
@pytest.mark.parametrize(("radius", "n", "masked"), [(1, 5, False), (6, 50, True), (33, 70, False), (127, 40, True)])
def test_relative_bias(radius, n, masked, implementation, dtype, tolerance):
    q, k, v = tensors(2, 2, n, 8, dtype)
    bias = torch.randn(2, 2 * radius + 1, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()
    mask = torch.arange(n) < torch.tensor([[n], [n - 1]]) if masked else torch.ones(2, n, dtype=torch.bool)
    arguments = {"radius": radius, "mask": mask if masked else None, "bias": bias}
    if implementation == "windows":
        with pytest.raises(ValueError, match="bias"):
            local_attention(q, k, v, **arguments, implementation=implementation)
        return
    out = local_attention(q, k, v, **arguments, implementation=implementation)
    expected = dense_local_attention(q, k, v, radius, mask, bias)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)
    # a distance's gradient is a sum over all positions
    assert_gradients(out, expected, (q, k, v, bias), 10 * tolerance)


def test_kernels_in_16_bits():
    """In float16: Triton's interpreter multiplies no bfloat16, which is tried on the GPU."""
    q, k, v = tensors(2, 2, 100, 8, torch.float16)
    bias = torch.randn(2, 15, generator=torch.Generator().manual_seed(1)).requires_grad_()
    mask = torch.arange(100) < torch.tensor([[100], [97]])
    out = local_attention(q, k, v, radius=7, mask=mask, bias=bias, implementation="triton")
    expected = dense_local_attention(q, k, v, 7, mask, bias)
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-3)
    upstream = torch.randn_like(out)
    actual_grads = torch.autograd.grad(out, (q, k, v, bias), upstream)
    for actual, wanted in zip(
        actual_grads, torch.autograd.grad(expected, (q, k, v, bias), upstream.double()), strict=True
    ):
        scale = max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-3 * scale)


@each_implementation
def test_masked_keys_do_not_move_valid_positions_by_one_bit(implementation, dtype, tolerance):
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
def test_wholly_masked_sample_is_finite_forward_and_backward(implementation, dtype, tolerance):
    q, k, v = tensors(2, 1, 30, 4, torch.float32)
    mask = torch.zeros(2, 30, dtype=torch.bool)
    mask[0] = True
    out = local_attention(q, k, v, radius=4, mask=mask, implementation=implementation)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(t.isfinite().all() for t in (out, *grads))


@each_implementation
def test_reaches_exactly_the_radius(implementation, dtype, tolerance):
    q, k, v = tensors(1, 1, 280, 4, dtype)
    (grad,) = torch.autograd.grad(
        local_attention(q, k, v, radius=127, implementation=implementation)[0, 0, 140].sum(), v
    )
    reached = grad[0, 0].abs().sum(-1).nonzero().flatten()
    assert reached.tolist() == list(range(140 - 127, 140 + 127 + 1))


@each_implementation
@pytest.mark.parametrize("dim", [5, 24])
def test_heads_of_any_dimension_and_any_strides(implementation, dtype, tolerance, dim):
    """Projections lie as (b, n, heads, dim); of another tensor the numbers of a position are not side by side."""
    q, k, v = (x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in tensors(2, 2, 50, dim, dtype))
    v = v.transpose(2, 3).contiguous().transpose(2, 3)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = local_attention(q, k, v, radius=9, implementation=implementation)
    expected = dense_local_attention(q, k, v, 9, torch.ones(2, 50, dtype=torch.bool))
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)
    assert_gradients(out, expected, (q, k, v), tolerance)


def test_unread_memory_of_the_kernels_is_never_part_of_a_result():
    """Every number beyond the sequence is NaN in memory."""
    whole = torch.full((2, 2, 130, 8), float("nan"))
    parts = [whole.clone() for _ in "qkv"]
    for part, x in zip(parts, tensors(2, 2, 100, 8, torch.float32), strict=True):
        part[:, :, :100] = x.detach()
    q, k, v = (part[:, :, :100].requires_grad_() for part in parts)
    out = local_attention(q, k, v, radius=20, implementation="triton")
    grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert all(t.isfinite().all() for t in (out, *grads))


def test_registered_operators_keep_the_contract_of_torch():
    """Fake implementations, strides of results and gradients included, and the way to autograd."""
    q, k, v = tensors(1, 2, 20, 8, torch.float32)
    mask, bias = torch.arange(20)[None] < 15, torch.randn(2, 13, requires_grad=True)
    torch.library.opcheck(torch.ops.colt5dist.local_attention.default, (q, k, v, mask, bias, 6))
    window_bias = torch.randn(2, 6, 18, requires_grad=True)
    for given, causal in ((window_bias, False), (None, True)):
        torch.library.opcheck(torch.ops.colt5dist.local_attention_of_package.default, (q, k, v, mask, given, 6, causal))


def test_gradients_of_compiled_code():
    """Compiled by inductor, not traced alone: overlapping views (`unfold`) would come out wrong there, only there."""
    q, k, v = tensors(2, 2, 50, 8, torch.float32)
    bias = torch.randn(2, 13, generator=torch.Generator().manual_seed(1)).requires_grad_()
    mask = torch.arange(50) < torch.tensor([[50], [43]])

    def all_forms(q, k, v, bias):
        return torch.stack(
            [
                local_attention(q, k, v, radius=6, mask=mask, bias=bias, implementation="reference"),
                local_attention(q, k, v, radius=6, mask=mask, implementation="windows"),
                local_attention(q, k, v, radius=6, mask=mask, causal=True, implementation="reference"),
                local_attention(q, k, v, radius=6, mask=mask, causal=True, implementation="windows"),
            ]
        )

    torch._dynamo.reset()
    out, expected = torch.compile(all_forms, fullgraph=True)(q, k, v, bias), all_forms(q, k, v, bias)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    assert_gradients(out, expected, (q, k, v, bias), 1e-4)


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


def test_what_an_implementation_cannot_take_is_refused():
    x = torch.zeros(1, 1, 8, 4)
    with pytest.raises(ValueError, match="bias"):
        local_attention(x, x, x, radius=2, bias=torch.zeros(1, 4))
    with pytest.raises(ValueError, match="float64"):
        local_attention(*[x.double()] * 3, radius=2, implementation="triton")
    with pytest.raises(ValueError, match="one type"):
        local_attention(x, x, x.double(), radius=2)
    wide = torch.zeros(1, 1, 8, 300)
    with pytest.raises(ValueError, match="300"):
        local_attention(wide, wide, wide, radius=2, implementation="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["triton", "windows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    ("n", "dim", "radius"), [(1000, 64, 127), (1024, 64, 64), (777, 128, 127), (300, 40, 5), (65, 256, 127)]
)
def test_on_the_gpu(implementation, dtype, masked, biased, n, dim, radius):
    """The kernels to 1e-5 in float32 and 1e-3 in float16 of the largest value, beside the rounding of the result;
    the windows, which add up 16-bit gradients where they overlap, to 2e-2.

    In bfloat16 one rounding alone is 2 ** -9 of a number: there the error as a whole is held to twice that, and to no
    more than the package's own in bfloat16.
    """
    if implementation == "windows" and biased:
        pytest.skip("takes no bias")
    inputs = [t.detach().cuda().to(dtype).requires_grad_() for t in tensors(2, 4, n, dim)]
    mask = torch.arange(n, device="cuda")[None] < torch.tensor([[n], [n * 3 // 5]], device="cuda") if masked else None
    valid = torch.ones(2, n, dtype=torch.bool, device="cuda") if mask is None else mask
    bias = None
    if biased:
        bias = torch.randn(4, 2 * radius + 1, device="cuda").requires_grad_()
        inputs.append(bias)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    arguments = {"radius": radius, "mask": mask}
    out = local_attention(*inputs[:3], **arguments, bias=bias, implementation=implementation)
    out = out * valid[:, None, :, None]
    expected = local_attention(*wide[:3], **arguments, bias=wide[3] if biased else None, implementation="reference")
    expected = expected * valid[:, None, :, None]
    upstream = torch.randn_like(out)
    pairs = [(out, expected)]
    pairs += zip(
        torch.autograd.grad(out, inputs, upstream),
        torch.autograd.grad(expected, wide, upstream.double()),
        strict=True,
    )
    if dtype == torch.bfloat16 and implementation == "triton":
        narrow = local_attention(*inputs[:3], **arguments, bias=bias, implementation="reference")
        narrow = narrow * valid[:, None, :, None]
        packages = [narrow, *torch.autograd.grad(narrow, inputs, upstream)]
        for (actual, wanted), package in zip(pairs, packages, strict=True):
            error, packages_error = (float((x.double() - wanted).norm() / wanted.norm()) for x in (actual, package))
            assert error <= 2**-8 and error <= packages_error, (error, packages_error)
        return
    closeness = 1e-5 if dtype == torch.float32 else 1e-3 if implementation == "triton" else 2e-2
    for actual, wanted in pairs:
        limit = closeness * max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(actual.double(), wanted, rtol=torch.finfo(actual.dtype).eps, atol=limit)


@pytest.mark.gpu
def test_gradients_on_the_gpu_are_the_same_bits_each_time():
    inputs = [t.detach().cuda().bfloat16().requires_grad_() for t in tensors(2, 4, 1000, 64)]
    inputs.append(torch.randn(4, 255, device="cuda").requires_grad_())
    upstream = torch.randn(2, 4, 1000, 64, device="cuda", dtype=torch.bfloat16)

    def gradients():
        return torch.autograd.grad(
            local_attention(*inputs[:3], radius=127, bias=inputs[3], implementation="triton"), inputs, upstream
        )

    first = gradients()
    for _ in range(3):
        assert all(torch.equal(here, there) for here, there in zip(first, gradients(), strict=True))

"""Attention to valid keys only: the form without a mask against the one with it, forward and every gradient."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from colt5dist.ops.masked_attention import masked_attention
from colt5dist.ops.masked_attention.centred_keys import obstacle_to_centred_keys


def dense_attention(q, k, v, mask):
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~mask.unsqueeze(2), float("-inf"))
    return scores.softmax(dim=-1).nan_to_num(0.0) @ v


def compare(shapes, mask, *, shift=0.0, scale=1.0, dtype=torch.float64, device="cpu", rtol=1e-11):
    generator = torch.Generator().manual_seed(shapes[0][2])
    exact = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (*shapes, shapes[1])]
    exact = [exact[0] * scale, exact[1] * scale + shift, exact[2]]
    inputs = [x.to(device, dtype).requires_grad_() for x in exact]
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    mask = mask.to(device)
    results = []
    for function, tensors in ((masked_attention, inputs), (dense_attention, doubles)):
        arguments = {"implementation": "centred_keys"} if function is masked_attention else {}
        out = function(*tensors, mask, **arguments)
        upstream = torch.sin(torch.arange(out.numel(), device=device, dtype=torch.float64)).view(out.shape)
        results.append((out, *torch.autograd.grad(out, tensors, upstream.to(out.dtype))))
    for name, got, expected in zip(("out", "q", "k", "v"), *results, strict=True):
        assert bool(got.isfinite().all()), name
        error = float((got.detach().double() - expected).norm() / expected.norm().clamp(min=1e-30))
        assert error < rtol, (name, error)
    return results[0]


def padded(lengths, j):
    return (torch.arange(j) < torch.tensor(lengths).unsqueeze(-1)).unsqueeze(1)


@pytest.mark.parametrize("shift", [0.0, 30.0, -30.0])
@pytest.mark.parametrize("heads", [1, 3])
def test_equals_attention_with_a_mask(heads, shift):
    """Also where all scores are far below that of a masked key, or far above it."""
    mask = padded([50, 31, 1], 50)
    out, of_q, of_k, of_v = compare([(3, heads, 37, 8), (3, heads, 50, 8)], mask, shift=shift)
    assert out.shape == of_q.shape == (3, heads, 37, 8)
    for gradient in (of_k, of_v):
        assert not gradient.masked_select(~mask.unsqueeze(-1)).any()


def test_peaked_scores():
    compare([(2, 2, 20, 8), (2, 2, 300, 8)], padded([290, 40], 300), scale=4.0)


def test_every_head_may_have_its_own_mask():
    mask = torch.rand(2, 3, 40, generator=torch.Generator().manual_seed(0)) < 0.6
    compare([(2, 3, 9, 8), (2, 3, 40, 8)], mask)


def test_without_a_valid_key_all_is_zero():
    results = compare([(2, 1, 5, 8), (2, 1, 12, 8)], padded([12, 0], 12))
    assert not any(x[1].any() for x in results)


@pytest.mark.parametrize("num_valid", [1, 8, 600])
def test_few_valid_keys_of_many_in_float32(num_valid):
    """Rounding grows with the masked keys for each valid one, and no further."""
    compare([(2, 1, 9, 8), (2, 1, 4096, 8)], padded([4096, num_valid], 4096), dtype=torch.float32, rtol=2e-3)


def test_is_one_graph_when_compiled():
    """With the outputs and gradients of the same code run eagerly."""
    mask = padded([40, 25], 40)
    torch._dynamo.reset()
    compiled = torch.compile(masked_attention, backend="aot_eager", fullgraph=True)
    q, k, v = (torch.randn(2, 2, n, 8, dtype=torch.float64, requires_grad=True) for n in (7, 40, 40))
    results = []
    for function in (compiled, masked_attention):
        out = function(q, k, v, mask, implementation="centred_keys")
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shapes", "lengths"),
    [
        ([(2, 1, 2730, 64), (2, 1, 4096, 64)], [4096, 3300]),
        ([(2, 8, 512, 64), (2, 8, 1024, 64)], [1024, 700]),
        ([(2, 2, 100, 128), (2, 2, 333, 128)], [333, 0]),
        ([(2, 1, 128, 64), (2, 1, 16_384, 64)], [16_384, 4]),
    ],
)
@pytest.mark.parametrize("shift", [0.0, -2.0])
def test_fused_kernels_of_a_gpu(shapes, lengths, shift):
    mask = padded(lengths, shapes[1][2])
    compare(shapes, mask, shift=shift, dtype=torch.bfloat16, device="cuda", rtol=2e-2)


@pytest.mark.gpu
def test_one_query_has_the_kernels_with_a_mask():
    q, k = (torch.randn(2, 2, n, 64, device="cuda", dtype=torch.bfloat16) for n in (1, 50))
    mask = padded([50, 20], 50).cuda()
    expected = masked_attention(q, k, k, mask, implementation="reference")
    assert torch.equal(masked_attention(q, k, k, mask), expected)


@pytest.mark.gpu
def test_other_kernels_of_a_gpu(monkeypatch):
    """FlashAttention's, which serve older GPUs."""
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False)
    compare([(2, 4, 200, 64), (2, 4, 333, 64)], padded([333, 150], 333), dtype=torch.float16, device="cuda", rtol=2e-2)


def test_the_choice_of_kernels_can_be_compiled(monkeypatch):
    """For tensors on a GPU, which need not be there; what cannot be traced would leave all layers uncompiled."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with FakeTensorMode():
        q = torch.empty(2, 4, 50, 64, device="cuda", dtype=torch.bfloat16)
        choose = torch.compile(lambda q: (obstacle_to_centred_keys(q, q), q.mT), backend="eager", fullgraph=True)
        assert choose(q)[0] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 1, 5, 4)}, "q, k, v"),
        ({"mask": torch.ones(2, 5, dtype=torch.bool)}, "mask"),
        ({"mask": torch.ones(2, 1, 5)}, "mask"),
        ({"implementation": "fast"}, "implementation"),
        ({"q": torch.zeros(2, 1, 0, 8), "implementation": "centred_keys"}, "no empty tensors"),
        ({**{name: torch.zeros(2, 1, 5, 8).bfloat16() for name in "qkv"}, "implementation": "centred_keys"}, "float32"),
        ({"mask": torch.ones(2, 1, 5, 5, dtype=torch.bool), "implementation": "centred_keys"}, "query by query"),
    ],
)
def test_wrong_arguments(change, message):
    tensors = {name: torch.zeros(2, 1, 5, 8) for name in "qkv"}
    arguments = {**tensors, "mask": torch.ones(2, 1, 5, dtype=torch.bool), **change}
    with pytest.raises(ValueError, match=message):
        masked_attention(**arguments)

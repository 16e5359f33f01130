"""Dropout's masks: those of the reference to the bit, of the right share, and a function of key, place and position."""

import pytest
import torch

from colt5dist.ops.dropout import drop_elements, kept_elements
from colt5dist.ops.dropout.reference import kept_elements_reference

KEYS = torch.tensor([0, 1, -1, 2**31, 2**62 + 5])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("implementation", ["int32", "triton"])
@pytest.mark.parametrize(("rate", "place"), [(0.1, 0), (0.5, 3), (0.999, 1), (2.0**-20, 2)])
@pytest.mark.parametrize(("num_tokens", "num_features"), [(19, 33), (2, 700)])
def test_is_the_reference_bit_for_bit(device, implementation, rate, place, num_tokens, num_features):
    sizes = (num_tokens, num_features)
    kept = kept_elements(KEYS.to(device), *sizes, rate=rate, place=place, implementation=implementation)
    assert torch.equal(kept.cpu(), kept_elements_reference(KEYS, *sizes, rate=rate, place=place))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_share_is_right_in_every_direction(rate):
    dropped = (~kept_elements(torch.arange(16), 256, 256, rate=rate, place=0)).double()
    deviation = (rate * (1 - rate)) ** 0.5
    assert abs(dropped.mean() - rate) < 5 * deviation / dropped.numel() ** 0.5
    for dims in ((1, 2), (0, 2), (0, 1)):  # by sample, by token, by feature
        means = dropped.mean(dim=dims)
        assert (means - rate).abs().max() < 5.5 * deviation * (len(means) / dropped.numel()) ** 0.5


def test_neighbours_are_uncorrelated():
    kept = kept_elements(torch.arange(16), 256, 256, rate=0.5, place=0)
    other_place = kept_elements(torch.arange(16), 256, 256, rate=0.5, place=1)
    pairs = [(kept[1:], kept[:-1]), (kept[:, 1:], kept[:, :-1]), (kept[..., 1:], kept[..., :-1]), (kept, other_place)]
    for here, there in pairs:
        assert abs((here == there).double().mean() - 0.5) < 5 * 0.5 / here.numel() ** 0.5


def test_a_mask_depends_on_neither_the_batch_nor_the_lengths():
    whole = kept_elements(torch.arange(8), 40, 64, rate=0.3, place=2)
    assert torch.equal(kept_elements(torch.arange(8)[5:6], 30, 64, rate=0.3, place=2), whole[5:6, :30])
    assert torch.equal(kept_elements(torch.arange(8), 40, 16, rate=0.3, place=2), whole[..., :16])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_stays_is_scaled_and_so_is_its_gradient(dtype):
    x = torch.randn(3, 17, 32, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    out = drop_elements(x, torch.arange(3), rate=0.25, place=0)
    kept = kept_elements(torch.arange(3), 17, 32, rate=0.25, place=0)
    assert out.dtype == dtype
    torch.testing.assert_close(out, torch.where(kept, x / 0.75, torch.zeros_like(x)))
    out.sum().backward()
    torch.testing.assert_close(x.grad, kept.to(dtype) / 0.75)


@pytest.mark.gpu
def test_compiled_it_drops_the_same_elements():
    """To the compiler the mask is one operation."""
    keys = torch.tensor([3, -5, 2**40], device="cuda")
    x = torch.randn(3, 300, 520, device="cuda")
    compiled = torch.compile(drop_elements, fullgraph=True, dynamic=False)
    for place in (0, 7):
        expected = drop_elements(x, keys, rate=0.1, place=place)
        torch.testing.assert_close(compiled(x, keys, rate=0.1, place=place), expected, rtol=1e-6, atol=0)

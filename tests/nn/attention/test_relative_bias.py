"""T5's relative bias: which distances share a number, and that light attention adds it to the scores."""

import pytest
import torch

from colt5dist.nn import ConditionalRoutedAttention
from colt5dist.nn.attention.local import LocalSelfAttention
from colt5dist.nn.attention.relative_bias import RelativeBias
from colt5dist.nn.attention.rotary import RotaryEmbedding

# distance -> bucket of T5 with 32 buckets and a largest distance of 128
BUCKETS = {
    0: 0,
    1: 1,
    7: 7,
    8: 8,
    11: 8,
    12: 9,
    16: 10,
    23: 11,
    31: 11,
    32: 12,
    64: 14,
    90: 14,
    91: 15,
    127: 15,
    300: 15,
}


def test_distances_share_numbers_as_in_t5():
    module = RelativeBias(2, radius=300)
    with torch.no_grad():
        module.weight.copy_(torch.arange(32.0)[:, None] + torch.tensor([0.0, 100.0]))
    bias = module()
    assert bias.shape == (2, 601)
    for distance, bucket in BUCKETS.items():
        assert bias[0, 300 - distance] == bucket and bias[1, 300 - distance] == 100 + bucket
        if distance:
            assert bias[0, 300 + distance] == 16 + bucket
    bias.sum().backward()
    assert torch.equal(module.weight.grad.sum(0), torch.full((2,), 601.0))
    # no distance to a later key is 0: that number is never read
    unread = module.weight.grad[:, 0] == 0
    assert unread.nonzero().flatten().tolist() == [16]


@pytest.mark.parametrize("settings", [{"num_buckets": 6}, {"num_buckets": 2}, {"max_distance": 8}])
def test_refuses_buckets_that_cannot_be(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        RelativeBias(2, radius=4, **settings)


@pytest.mark.parametrize("rotary", [False, True])
def test_light_attention_adds_it_to_the_scores(rotary):
    torch.manual_seed(0)
    radius, n, heads, dim_head = 9, 40, 2, 4
    module = LocalSelfAttention(8, dim_head=dim_head, heads=heads, radius=radius, relative_bias=True).double()
    with torch.no_grad():
        module.relative_bias.weight.mul_(50)
    x = torch.randn(2, n, 8, dtype=torch.float64)
    mask = torch.arange(n) < torch.tensor([[n], [n - 7]])
    angles = RotaryEmbedding(dim_head)(n, dtype=torch.float64) if rotary else None
    out = module(x, mask=mask, rotary_angles=angles)
    q, k, v = module.to_qkv(module.norm(x)).view(2, n, 3, heads, dim_head).permute(2, 0, 3, 1, 4)
    if rotary:
        q, k = (t * angles.cos() + torch.cat((-t[..., 2:], t[..., :2]), -1) * angles.sin() for t in (q, k))
    offset = torch.arange(n) - torch.arange(n)[:, None]
    bias = module.relative_bias()[:, (offset + radius).clamp(0, 2 * radius)]
    seen = (offset.abs() <= radius) & mask[:, None, None]
    weights = (q @ k.transpose(-1, -2) / dim_head**0.5 + bias).masked_fill(~seen, float("-inf")).softmax(-1)
    expected = module.to_out((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    inputs = (x.requires_grad_(), *module.parameters())
    out = module(x, mask=mask, rotary_angles=angles)
    assert all(grad.count_nonzero() > 0 for grad in torch.autograd.grad(out.square().sum(), inputs[1:]))


def test_conditional_attention_has_it_in_the_light_branch():
    module = ConditionalRoutedAttention(8, num_heavy_tokens_q=2, num_heavy_tokens_kv=2, light_relative_bias=True)
    module(torch.randn(2, 16, 8)).square().sum().backward()
    assert module.light_attn.relative_bias.weight.grad.count_nonzero() > 0

"""Attention layers against attention written out; against colt5-attention: test_parity_parts.py."""

import pytest
import torch
from colt5_attention import transformer_block as reference

from colt5dist.nn.attention.attend import attend
from colt5dist.nn.attention.attention import Attention
from colt5dist.nn.attention.multi_query import MultiQueryAttention
from colt5dist.nn.attention.rotary import RotaryEmbedding, apply_rotary
from colt5dist.nn.attention.self_attention import SelfAttention

DIM, HEADS, HEAD_DIM = 16, 4, 8


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_attend_with_masked_keys_and_wholly_masked_samples(dtype):
    q, k, v = (random(3, 2, n, 8, seed=n, dtype=dtype).requires_grad_() for n in (5, 7, 7))
    mask = torch.arange(7)[None] < torch.tensor([[7], [4], [0]])
    out = attend(q, k, v, mask=mask)
    weights = (q[:2] @ k[:2].transpose(-1, -2) / 8**0.5).masked_fill(~mask[:2, None, None], float("-inf")).softmax(-1)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(out[:2], weights @ v[:2], rtol=0, atol=tolerance)
    assert torch.equal(out[2], torch.zeros_like(out[2]))
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(grad.isfinite().all() and grad[2].count_nonzero() == 0 for grad in grads)
    assert all(grad[0].count_nonzero() > 0 for grad in grads[1:])


def test_attend_refuses_a_mask_with_causal():
    x = random(1, 1, 3, 4)
    with pytest.raises(ValueError, match="causal"):
        attend(x, x, x, mask=torch.ones(1, 3, dtype=torch.bool), causal=True)


def test_rotary_embedding_is_that_of_colt5_attention_and_relative():
    torch.testing.assert_close(RotaryEmbedding(HEAD_DIM)(20), reference.RotaryEmbedding(HEAD_DIM)(20))
    angles = RotaryEmbedding(HEAD_DIM)(20, dtype=torch.float64)
    x = random(2, 3, 20, HEAD_DIM)
    torch.testing.assert_close(apply_rotary(x, angles), reference.apply_rotary_pos_emb(angles, x), rtol=0, atol=1e-14)
    q, k = (apply_rotary(random(1, HEAD_DIM, seed=s).expand(20, -1), angles) for s in (1, 2))
    products = q @ k.t()
    torch.testing.assert_close(products[3, 1], products[17, 15])
    with pytest.raises(ValueError, match="even"):
        RotaryEmbedding(7)


def test_causal_self_attention_sees_nothing_later():
    module, x = SelfAttention(DIM, HEAD_DIM, HEADS, prenorm=True, causal=True).double(), random(1, 12, DIM)
    angles = RotaryEmbedding(HEAD_DIM)(12, dtype=torch.float64)
    changed = x.clone()
    changed[:, 7:] += 1.0
    assert torch.equal(module(x, rotary_angles=angles)[:, :7], module(changed, rotary_angles=angles)[:, :7])
    shifted = module(x[:, :3], rotary_angles=angles[:3])
    torch.testing.assert_close(shifted, module(x[:, :3], rotary_angles=angles[5:8]))
    assert not torch.allclose(shifted, module(x[:, :3], rotary_angles=angles[:1].expand(3, -1)))


def test_heavy_attention_refuses_heads_that_routes_cannot_share():
    with pytest.raises(ValueError, match="heads"):
        Attention(DIM, HEAD_DIM, 3)(random(1, 2, DIM).float(), random(1, 2, 4, DIM).float())


@pytest.mark.parametrize("masked", [False, True])
def test_multi_query_attention_is_attention_with_one_repeated_key_value_head(masked):
    module = MultiQueryAttention(DIM, dim_head=HEAD_DIM, heads=HEADS, norm_eps=1e-6).double()
    x, context = random(3, 5, DIM), random(3, 7, DIM, seed=1)
    mask = torch.arange(7)[None] < torch.tensor([[7], [3], [0]]) if masked else None
    out = module(x, context, mask=mask)
    q = module.to_q(module.norm(x)).view(3, 5, HEADS, HEAD_DIM).transpose(1, 2)
    k, v = (part[:, None].expand(-1, HEADS, -1, -1) for part in module.to_kv(context).chunk(2, dim=-1))
    expected = module.to_out(attend(q, k, v, mask=mask).transpose(1, 2).reshape(3, 5, -1))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    if masked:
        assert out[2].count_nonzero() == 0

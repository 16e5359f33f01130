"""Conditional attention against a loop over tokens; against colt5-attention: test_parity.py."""

import math

import pytest
import torch

from colt5dist.nn import ConditionalRoutedAttention
from colt5dist.ops.soft_topk import soft_topk

B, N, D, M_Q, M_KV = 3, 20, 12, 4, 8
HEAD_DIM, LIGHT_HEADS, HEAVY_HEADS, RADIUS = 6, 1, 2, 3


def paper_layer(routing="learned"):
    torch.manual_seed(0)
    return ConditionalRoutedAttention(
        D,
        num_heavy_tokens_q=M_Q,
        num_heavy_tokens_kv=M_KV,
        light_dim_head=HEAD_DIM,
        light_heads=LIGHT_HEADS,
        light_radius=RADIUS,
        light_rotary_emb=True,
        heavy_dim_head=HEAD_DIM,
        heavy_heads=HEAVY_HEADS,
        router_straight_through=False,
        router_kwargs={
            "eps": 1.0,
            "eps_init": None,
            "eps_decay": 1.0,
            "n_iters": 50,
            "routing": routing,
            "std": D**-0.5,
        },
        multiply_keys_by_score=True,
        use_null_q_tokens=False,
        use_null_kv=False,
        rotary_emb=True,
        shared_norm=True,
        norm_eps=1e-6,
    ).double()


def tokens():
    return torch.randn(B, N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def padding_mask(*lengths):
    return torch.arange(N)[None] < torch.tensor(lengths)[:, None]


def rotate(vector, position):
    """One head's vector turned by its position; halves are paired."""
    half = HEAD_DIM // 2
    turned = [None] * HEAD_DIM
    for i in range(half):
        # the angles' frequencies are float32 numbers, as in colt5-attention
        frequency = (1.0 / 10000 ** (torch.tensor(2.0 * i) / HEAD_DIM)).double().item()
        cosine, sine = math.cos(position * frequency), math.sin(position * frequency)
        turned[i] = vector[i] * cosine - vector[half + i] * sine
        turned[half + i] = vector[half + i] * cosine + vector[i] * sine
    return torch.stack(turned)


def attended(query, position, keys, values, positions):
    """Softmax attention of one query of one head, over a list of keys."""
    if not positions:
        return torch.zeros(HEAD_DIM, dtype=torch.float64)
    turned = rotate(query, position)
    products = torch.stack([turned @ rotate(k, p) for k, p in zip(keys, positions, strict=True)])
    return (products / HEAD_DIM**0.5).softmax(-1) @ torch.stack(values)


def naive(layer, x, mask):
    """CoLT5's equation, token by token and head by head: the kv score on the heavy input, the q score on its output."""
    x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.norm.gamma
    raw_q, raw_kv = (x @ vector for vector in layer.router.routing_tokens.weight)
    kwargs = {"mask": mask, "eps": 1.0, "n_iters": 50, "implementation": "reference"}
    soft_q = soft_topk(raw_q, M_Q * 9 / 8, **kwargs)
    soft_kv = soft_topk(raw_kv, M_KV * 9 / 8, **kwargs)
    rows = []
    for b in range(B):
        valid = [i for i in range(N) if mask is None or mask[b, i]]
        routed_q = sorted(valid, key=lambda i: -raw_q[b, i].item())[:M_Q]
        routed_kv = sorted(valid, key=lambda i: -raw_kv[b, i].item())[:M_KV]
        row = []
        for i in range(N):
            qkv = x[b] @ layer.light_attn.to_qkv.weight.t()
            q, k, v = qkv.view(N, 3, LIGHT_HEADS, HEAD_DIM).unbind(1)
            near = [j for j in valid if abs(i - j) <= RADIUS]
            heads = [
                attended(q[i, h], i, [k[j, h] for j in near], [v[j, h] for j in near], near) for h in range(LIGHT_HEADS)
            ]
            token = layer.light_attn.to_out.weight @ torch.cat(heads)
            if i in routed_q:
                heavy = layer.heavy_attn
                q = (heavy.to_q.weight @ x[b, i]).view(HEAVY_HEADS, HEAD_DIM)
                context = [soft_kv[b, j] * x[b, j] for j in routed_kv]
                kv = [(heavy.to_kv.weight @ token_kv).view(HEAVY_HEADS, 2, HEAD_DIM) for token_kv in context]
                heads = [
                    attended(q[h], i, [pair[h, 0] for pair in kv], [pair[h, 1] for pair in kv], routed_kv)
                    for h in range(HEAVY_HEADS)
                ]
                token = token + soft_q[b, i] * (heavy.to_out.weight @ torch.cat(heads))
            row.append(token)
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("mask", [None, padding_mask(N, 9, 2)], ids=["full", "short"])
def test_equals_a_loop_over_tokens(mask):
    layer, x = paper_layer(), tokens().requires_grad_()
    valid = torch.ones(B, N, dtype=torch.bool) if mask is None else mask
    out, expected = layer(x, mask=mask)[valid], naive(layer, x, mask)[valid]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    upstream = torch.randn_like(out)
    inputs = (x, *layer.parameters())
    actual = torch.autograd.grad(out, inputs, upstream)
    wanted = torch.autograd.grad(expected, inputs, upstream)
    for name, a, w in zip(["x", *dict(layer.named_parameters())], actual, wanted, strict=True):
        torch.testing.assert_close(a, w, rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("routing", ["learned", "static", "random"])
def test_masked_picks_contribute_exactly_nothing(routing):
    layer, x, mask = paper_layer(routing), tokens(), padding_mask(2, 0, N)
    out, query, key_value = layer(x, mask=mask, sample_index=torch.arange(B), return_route=True)
    for route in (query, key_value):
        assert (~mask[:2].gather(-1, route.indices[:2, 0])).any(dim=-1).all(), "nothing is tested"
    light = layer.light_attn(layer.norm(x), mask=mask, rotary_angles=layer.light_rotary_emb(N, dtype=torch.float64))
    assert torch.equal(out[:2][~mask[:2]], light[:2][~mask[:2]])
    other = torch.where(mask.unsqueeze(-1), x, 5 * x + 1)
    assert torch.equal(layer(other, mask=mask, sample_index=torch.arange(B))[mask], out[mask])


@pytest.mark.parametrize("routing", ["learned", "static", "random"])
@pytest.mark.parametrize("budgets", [(None, None), (N, N), (M_Q, N), (1, 1)])
def test_every_parameter_has_a_gradient(routing, budgets):
    layer = paper_layer(routing)
    out = layer(
        tokens(),
        num_heavy_tokens_q=budgets[0],
        num_heavy_tokens_kv=budgets[1],
        mask=padding_mask(N, 3, 0),
        sample_index=torch.arange(B),
    )
    out.square().sum().backward()
    assert [name for name, p in layer.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert layer.heavy_attn.to_kv.weight.grad.abs().sum() > 0


def test_refuses_heads_that_routed_sets_cannot_share():
    with pytest.raises(ValueError, match="num_routed_kv"):
        ConditionalRoutedAttention(D, num_heavy_tokens_q=4, num_heavy_tokens_kv=4, num_routed_kv=3, heavy_heads=8)


@pytest.mark.parametrize(("name", "value"), [("light_window_size", 1), ("light_radius", 0)])
def test_refuses_a_light_branch_that_reaches_nobody(name, value):
    with pytest.raises(ValueError, match=f"^{name}: "):
        ConditionalRoutedAttention(D, num_heavy_tokens_q=4, num_heavy_tokens_kv=4, **{name: value})
    ConditionalRoutedAttention(D, num_heavy_tokens_q=4, num_heavy_tokens_kv=4, has_light_attn=False, **{name: value})

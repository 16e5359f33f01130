"""Conditional feed-forward against a loop over tokens; against colt5-attention: test_parity.py."""

import pytest
import torch
import torch.nn.functional as F

from colt5dist.nn import ConditionalRoutedFeedForward
from colt5dist.ops.soft_topk import soft_topk

B, N, D, M = 3, 20, 12, 5
PAPER = {
    "light_hidden_dim": 10,
    "heavy_hidden_dim": 40,
    "gated": True,
    "bias": False,
    "shared_norm": True,
    "norm_eps": 1e-6,
    "router_straight_through": False,
}


def paper_layer(routing="learned"):
    torch.manual_seed(0)
    router = {"eps": 1.0, "eps_init": None, "eps_decay": 1.0, "n_iters": 50, "routing": routing, "std": D**-0.5}
    return ConditionalRoutedFeedForward(D, num_heavy_tokens=M, router_kwargs=router, **PAPER).double()


def tokens():
    return torch.randn(B, N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def padding_mask(*lengths):
    return torch.arange(N)[None] < torch.tensor(lengths)[:, None]


def branch(module, token):
    gate, value = (module.to_hidden.weight @ token).chunk(2)
    return module.to_out.weight @ (F.gelu(gate, approximate="tanh") * value)


def naive(layer, x, mask):
    """Token by token, each routing decision written out."""
    normalised = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.norm.gamma
    raw = normalised @ layer.router.routing_tokens.weight[0]
    soft = soft_topk(raw, M * 9 / 8, mask=mask, eps=1.0, n_iters=50, implementation="reference")
    rows = []
    for sample in range(B):
        valid = [i for i in range(N) if mask is None or mask[sample, i]]
        routed = sorted(valid, key=lambda i: -raw[sample, i].item())[:M]
        row = []
        for i in range(N):
            token = branch(layer.light_ff, normalised[sample, i])
            if i in routed:
                token = token + soft[sample, i] * branch(layer.heavy_ff, normalised[sample, i])
            row.append(token)
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("mask", [None, padding_mask(N, 9, 2), padding_mask(1, 0, N)], ids=["full", "short", "empty"])
def test_equals_a_loop_over_tokens(mask):
    layer, x = paper_layer(), tokens().requires_grad_()
    out, expected = layer(x, mask), naive(layer, x, mask)
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
    index = torch.arange(B)
    out, route = layer(x, mask, sample_index=index, return_route=True)
    light = layer.light_ff(layer.norm(x))
    positions = route.indices[:2, 0]
    assert (~mask[:2].gather(-1, positions)).any(dim=-1).all(), "budget within the valid tokens: nothing is tested"
    assert torch.equal(out[:2][~mask[:2]], light[:2][~mask[:2]])
    assert not torch.equal(out[2], light[2])


@pytest.mark.parametrize("routing", ["learned", "static", "random"])
@pytest.mark.parametrize("budget", [None, N, 1])
def test_every_parameter_has_a_gradient(routing, budget):
    layer = paper_layer(routing)
    layer(tokens(), padding_mask(N, 3, 0), budget, sample_index=torch.arange(B)).square().sum().backward()
    assert [name for name, p in layer.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    heavy = layer.heavy_ff.to_out.weight.grad
    assert heavy.abs().sum() > 0

"""Conditional feed-forward against a loop over tokens, and against the peer's."""

import pytest
import torch
import torch.nn.functional as F
from colt5_attention import ConditionalRoutedFeedForward as PeerFeedForward

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


def copy_from_peer(ours, theirs):
    names = {"router.routing_tokens.weight": "router.routing_token"}
    for name in ("light_ff", "heavy_ff"):
        names[f"{name}.norm.gamma"] = f"{name}.0.gamma"
        for here, there in (("to_hidden", 1), ("to_out", 3)):
            names |= {f"{name}.{here}.{part}": f"{name}.{there}.{part}" for part in ("weight", "bias")}
    state = theirs.state_dict()
    ours.load_state_dict({here: state[there] for here, there in names.items()})
    return {name: dict(theirs.named_parameters())[there] for name, there in names.items()}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("n", [N, M])
def test_equals_the_peer(masked, straight_through, n):
    torch.manual_seed(0)
    settings = {
        "num_heavy_tokens": M,
        "router_straight_through": straight_through,
        "router_kwargs": {"eps": 1.0, "eps_init": None, "n_iters": 50},
    }
    ours, theirs = ConditionalRoutedFeedForward(D, **settings).double(), PeerFeedForward(D, **settings).double()
    # moderate scores: where more than the budget saturate, the peer's choice among them is arbitrary
    theirs.router.routing_token.data.mul_(D**-0.5)
    parameters = copy_from_peer(ours, theirs)
    x = tokens()[:, :n].requires_grad_()
    mask = padding_mask(N, 15, 8)[:, :n] if masked else None
    out, expected = ours(x, mask), theirs(x, mask)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    upstream = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, x, upstream, retain_graph=True)
    (peer_grad,) = torch.autograd.grad(expected, x, upstream, retain_graph=True)
    torch.testing.assert_close(grad, peer_grad, rtol=0, atol=1e-9)
    out.backward(upstream)
    expected.backward(upstream)
    for name, parameter in ours.named_parameters():
        peer_grad = parameters[name].grad
        wanted = torch.zeros_like(parameter) if peer_grad is None else peer_grad
        torch.testing.assert_close(parameter.grad, wanted, rtol=0, atol=1e-9)

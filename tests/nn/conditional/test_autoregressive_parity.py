"""The autoregressive layer with routing="window" equals the one of colt5-attention; where it differs, how."""

import colt5_attention as reference
import pytest
import torch

from colt5dist.nn import ConditionalRoutedAutoregressiveAttention as Layer

B, N, D, WINDOW = 2, 24, 8, 8
SETTINGS = {"light_dim_head": 4, "light_heads": 2, "light_window_size": 8, "heavy_dim_head": 4, "heavy_heads": 2}
# tokens routed as queries of a window, and as keys/values of all earlier windows
BUDGETS = {"routed": (3, 5), "q routed": (3, N), "kv routed": (WINDOW, 5), "unrouted": (WINDOW, N)}
OPTIONS = (
    "router_straight_through",
    "multiply_keys_by_score",
    "multiply_queries_by_score",
    "use_null_q_tokens",
    "rotary_emb",
)
OFF = dict.fromkeys(OPTIONS, False)
ONE_AND_ALL = [OFF, *(OFF | {name: True} for name in OPTIONS), dict.fromkeys(OPTIONS, True)]


def option_id(options):
    return "+".join(name for name, value in options.items() if value) or "none"


def tokens(batch=B, n=N):
    return torch.randn(batch, n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def build(budgets, precision, options, **settings):
    torch.manual_seed(0)
    fields = SETTINGS | options | {"num_heavy_tokens_q": budgets[0], "num_heavy_tokens_kv": budgets[1]} | settings
    fields |= {"router_kwargs": {"eps": precision.eps, "n_iters": 8 if precision.eps == 1 else 20}}
    return Layer(D, routing="window", **fields), reference.ConditionalRoutedAutoregressiveAttention(D, **fields)


@pytest.mark.parametrize("budgets", BUDGETS.values(), ids=BUDGETS.keys())
@pytest.mark.parametrize("options", ONE_AND_ALL, ids=option_id)
def test_equals_colt5_attention(assert_parity, precision, options, budgets):
    ours, theirs = build(budgets, precision, options)
    assert_parity(ours, theirs, lambda module, x: module(x), [tokens()], precision)


@pytest.mark.parametrize("n", [9, 21])
@pytest.mark.parametrize("options", ONE_AND_ALL, ids=option_id)
def test_a_last_window_that_is_not_full(assert_parity, precision, options, n):
    ours, theirs = build(BUDGETS["routed"], precision, options, heavy_window_size=6)
    assert_parity(ours, theirs, lambda module, x: module(x), [tokens(n=n)], precision)


@pytest.mark.parametrize("options", ONE_AND_ALL, ids=option_id)
def test_several_sets_of_keys_and_values(assert_parity, precision, options):
    # to several rows of a batch colt5-attention gives the first rows' tokens: one sample, two windows
    ours, theirs = build(BUDGETS["routed"], precision, options, num_routed_kv=2)
    assert_parity(ours, theirs, lambda module, x: module(x), [tokens(1, 2 * WINDOW)], precision)


def test_a_sequence_of_less_than_a_window_has_local_attention_only(precision):
    ours, theirs = build(BUDGETS["routed"], precision, OFF)
    ours, theirs, x = ours.double(), theirs.double(), tokens(n=5)
    with pytest.raises(Exception):  # noqa: B017 (whatever colt5-attention happens to raise)
        theirs(x)
    assert torch.equal(ours(x), ours.light_attn(x))


def test_colt5_attention_and_window_routing_are_not_causal(precision):
    ours, theirs = build(BUDGETS["routed"], precision, OFF)
    x = tokens().to(precision.dtype)
    changed = x.clone()
    changed[:, -1] += 10 * torch.randn(B, D, generator=torch.Generator().manual_seed(5)).to(x)
    for layer in (ours, theirs):
        layer = layer.to(precision.dtype)
        moved = (layer(x)[:, :-1] - layer(changed)[:, :-1]).abs().amax(dim=(0, 2))
        assert moved[: 2 * WINDOW].max() == 0
        assert moved[2 * WINDOW :].max() > 1e-3


@pytest.mark.parametrize("random_route", [False, True])
def test_every_parameter_has_a_gradient(precision, random_route):
    ours, _ = build(BUDGETS["routed"], precision, dict.fromkeys(OPTIONS, True))
    for n in (5, 21, N):
        ours.zero_grad()
        ours(tokens(n=n).float(), random_route=random_route).square().sum().backward()
        assert [name for name, p in ours.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []

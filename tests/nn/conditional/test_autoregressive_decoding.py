"""Token by token, from the cache, the causal layers give what they give for the whole sequence."""

from itertools import product

import pytest
import torch

from colt5dist.nn import (
    ConditionalRoutedAutoregressiveAttention,
    ConditionalRoutedAutoregressiveBlock,
    ConditionalRoutedFeedForward,
)
from colt5dist.nn.conditional.autoregressive_decoding import (
    AttentionState,
    BlockState,
    RouterState,
    attention_step,
    block_step,
    feed_forward_step,
    read_block,
)

D, WINDOW, N = 16, 8, 117
ROUTER = {"eps": 1.0, "eps_init": None, "eps_decay": 1.0, "n_iters": 20, "std": 0.25}
SIZES = {"light_dim_head": 4, "light_heads": 2, "light_window_size": 6, "heavy_dim_head": 8, "heavy_heads": 2}


def tokens():
    return torch.randn(2, N, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def decode(step, x, state):
    return torch.cat([step(x[:, i : i + 1], state) for i in range(x.shape[1])], dim=1)


OPTIONS = ("router_straight_through", "multiply_queries_by_score", "multiply_keys_by_score", "use_null_q_tokens")
BUDGETS = [(3, 5, None), (3, 40, 3), (WINDOW, 6, WINDOW)]


@pytest.mark.parametrize("values", list(product([False, True], repeat=len(OPTIONS))))
@pytest.mark.parametrize("budgets", BUDGETS)
def test_attention(values, budgets):
    torch.manual_seed(0)
    layer = ConditionalRoutedAutoregressiveAttention(
        D,
        num_heavy_tokens_q=budgets[0],
        num_heavy_tokens_kv=budgets[1],
        num_admitted_kv=budgets[2],
        num_routed_kv=1 + values[0],
        heavy_window_size=WINDOW,
        router_kwargs=ROUTER,
        rotary_emb=True,
        light_rotary_emb=values[1],
        use_null_kv=values[2],
        shared_norm=values[3],
        **SIZES,
        **dict(zip(OPTIONS, values, strict=True)),
    ).double()
    x = tokens()
    stepped = decode(lambda token, state: attention_step(layer, token, state), x, AttentionState())
    torch.testing.assert_close(stepped, layer(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("budget", [3, WINDOW, 2 * WINDOW])
def test_feed_forward(straight_through, budget):
    torch.manual_seed(0)
    layer = ConditionalRoutedFeedForward(
        D,
        num_heavy_tokens=budget,
        routing="causal",
        window_size=WINDOW,
        router_kwargs=ROUTER,
        router_straight_through=straight_through,
    ).double()
    x = tokens()
    stepped = decode(lambda token, state: feed_forward_step(layer, token, state), x, RouterState())
    torch.testing.assert_close(stepped, layer(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("budgets", [(3, 12, 3), (WINDOW, 40, WINDOW)])
@pytest.mark.parametrize("prompt", [1, 5, WINDOW, 3 * WINDOW, 12 * WINDOW + 3])
def test_a_prompt_is_read_in_one_pass(straight_through, budgets, prompt):
    torch.manual_seed(0)
    block = ConditionalRoutedAutoregressiveBlock(
        D,
        num_heavy_attn_tokens_q=budgets[0],
        num_heavy_attn_tokens_kv=budgets[1],
        num_heavy_ff_tokens=budgets[2],
        num_routed_kv=2,
        heavy_window_size=WINDOW,
        router_straight_through=straight_through,
        router_kwargs=ROUTER,
        attention_kwargs={"rotary_emb": True, "light_rotary_emb": True},
        **SIZES,
    ).double()
    x = tokens()
    read, state = read_block(block, x[:, :prompt])
    stepped = decode(lambda token, state: block_step(block, token, state), x[:, prompt:], state)
    torch.testing.assert_close(torch.cat((read, stepped), dim=1), block(x), rtol=0, atol=1e-10)


def test_what_is_kept_does_not_grow():
    torch.manual_seed(0)
    block = ConditionalRoutedAutoregressiveBlock(
        D, num_heavy_attn_tokens_q=3, num_heavy_attn_tokens_kv=12, num_heavy_ff_tokens=2, router_kwargs=ROUTER, **SIZES
    ).double()
    x, state, sizes = tokens(), BlockState(), []
    for i in range(N):
        block_step(block, x[:, i : i + 1], state)
        router = state.attention.router
        kept = [
            *(state.attention.light or ()),
            *(state.attention.memory or ()),
            *state.attention.window,
            *router.window,
        ]
        sizes.append(sum(t.numel() for t in kept) + (0 if router.past is None else router.past.numel()))
    period = SIZES["light_window_size"]
    assert sizes[-1] == sizes[-1 - period] == sizes[-1 - 4 * period]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attention_step(layer(routing="window"), tokens()[:, :1].float(), AttentionState()), "routing"),
        (lambda: attention_step(layer(random=True), tokens()[:, :1].float(), AttentionState()), "routing"),
        (
            lambda: feed_forward_step(
                ConditionalRoutedFeedForward(D, num_heavy_tokens=2), tokens()[:, :1].float(), RouterState()
            ),
            "routing",
        ),
    ],
)
def test_what_cannot_be_decoded_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def layer(routing="causal", random=False):
    router = ROUTER | ({"routing": "random"} if random else {})
    budgets = {"num_heavy_tokens_q": 2, "num_heavy_tokens_kv": 4}
    return ConditionalRoutedAutoregressiveAttention(D, routing=routing, router_kwargs=router, **budgets, **SIZES)

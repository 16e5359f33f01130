"""The autoregressive layer and the causal feed-forward against loops over tokens; causality to the bit."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from colt5dist.nn import (
    ConditionalRoutedAutoregressiveAttention,
    ConditionalRoutedAutoregressiveBlock,
    ConditionalRoutedFeedForward,
)
from colt5dist.nn.attention.rotary import RotaryEmbedding
from colt5dist.ops.admit import HISTORY
from colt5dist.ops.soft_topk import soft_topk

D, WINDOW = 16, 8
# scores of variance 1: some saturate, most do not
ROUTER = {"eps": 1.0, "eps_init": None, "eps_decay": 1.0, "n_iters": 20, "std": 0.25}
SIZES = {"light_dim_head": 4, "light_heads": 2, "light_window_size": 6, "heavy_dim_head": 8, "heavy_heads": 2}


def attention(**settings):
    torch.manual_seed(0)
    fields = SIZES | {"num_heavy_tokens_q": 3, "num_heavy_tokens_kv": 5, "heavy_window_size": WINDOW}
    router = ROUTER | settings.pop("router_kwargs", {})
    return ConditionalRoutedAutoregressiveAttention(D, **(fields | {"router_kwargs": router} | settings))


def feed_forward(**settings):
    torch.manual_seed(0)
    fields = {"num_heavy_tokens": 3, "routing": "causal", "window_size": WINDOW, "router_kwargs": ROUTER}
    return ConditionalRoutedFeedForward(D, **(fields | settings))


def block(**settings):
    torch.manual_seed(0)
    fields = SIZES | {"num_heavy_attn_tokens_q": 3, "num_heavy_attn_tokens_kv": 5, "num_heavy_ff_tokens": 3}
    fields |= {"heavy_window_size": WINDOW, "router_kwargs": ROUTER}
    return ConditionalRoutedAutoregressiveBlock(D, **(fields | settings))


def tokens(b=2, n=77, dtype=torch.float32, seed=3):
    return torch.randn(b, n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dual(scores, k):
    """a of the soft top-k of the scores (w,) at eps 1: any score that is not clipped tells it."""
    soft = soft_topk(scores, k, eps=1.0, n_iters=20, implementation="reference")
    place = int((soft - 0.5).abs().argmin())
    assert soft[place] < 1
    return soft[place].log() - scores[place]


def admitted(raw, num_tokens, num_places, own_window):
    """{position: score} of one route in one sample, raw scores (n,)."""
    windows = raw.split(WINDOW)
    thresholds = [sorted(w.tolist(), reverse=True)[num_tokens - 1] for w in windows if len(w) == WINDOW]
    duals = [dual(w, min(num_tokens * 9 / 8, WINDOW)) for w in windows if len(w) == WINDOW]
    result = {}
    for number, window in enumerate(windows):
        last = number if own_window else number - 1
        if last < 0 or (own_window and number == len(windows) - 1):
            continue
        past = slice(max(0, last - HISTORY + 1), last + 1)
        threshold = sum(thresholds[past]) / len(thresholds[past])
        a = sum(duals[past]) / len(duals[past])
        places = [i for i, score in enumerate(window.tolist()) if score >= threshold][:num_places]
        result |= {number * WINDOW + i: (window[i] + a).clamp(max=0).exp() for i in places}
    return result


def naive_attention(layer, x, budget_q, budget_kv, kept):
    """Token by token; one sample (n, D)."""
    heavy, outputs = layer.heavy_attn, []
    raw = layer.router.routing_tokens.weight @ x.T
    queries = admitted(raw[0], budget_q, budget_q, False)
    sets = [list(admitted(r, kept, min(2 * kept, budget_kv), True).items()) for r in raw[1:]]
    straight = layer.router.straight_through
    weigh = (lambda y: y + (1 - y).detach()) if straight else (lambda y: y)
    angles = RotaryEmbedding(heavy.null_kv.shape[-1])(len(x), dtype=torch.float64)

    def project(token, weight, head):
        return weight.view(heavy.heads, -1, D)[head] @ F.rms_norm(token, (D,), heavy.norm.gamma, 1e-30)

    def turn(vector, position):
        half = len(vector) // 2
        turned = torch.cat((-vector[half:], vector[:half]))
        return vector * angles[position].cos() + turned * angles[position].sin()

    for position in range(len(x)):
        window = position // WINDOW
        if position not in queries:
            null = layer.null_q_token
            outputs.append(torch.zeros(D, dtype=x.dtype) if window == 0 or null is None else null)
            continue
        score, heads = weigh(queries[position]), []
        for head in range(heavy.heads):
            past = [(j, weigh(y)) for j, y in sets[head * len(sets) // heavy.heads] if j // WINDOW < window]
            keys, values = [heavy.null_kv[0, head]], [heavy.null_kv[1, head]]
            for j, y in past[-budget_kv:]:
                key, value = project(x[j], heavy.to_kv.weight, head).chunk(2)
                keys.append(turn(key * y if heavy.multiply_keys_by_score else key, j))
                values.append(value * y)
            query = project(x[position], heavy.to_q.weight, head)
            query = turn(query * score if layer.multiply_queries_by_score else query, position)
            weights = (torch.stack(keys) @ query / len(query) ** 0.5).softmax(dim=0)
            heads.append(weights @ torch.stack(values))
        outputs.append(heavy.to_out.weight @ torch.cat(heads) * score)
    return torch.stack(outputs)


@pytest.mark.parametrize(
    "settings",
    [
        {"router_straight_through": False},
        {"router_straight_through": True, "multiply_queries_by_score": True},
        {"router_straight_through": False, "num_routed_kv": 2, "use_null_q_tokens": False},
        {"router_straight_through": False, "multiply_keys_by_score": True, "multiply_queries_by_score": True},
        {"router_straight_through": False, "num_admitted_kv": 2, "num_heavy_tokens_kv": 7},
    ],
    ids=lambda settings: "+".join(settings),
)
@pytest.mark.parametrize("n", [17, 77, 80])
def test_equals_a_loop_over_tokens(settings, n):
    layer = attention(rotary_emb=True, **settings).double()
    x = tokens(n=n, dtype=torch.float64).requires_grad_()
    heavy = layer(x) - layer.light_attn(x)
    budget_kv, kept = layer.num_heavy_tokens_kv, layer.num_admitted_kv or 1
    expected = torch.stack([naive_attention(layer, sample, 3, budget_kv, kept) for sample in x])
    torch.testing.assert_close(heavy, expected, rtol=0, atol=1e-10)
    parameters = dict(layer.named_parameters())
    upstream = torch.randn_like(heavy)
    actual = torch.autograd.grad(heavy, (x, *parameters.values()), upstream, allow_unused=True)
    wanted = torch.autograd.grad(expected, (x, *parameters.values()), upstream, allow_unused=True)
    for name, a, w in zip(["x", *parameters], actual, wanted, strict=True):
        if not name.startswith("light_attn"):
            torch.testing.assert_close(a, w, rtol=0, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
    assert parameters and actual[list(parameters).index("router.routing_tokens.weight") + 1].abs().min() > 0


@pytest.mark.parametrize("straight_through", [False, True])
def test_feed_forward_equals_a_loop_over_tokens(straight_through):
    layer, x = feed_forward(router_straight_through=straight_through).double(), tokens(dtype=torch.float64)
    out, expected = layer(x), layer.light_ff(x)
    for sample in range(len(x)):
        scores = admitted(x[sample] @ layer.router.routing_tokens.weight[0], 3, 3, False)
        assert scores and min(scores) >= WINDOW
        for position, score in scores.items():
            weight = 1.0 if straight_through else score
            expected[sample, position] += layer.heavy_ff(x[sample, position]) * weight
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


OPTIONS = list(product([False, True], [False, True]))


@pytest.mark.parametrize(("straight_through", "multiply"), OPTIONS)
def test_no_later_token_moves_an_output_by_one_bit(assert_causal, straight_through, multiply):
    settings = {"router_straight_through": straight_through, "multiply_queries_by_score": multiply}
    assert_causal(block(**settings).eval(), tokens(1, 256), range(1, 256))


@pytest.mark.parametrize("settings", [{"num_routed_kv": 2}, {"num_heavy_attn_tokens_kv": 40}])
@pytest.mark.parametrize(
    "router",
    [
        {"routing": "static"},
        {"solver": "newton"},
        {"eps": 0.03, "eps_init": 4.0, "eps_decay": 0.7},
        {"cosine_sim_routing": True},
        {"implementation": "reference"},
    ],
)
def test_causal_with_other_settings(assert_causal, settings, router):
    layer = block(router_straight_through=False, router_kwargs=ROUTER | router, **settings)
    assert_causal(layer.bfloat16(), tokens(2, 101, torch.bfloat16), range(1, 101, 3))


@pytest.mark.parametrize(("straight_through", "multiply"), OPTIONS)
def test_no_later_token_moves_an_output_of_a_long_sequence(assert_causal, straight_through, multiply):
    settings = {"router_straight_through": straight_through, "multiply_queries_by_score": multiply}
    layer = block(**settings, heavy_window_size=128, light_window_size=128)
    generator = torch.Generator().manual_seed(1)
    assert_causal(layer, tokens(1, 8192), torch.randint(1, 8192, (6,), generator=generator).tolist())


@pytest.mark.parametrize(("straight_through", "multiply"), [(False, True), (True, False)])
def test_compiles_whole_and_once(straight_through, multiply):
    settings = {"router_straight_through": straight_through, "multiply_queries_by_score": multiply}
    layer, x = block(**settings), tokens(1, 128)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=1e-5)
    compiled(x).square().sum().backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(tokens(1, 128, seed=9)).square().sum().backward()


@pytest.mark.slow
def test_compiled_causal(assert_causal):
    layer, x = block(router_straight_through=False, multiply_queries_by_score=True), tokens(1, 128)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=1e-5)
    assert_causal(compiled, x, range(1, 128))


@pytest.mark.parametrize("routing", ["learned", "static", "random"])
@pytest.mark.parametrize("budget", [3, WINDOW])
@pytest.mark.parametrize("n", [1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 77])
def test_every_parameter_has_a_gradient_whatever_the_length(routing, budget, n):
    layer = block(router_kwargs=ROUTER | {"routing": routing}, num_heavy_attn_tokens_q=budget, num_routed_kv=2)
    layer(tokens(n=n), sample_index=torch.arange(2)).square().sum().backward()
    assert [name for name, p in layer.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("n", [3, WINDOW])
def test_the_first_window_has_the_light_branches_only(n):
    layer, ff, x = attention(), feed_forward(), tokens(n=20)
    for length in (n, 20):
        assert torch.equal(layer(x[:, :length])[:, :n], layer.light_attn(x[:, :length])[:, :n])
        assert torch.equal(ff(x[:, :length])[:, :n], ff.light_ff(x[:, :length])[:, :n])


def test_a_budget_of_a_whole_window_takes_every_token():
    layer, x = attention(num_heavy_tokens_q=WINDOW, num_heavy_tokens_kv=400, num_admitted_kv=WINDOW), tokens()
    _, query, key_value = layer(x, return_route=True)
    assert query.indices[:, 0][query.mask[:, 0]].view(2, -1).tolist() == [list(range(WINDOW, 77))] * 2
    assert key_value.indices[0, 0].tolist() == list(range(72)) and key_value.mask.all()
    assert query.scores[query.mask].eq(1).all() and key_value.scores.eq(1).all()


def test_controls_admit_without_regard_to_the_tokens():
    random, x = attention(router_kwargs={"routing": "random"}), tokens()
    index = torch.tensor([4, 9])
    routes = [random(values, sample_index=index, return_route=True)[1:] for values in (x, -x)]
    assert torch.equal(routes[0][0].indices, routes[1][0].indices)
    assert torch.equal(routes[0][1].mask, routes[1][1].mask)
    assert not torch.equal(routes[0][0].indices[0], routes[0][0].indices[1])
    static = attention(router_kwargs={"routing": "static"})(x, return_route=True)[1]
    assert (static.indices[0, 0, :9] % WINDOW).tolist() == [0, 3, 6] * 3 and static.mask[..., :24].all()
    layer = attention()
    torch.manual_seed(1)
    assert not torch.equal(layer(x, random_route=True), layer(x, random_route=True))


def test_soft_scores_tell_what_every_token_would_have_got():
    layer, x = attention(router_straight_through=False), tokens()
    _, query, key_value = layer(x, return_route=True)
    for route, empty in ((query, slice(0, WINDOW)), (key_value, slice(72, 77))):
        assert route.soft_scores.shape == (2, 1, 77) and not route.soft_scores.requires_grad
        assert route.soft_scores[..., empty].eq(0).all()
        at_places = route.soft_scores.gather(-1, route.indices)
        assert torch.equal(at_places[route.mask], route.scores[route.mask])
        assert route.scores[~route.mask].eq(0).all()


def test_bfloat16_autocast_trains_a_step():
    layer = block()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    x, losses = tokens(), []
    for _ in range(8):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = (layer(x) - x.flip(-1)).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: attention(routing="topk"), "routing"),
        (lambda: attention(num_routed_kv=3), "num_routed_kv"),
        (lambda: attention(heavy_window_size=0), "heavy_window_size"),
        (lambda: attention(num_admitted_kv=0), "num_admitted_kv"),
        (lambda: attention(router_kwargs={"learned_routing_tokens": True}), "learned_routing_tokens"),
        (lambda: attention(router_kwargs={"route_block_size": 4}), "route_block_size"),
        (lambda: attention()(tokens(), num_heavy_tokens_q=0), "num_heavy_tokens_q"),
        (lambda: attention(routing="window")(tokens(), return_route=True), "return_route"),
        (lambda: feed_forward(routing="window"), "routing"),
        (lambda: feed_forward()(tokens(), torch.ones(2, 77, dtype=torch.bool)), "mask"),
    ],
)
def test_wrong_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()

"""The router: what it picks and how it weighs it."""

import pytest
import torch

from colt5dist.nn.routing.router import CoordinateDescentRouter
from colt5dist.ops.counter_random import counter_uniform
from colt5dist.ops.soft_topk import soft_topk

B, N, D, M = 3, 24, 8, 6
SETTINGS = {"n_iters": 20, "eps": 1.0, "eps_init": None, "eps_decay": 1.0}


def tokens(n=N, dtype=torch.float64):
    return torch.randn(B, n, D, dtype=dtype, generator=torch.Generator().manual_seed(n))


def router(**kwargs):
    torch.manual_seed(1)
    return CoordinateDescentRouter(D, **(SETTINGS | kwargs)).double()


def padding_mask(*lengths):
    return torch.arange(N)[None] < torch.tensor(lengths)[:, None]


def largest(scores, num, mask=None):
    """Positions of the largest scores by sorting in Python."""
    rows = []
    for row, values in enumerate(scores.tolist()):
        allowed = [True] * len(values) if mask is None else mask[row].tolist()
        order = sorted(range(len(values)), key=lambda i: (not allowed[i], -values[i] if allowed[i] else 0.0, i))
        rows.append(sorted(order[:num]))
    return torch.tensor(rows)


@pytest.mark.parametrize("masked", [False, True])
def test_picks_the_largest_scores_and_weighs_by_the_soft_top_k(masked):
    module, x = router(straight_through=False), tokens()
    mask = padding_mask(N, 15, 3) if masked else None
    indices, scores, routed, routed_mask = module(x, num_tokens=M, mask=mask)
    raw = x @ module.routing_tokens.weight[0]
    assert torch.equal(indices, largest(raw, M, mask))
    soft = soft_topk(raw, M * 9 / 8, mask=mask, eps=1.0, n_iters=20)
    torch.testing.assert_close(scores, soft.gather(-1, indices), rtol=0, atol=1e-12)
    assert torch.equal(routed, torch.stack([x[i][indices[i]] for i in range(B)]))
    if masked:
        assert torch.equal(routed_mask, mask.gather(-1, indices))
        assert scores[2].count_nonzero() == 3 == routed_mask[2].sum()
    else:
        assert routed_mask is None


def test_straight_through_scores_are_one_and_carry_the_soft_gradient():
    hard, soft, x = router(), router(straight_through=False), tokens()
    mask = padding_mask(N, N, 4)
    scores = hard(x, num_tokens=M, mask=mask).scores
    assert torch.equal(scores, mask.gather(-1, hard(x, num_tokens=M, mask=mask).indices).double())
    weights = torch.randn(B, M, dtype=torch.float64)
    (scores * weights).sum().backward()
    (soft(x, num_tokens=M, mask=mask).scores * weights).sum().backward()
    torch.testing.assert_close(hard.routing_tokens.weight.grad, soft.routing_tokens.weight.grad)


@pytest.mark.parametrize("num_tokens", [N, N + 5])
def test_takes_all_of_a_short_sequence(num_tokens):
    module, x, mask = router(), tokens(), padding_mask(N, 5, 0)
    indices, scores, routed, routed_mask = module(x, num_tokens=num_tokens, mask=mask)
    assert indices is None and torch.equal(routed, x) and torch.equal(routed_mask, mask)
    assert torch.equal(scores, torch.ones(B, N, dtype=torch.float64))
    scores.sum().backward()
    assert torch.equal(module.routing_tokens.weight.grad, torch.zeros(1, D, dtype=torch.float64))


def test_several_routes_and_the_kept_dimension():
    module, x, mask = router(num_routing_tokens=2, straight_through=False), tokens(), padding_mask(N, 20, 10)
    indices, scores, routed, routed_mask = module(x, num_tokens=M, mask=mask)
    assert indices.shape == scores.shape == routed_mask.shape == (B, 2, M) and routed.shape == (B, 2, M, D)
    for route in range(2):
        raw = x @ module.routing_tokens.weight[route]
        assert torch.equal(indices[:, route], largest(raw, M, mask))
        soft = soft_topk(raw, M * 9 / 8, mask=mask, eps=1.0, n_iters=20)
        torch.testing.assert_close(scores[:, route], soft.gather(-1, indices[:, route]), rtol=0, atol=1e-12)
        for sample in range(B):
            assert torch.equal(routed[sample, route], x[sample][indices[sample, route]])
    one = router()(x, num_tokens=M, mask=mask, keep_one_route_dim=True)
    assert one.indices.shape == one.scores.shape == (B, 1, M) and one.routed_tokens.shape == (B, 1, M, D)
    unrouted = module(x, num_tokens=N, mask=mask)
    assert unrouted.routed_tokens.shape == (B, 2, N, D) and unrouted.routed_mask.shape == (B, 2, N)


def test_groups_with_their_own_budgets_equal_single_routers():
    joint, x, mask = (
        router(num_routing_tokens=3, route_groups=(1, 2), straight_through=False),
        tokens(),
        padding_mask(N, 9, 0),
    )
    budgets = (M, 2 * M)
    routes = joint.route(x, budgets=budgets, mask=mask)
    for route, budget, rows in zip(routes, budgets, (slice(0, 1), slice(1, 3)), strict=True):
        single = router(num_routing_tokens=rows.stop - rows.start, straight_through=False)
        single.routing_tokens.weight.data.copy_(joint.routing_tokens.weight[rows])
        expected = single(x, num_tokens=budget, mask=mask, keep_one_route_dim=True)
        assert torch.equal(route.indices, expected.indices) and torch.equal(route.mask, expected.routed_mask)
        torch.testing.assert_close(route.scores, expected.scores, rtol=0, atol=1e-12)


def test_group_that_takes_all_beside_one_that_routes():
    joint, x = router(num_routing_tokens=2, route_groups=(1, 1), straight_through=False), tokens()
    query, key_value = joint.route(x, budgets=(M, N))
    assert key_value.indices is None and torch.equal(key_value.scores, torch.ones(B, 1, N, dtype=torch.float64))
    assert torch.equal(query.indices[:, 0], largest(x @ joint.routing_tokens.weight[0], M))
    (query.scores.sum() + key_value.scores.sum()).backward()
    assert joint.routing_tokens.weight.grad[0].abs().sum() > 0 and joint.routing_tokens.weight.grad[1].abs().sum() == 0


def test_cosine_similarity():
    module, x = router(cosine_sim_routing=True, cosine_sim_scale=5, straight_through=False), tokens()
    indices, scores, _, _ = module(x, num_tokens=M)
    vector = module.routing_tokens.weight[0]
    raw = 5 * (x / x.norm(dim=-1, keepdim=True)) @ (vector / vector.norm())
    assert torch.equal(indices, largest(raw, M))
    torch.testing.assert_close(scores, soft_topk(raw, M * 9 / 8, eps=1.0, n_iters=20).gather(-1, indices))


def test_learned_routing_tokens_differ_by_sample():
    module, x = router(learned_routing_tokens=True, straight_through=False), tokens()
    assert not list(module.parameters())
    given = torch.randn(B, D, dtype=torch.float64)
    assert torch.equal(module(x, num_tokens=M, routing_tokens=given).indices, largest((x * given[:, None]).sum(-1), M))
    with pytest.raises(ValueError, match="routing_tokens"):
        module(x, num_tokens=M)


@pytest.mark.parametrize("shape", [(B, D), (B, 3, D), (1, 2, D), (B, 2, D - 1)])
def test_refuses_routing_tokens_that_are_not_one_a_route(shape):
    module = router(learned_routing_tokens=True, num_routing_tokens=2)
    with pytest.raises(ValueError, match=r"^routing_tokens: "):
        module(tokens(), num_tokens=M, routing_tokens=torch.ones(shape, dtype=torch.float64))


def test_blocks_are_routed_evenly_and_the_rest_is_cut():
    module, x = router(route_block_size=7, straight_through=False), tokens()
    mask = padding_mask(N, 12, 2)
    indices, scores, _, _ = module(x, num_tokens=M, mask=mask)
    raw = x @ module.routing_tokens.weight[0]
    # three whole blocks of 7, two tokens from each
    for block in range(3):
        part = slice(7 * block, 7 * block + 7)
        expected = largest(raw[:, part], 2, mask[:, part])
        assert torch.equal(indices[:, 2 * block : 2 * block + 2], expected + 7 * block)
        soft = soft_topk(raw[:, part], 2 * 9 / 8, mask=mask[:, part], eps=1.0, n_iters=20)
        torch.testing.assert_close(scores[:, 2 * block : 2 * block + 2], soft.gather(-1, expected))
    with pytest.raises(ValueError, match="route_block_size"):
        router(route_block_size=30)(x, num_tokens=M)


def test_static_routing_takes_the_first_token_of_equal_blocks():
    module, x, mask = router(routing="static"), tokens(), padding_mask(N, 10, 0)
    indices, scores, _, routed_mask = module(x, num_tokens=M, mask=mask)
    assert not list(module.parameters())
    assert torch.equal(indices, torch.arange(0, N, N // M).expand(B, M))
    assert torch.equal(scores, routed_mask.double()) and torch.equal(routed_mask, mask.gather(-1, indices))


def test_random_routing_is_a_function_of_seed_stream_and_sample():
    x, mask = tokens(), padding_mask(N, 10, 0)
    sample_index = torch.tensor([7, 2**40, -1])

    def picks(stream=3, seed=5, index=sample_index):
        module = router(routing="random", random_stream=stream, random_seed=seed)
        assert not list(module.parameters())
        return module.route(x, budgets=(M,), mask=mask, sample_index=index)[0]

    route = picks()
    expected = largest(counter_uniform(sample_index, N, stream=3, seed=5), M, mask)
    assert torch.equal(route.indices[:, 0], expected)
    assert torch.equal(route.scores[:, 0], mask.gather(-1, expected).double())
    assert torch.equal(
        picks(index=sample_index.flip(0)).indices[2, 0],
        largest(counter_uniform(sample_index[:1], N, stream=3, seed=5), M, mask[2:])[0],
    )
    assert not torch.equal(picks(stream=4).indices[0], route.indices[0])
    assert not torch.equal(picks(seed=6).indices[0], route.indices[0])
    with pytest.raises(ValueError, match="sample_index"):
        picks(index=None)


@pytest.mark.parametrize("masked", [False, True])
def test_noise_is_added_in_training_and_is_a_function_of_the_sample(masked):
    x, mask = tokens(), padding_mask(N, 15, M) if masked else None
    sample_index = torch.tensor([7, 2**40, -1])
    module = router(noise=0.5, random_stream=3, random_seed=5, straight_through=False)

    def route(index=sample_index):
        return module.route(x, budgets=(M,), mask=mask, sample_index=index)[0]

    raw = x @ module.routing_tokens.weight[0]
    uniform = counter_uniform(sample_index, N, stream=3, seed=5)
    noisy = raw + torch.distributions.Normal(0.0, 0.5).icdf(uniform).double()
    found = route()
    assert torch.equal(found.indices[:, 0], largest(noisy, M, mask))
    soft = soft_topk(noisy, M * 9 / 8, mask=mask, eps=1.0, n_iters=20)
    torch.testing.assert_close(found.scores[:, 0], soft.gather(-1, found.indices[:, 0]), rtol=0, atol=1e-6)
    assert not torch.equal(route(sample_index.flip(0)).indices, found.indices)
    found.scores.sum().backward()
    assert module.routing_tokens.weight.grad.abs().min() > 0
    with pytest.raises(ValueError, match="sample_index: needed for noise"):
        route(None)
    module.eval()
    assert torch.equal(route(None).indices[:, 0], largest(raw, M, mask))
    assert torch.equal(
        route().scores,
        router(random_stream=3, straight_through=False)
        .eval()(x, num_tokens=M, mask=mask, keep_one_route_dim=True)
        .scores,
    )


def test_noise_is_normal_and_finite(monkeypatch):
    module, x = router(noise=2.0, num_routing_tokens=2).float(), torch.zeros(4, 50_000, D)
    noise = module._noise(x, torch.arange(4))
    assert noise.std().item() == pytest.approx(2.0, rel=0.01) and abs(noise.mean().item()) < 0.02
    assert abs(torch.corrcoef(noise[0])[0, 1].item()) < 0.03
    ends = torch.tensor([0.0, 1 - 2.0**-24]).expand(4, 1, 2)
    monkeypatch.setattr(module, "_uniform", lambda *_: ends)
    assert module._noise(x, torch.arange(4)).isfinite().all()


def test_random_route_of_a_learned_router():
    module, x, mask = router(), tokens(), padding_mask(N, 10, N)
    torch.manual_seed(0)
    first = module(x, num_tokens=M, mask=mask, random_route=True)
    second = module(x, num_tokens=M, random_route=True)
    assert first.routed_mask.all() and torch.equal(first.scores, torch.ones(B, M, dtype=torch.float64))
    assert not torch.equal(first.indices, second.indices)
    first.scores.sum().backward()
    assert module.routing_tokens.weight.grad.abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_16_bit_tokens_are_summed_in_float32(dtype):
    module, x = CoordinateDescentRouter(D, straight_through=False, **SETTINGS).to(dtype), tokens(dtype=dtype)
    route = module.route(x, budgets=(M,))[0]
    raw = x.float() @ module.routing_tokens.weight[0].float()
    assert torch.equal(route.indices[:, 0], largest(raw, M))
    assert route.scores.dtype == torch.float32
    assert module(x, num_tokens=M).scores.dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same = router().float().route(x.float(), budgets=(M,))[0]
    assert same.scores.dtype == torch.float32


@pytest.mark.gpu
def test_scores_of_16_bit_tokens_on_the_gpu():
    x = torch.randn(2, 1000, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    module = CoordinateDescentRouter(64, num_routing_tokens=2, straight_through=False, **SETTINGS).cuda().bfloat16()
    scores = module.routing_tokens(x)
    wide_x = x.detach().double().requires_grad_()
    wide_weight = module.routing_tokens.weight.detach().double().requires_grad_()
    expected = (wide_x @ wide_weight.t()).transpose(1, 2)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=1e-4)
    upstream = torch.randn_like(scores)
    scores.backward(upstream)
    expected.backward(upstream.double())
    # two products of up to about 10, rounded to 8 bits before and after they are summed
    torch.testing.assert_close(x.grad.double(), wide_x.grad, rtol=0, atol=0.08)
    torch.testing.assert_close(module.routing_tokens.weight.grad.double(), wide_weight.grad, rtol=2e-2, atol=0.5)


@pytest.mark.parametrize(
    ("named", "kwargs"),
    [
        ("fetch_k_ratio", {"fetch_k_ratio": 0.5}),
        ("fetch_k_ratio", {"fetch_k_ratio": float("nan")}),
        ("routing", {"routing": "hash"}),
        ("num_routing_tokens", {"num_routing_tokens": 0}),
        ("noise", {"noise": -0.1}),
        ("noise", {"noise": float("nan")}),
        ("route_groups", {"num_routing_tokens": 2, "route_groups": (1, 2)}),
        ("route_block_size", {"route_block_size": 7, "routing": "static"}),
        ("eps", {"eps": 0.0}),
        ("eps_init", {"eps_init": float("inf")}),
        ("n_iters", {"n_iters": 0}),
        ("implementation", {"solver": "newton", "implementation": "reference"}),
        ("checkpoint_segments", {"triton_checkpoint_segments": 21}),
    ],
)
def test_refuses_settings_that_do_not_fit(named, kwargs):
    with pytest.raises(ValueError, match=f"^{named}: "):
        router(**kwargs)


@pytest.mark.parametrize("routing", ["learned", "static", "random"])
@pytest.mark.parametrize("std", [None, "0.1", True])
def test_std_is_a_number(routing, std):
    with pytest.raises(TypeError, match=r"^std: "):
        router(routing=routing, std=std)


def test_use_triton_stands_before_the_implementation():
    assert router(solver="newton", implementation="reference", use_triton=True).implementation == "triton"


@pytest.mark.parametrize("routing", ["learned", "static", "random"])
@pytest.mark.parametrize(
    ("named", "arguments"),
    [
        ("num_tokens", {"num_tokens": 0}),
        ("num_tokens", {"num_tokens": -1}),
        ("mask", {"mask": torch.ones(B, N - 1, dtype=torch.bool)}),
        ("mask", {"mask": torch.ones(1, N, dtype=torch.bool)}),
        ("mask", {"mask": torch.ones(B, N)}),
        ("routing_tokens", {"routing_tokens": torch.ones(B, D, dtype=torch.float64)}),
    ],
)
@pytest.mark.parametrize("n", [N, M])
def test_refuses_arguments_that_do_not_fit(routing, named, arguments, n):
    with pytest.raises(ValueError, match=f"^{named}: "):
        router(routing=routing)(tokens(n), **({"num_tokens": M} | arguments))


def test_refuses_budgets_that_are_not_one_a_group():
    with pytest.raises(ValueError, match="budgets"):
        router(num_routing_tokens=2, route_groups=(1, 1)).route(tokens(), budgets=(M,))

"""The parts of the layers, the router and topk equal those of colt5-attention."""

import colt5_attention as reference
import pytest
import torch
from colt5_attention import transformer_block as reference_parts

from colt5dist import nn
from colt5dist.ops.topk import topk

B, N, D, M = 2, 16, 8, 5
MASK = torch.arange(N) < torch.tensor([[N], [11]])

# colt5-attention asks for its flash kernels by an old name
pytestmark = pytest.mark.filterwarnings("ignore:.*sdp_kernel.*:FutureWarning")

masked = pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
straight_through = pytest.mark.parametrize("straight_through", [False, True], ids=["soft", "straight through"])


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def build(name, *arguments, **settings):
    torch.manual_seed(0)
    return getattr(nn, name)(*arguments, **settings), getattr(reference_parts, name)(*arguments, **settings)


def test_norm(assert_parity, precision):
    assert_parity(*build("RMSNorm", D), lambda module, x: module(x), [random(B, N, D)], precision)


@pytest.mark.parametrize("mult", [0.5, 4])
def test_feed_forward(assert_parity, precision, mult):
    assert_parity(*build("FeedForward", D, mult), lambda module, x: module(x), [random(B, N, D)], precision)


@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize("use_flash", [False, True])
def test_self_attention(assert_parity, precision, prenorm, use_flash):
    modules = build("SelfAttention", D, 4, 2, use_flash=use_flash, prenorm=prenorm)
    assert_parity(*modules, lambda module, x: module(x), [random(B, N, D)], precision)


@masked
@pytest.mark.parametrize("multiply_keys", [False, True])
@pytest.mark.parametrize("use_flash", [False, True])
@pytest.mark.parametrize("rotary", [False, True], ids=["no positions", "rotary"])
@pytest.mark.parametrize("routes", [None, 1, 2])
def test_attention(assert_parity, precision, masked, multiply_keys, use_flash, rotary, routes):
    """With scores of queries and of keys/values; routes None: of x to itself, without scores."""
    modules = build("Attention", D, 4, 2, multiply_keys_by_score=multiply_keys, use_flash=use_flash)
    rows = (B, N) if routes is None else (B, routes, N)
    # the second half of a head repeats the angles of the first
    angles = [random(*shape, 2, seed=seed).tile(2) for seed, shape in ((1, (B, M)), (2, rows))]
    mask = None if not masked else (MASK if routes is None else MASK[:, None].expand(rows))

    def call(module, x, *others, of_reference=False):
        arguments = {"mask": mask}
        if rotary and routes is None:
            table = angles[1][0].to(x.dtype)
            arguments["rotary_emb"] = (table, table)
        elif rotary:
            of_x, of_context = (table.to(x.dtype) for table in angles)
            if of_reference:
                of_x, of_context = of_x.unsqueeze(1), of_context.unsqueeze(-3)
            arguments["rotary_emb"] = (of_x, of_context)
        if routes is not None:
            context, scores_kv, scores_q = others
            arguments |= {"context": context, "normalized_scores_kv": scores_kv, "normalized_scores_q": scores_q}
        return module(x, **arguments)

    inputs = [random(B, N, D)] if routes is None else [random(B, M, D), random(*rows, D, seed=3)]
    if routes is not None:
        inputs += [random(*rows, seed=4).sigmoid(), random(B, M, seed=5).sigmoid()]
    assert_parity(
        *modules, call, inputs, precision, call_theirs=lambda module, *given: call(module, *given, of_reference=True)
    )


def routed_sum(result):
    """All that a router returns, in the order of the positions, as one tensor."""
    if result.indices is None:
        parts = [result.scores.unsqueeze(-1) * result.routed_tokens]
    else:
        order = result.indices.argsort(dim=-1)
        tokens = result.routed_tokens.take_along_dim(order.unsqueeze(-1), dim=-2)
        positions = result.indices.gather(-1, order).unsqueeze(-1)
        parts = [result.scores.gather(-1, order).unsqueeze(-1) * tokens, positions.to(tokens)]
        if result.routed_mask is not None:
            parts.append(result.routed_mask.gather(-1, order).unsqueeze(-1).to(tokens))
    return torch.cat(parts, dim=-1)


@masked
@straight_through
@pytest.mark.parametrize("budget", [M, N], ids=["routed", "unrouted"])
@pytest.mark.parametrize("routes", [1, 2, 3])
@pytest.mark.parametrize("cosine", [False, True], ids=["product", "cosine"])
@pytest.mark.parametrize("learned", [False, True], ids=["own vectors", "given vectors"])
def test_router(assert_parity, precision, masked, straight_through, budget, routes, cosine, learned):
    # several routes at batch 1: colt5-attention gives every sample the first one's tokens
    batch = B if routes == 1 else 1
    ours, theirs = build(
        "CoordinateDescentRouter",
        D,
        straight_through=straight_through,
        eps=precision.eps,
        num_routing_tokens=routes,
        learned_routing_tokens=learned,
        cosine_sim_routing=cosine,
        cosine_sim_scale=2 * precision.eps,
    )
    arguments = {"num_tokens": budget, "mask": MASK[B - batch :] if masked else None}

    def call(module, x, *vectors):
        vectors = {"routing_tokens": vectors[0]} if vectors else {}
        # times 1: colt5-attention ignores given vectors where nothing is routed
        return routed_sum(module(x, **arguments, **vectors)) + 0.0 * sum(v.sum() for v in vectors.values())

    inputs = [random(batch, N, D)]
    if learned:
        inputs.append(precision.eps * D**-0.5 * random(batch, routes, D, seed=1))
    assert_parity(ours, theirs, call, inputs, precision)


@masked
def test_router_keeps_the_dimension_of_one_route(assert_parity, masked):
    ours, theirs = build("CoordinateDescentRouter", D, eps=1.0)
    arguments = {"num_tokens": M, "mask": MASK[1:] if masked else None, "keep_one_route_dim": True}
    out = assert_parity(ours, theirs, lambda module, x: routed_sum(module(x, **arguments)), [random(1, N, D)])
    assert out.shape[:3] == (1, 1, M)


@masked
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("non_differentiable", [False, True])
@pytest.mark.parametrize("k", [1, 5, N])
@pytest.mark.parametrize(
    "schedule", [{}, {"eps": 0.03, "eps_init": 4.0, "eps_decay": 0.7}, {"n_iters": 50, "eps": 1.0}]
)
def test_topk(masked, fused, non_differentiable, k, schedule):
    """Values in their order, places, soft scores and gates, and the gradient of all three to x."""
    x, reference_x = (random(3, N).mul(0.05).requires_grad_() for _ in range(2))
    mask = None
    if masked and k < N:
        # colt5-attention may pick a masked entry: here the masked ones are among the smallest
        mask = x.detach() > x.detach().quantile(0.4, dim=-1, keepdim=True)
    arguments = {"mask": mask, "fused": fused, "non_differentiable": non_differentiable, **schedule}
    actual, expected = topk(x, k, **arguments), reference.topk(reference_x, k, **arguments)
    assert torch.equal(actual.indices, expected.indices)
    pairs = [(actual.values, expected.values)]
    if non_differentiable:
        assert actual.coor_descent_values is None and actual.gates is None
    else:
        pairs += [(actual.coor_descent_values, expected.coor_descent_values), (actual.gates, expected.gates)]
    for here, there in pairs:
        torch.testing.assert_close(here, there, rtol=0, atol=1e-9)
    weights = [random(3, k, seed=seed) for seed in range(len(pairs))]
    for number, side in enumerate((x, reference_x)):
        sum((w * pair[number]).sum() for w, pair in zip(weights, pairs, strict=True)).backward()
        assert side.grad.count_nonzero() > 0
    torch.testing.assert_close(x.grad, reference_x.grad, rtol=0, atol=1e-9)

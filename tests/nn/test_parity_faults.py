"""Where colt5-attention 0.11.2 fails or is wrong: its fault is shown, and what is done here instead."""

import colt5_attention as reference
import pytest
import torch
from colt5_attention import transformer_block as reference_parts

from colt5dist import nn
from colt5dist.nn.interop import load_colt5_attention
from colt5dist.ops.topk import topk

B, N, D, M = 3, 20, 8, 5


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def build(name, *arguments, **settings):
    """Both packages' modules with the same weights, scores moderate."""
    torch.manual_seed(0)
    ours, theirs = (getattr(package, name)(*arguments, **settings).double() for package in (nn, reference_parts))
    with torch.no_grad():
        for router in theirs.modules():
            if isinstance(router, reference_parts.CoordinateDescentRouter) and router.routing_token is not None:
                router.routing_token.mul_(D**-0.5)
    load_colt5_attention(ours, theirs.state_dict())
    return ours, theirs


def test_several_routes_take_their_own_samples_tokens():
    """colt5-attention gathers from the first samples for every one."""
    ours, theirs = build("CoordinateDescentRouter", D, eps=1.0, num_routing_tokens=2)
    x, mask = random(B, N, D), torch.arange(N) < torch.tensor([[N], [15], [9]])
    actual, expected = ours(x, num_tokens=M, mask=mask), theirs(x, num_tokens=M, mask=mask)
    places = expected.indices.sort(dim=-1)
    assert torch.equal(actual.indices, places.values)
    own = x[:, None].expand(-1, 2, -1, -1).take_along_dim(expected.indices[..., None], dim=2)
    assert not torch.allclose(expected.routed_tokens[1:], own[1:])
    assert torch.equal(actual.routed_tokens, own.take_along_dim(places.indices[..., None], dim=2))
    assert torch.equal(actual.routed_mask, mask[:, None].expand(-1, 2, -1).gather(-1, actual.indices))
    for sample in range(B):
        alone = theirs(x[sample : sample + 1], num_tokens=M, mask=mask[sample : sample + 1])
        order = alone.indices.argsort(dim=-1)
        assert torch.equal(actual.routed_tokens[sample], alone.routed_tokens[0].take_along_dim(order[0, ..., None], 1))


def test_tokens_are_routed_from_every_block():
    """colt5-attention looks in a block for a position of the sequence; block by block it gives what is expected."""
    width = 5
    ours, theirs = build("CoordinateDescentRouter", D, eps=1.0, route_block_size=width, straight_through=False)
    x, num_tokens = random(B, N, D), 8
    with pytest.raises(IndexError):
        theirs(x, num_tokens=num_tokens)
    theirs.route_block_size = None
    actual = ours(x, num_tokens=num_tokens)
    for block in range(N // width):
        expected = theirs(x[:, block * width : (block + 1) * width], num_tokens=2)
        places = expected.indices.sort(dim=-1)
        part = slice(2 * block, 2 * block + 2)
        assert torch.equal(actual.indices[:, part], places.values + block * width)
        scores = expected.scores.gather(-1, places.indices)
        torch.testing.assert_close(actual.scores[:, part], scores, rtol=0, atol=1e-12)
        assert torch.equal(actual.routed_tokens[:, part], x.take_along_dim(actual.indices[:, part, None], dim=1))


def test_blocks_with_given_vectors():
    """colt5-attention fails in the product; with the same vectors of its own a router here gives the same."""
    settings = {"eps": 1.0, "route_block_size": 5, "straight_through": False}
    ours, theirs = build("CoordinateDescentRouter", D, learned_routing_tokens=True, **settings)
    x, vectors = random(B, N, D), D**-0.5 * random(D, seed=1).expand(B, D)
    with pytest.raises(RuntimeError):
        theirs(x, num_tokens=8, routing_tokens=vectors)
    own, _ = build("CoordinateDescentRouter", D, **settings)
    own.routing_tokens.weight.data.copy_(vectors[:1])
    actual, expected = ours(x, num_tokens=8, routing_tokens=vectors), own(x, num_tokens=8)
    assert torch.equal(actual.indices, expected.indices)
    torch.testing.assert_close(actual.scores, expected.scores, rtol=0, atol=1e-12)


def test_random_routing_needs_no_mask():
    ours, theirs = build("CoordinateDescentRouter", D)
    with pytest.raises(TypeError):
        theirs(random(B, N, D), num_tokens=M, random_route=True)
    picks = [ours(random(B, N, D), num_tokens=M, random_route=True).indices for _ in range(2)]
    assert not torch.equal(*picks)


def test_cross_attention_can_be_called():
    ours, theirs = build(
        "ConditionalRoutedCrossAttention", D, num_tokens_q=M, num_tokens_kv=M, router_kwargs={"eps": 1.0}
    )
    x, context = random(B, N, D), random(B, N, D, seed=1)
    with pytest.raises(NameError, match="should_route_queries"):
        theirs(x, context)
    out = ours(x, context)
    query = ours.q_router(x, num_tokens=M)
    placed = torch.zeros(B, N, dtype=torch.bool).scatter(1, query.indices, True)
    assert torch.equal(out[~placed], ours.null_q_token.expand(B, N, D)[~placed])
    assert not torch.isclose(out[placed], ours.null_q_token.expand(B, N, D)[placed]).all(-1).any()


def test_cross_attention_takes_the_number_of_sets_by_either_name():
    """`num_sets_kv` is dead in colt5-attention."""
    settings = {"num_tokens_q": M, "num_tokens_kv": M}
    assert reference.ConditionalRoutedCrossAttention(D, **settings, num_sets_kv=2).kv_router.num_routing_tokens == 1
    for given in ({"num_sets_kv": 2}, {"kv_routing_tokens": 2}, {"num_sets_kv": 2, "kv_routing_tokens": 2}):
        assert nn.ConditionalRoutedCrossAttention(D, **settings, **given).kv_router.num_routing_tokens == 2
    with pytest.raises(ValueError, match="num_sets_kv"):
        nn.ConditionalRoutedCrossAttention(D, **settings, num_sets_kv=2, kv_routing_tokens=4)


def test_cross_attention_routes_the_context_by_blocks():
    settings = {"num_tokens_q": N, "num_tokens_kv": 8, "route_block_size": 5, "router_kwargs": {"eps": 1.0}}
    ours = nn.ConditionalRoutedCrossAttention(D, **settings).double()
    x, context = random(B, N, D), random(B, 23, D, seed=1).requires_grad_()
    (grad,) = torch.autograd.grad(ours(x, context).sum(), context)
    picked = ours.kv_router(context, num_tokens=8).indices
    assert torch.equal(picked // 5, torch.arange(4).repeat_interleave(2).expand(B, 8))
    assert (grad.gather(1, picked[..., None].expand(-1, -1, D)).abs().sum(-1) > 0).all()
    assert grad[:, 20:].count_nonzero() == 0, "what is left over after the last whole block takes no part"


def image_settings(**others):
    heads = {"light_dim_head": 4, "light_heads": 1, "heavy_dim_head": 4, "heavy_heads": 2}
    budgets = {"num_heavy_tokens_q": M, "num_heavy_tokens_kv": M}
    return {**heads, **budgets, "light_window_size": 4, "router_kwargs": {"eps": 1.0}, **others}


def test_images_are_routed_over_the_whole_map():
    """colt5-attention routes within patches, unlike its documentation: other patches never change an output."""
    ours, theirs = build("ConditionalRoutedImageAttention", D, **image_settings())
    x = random(1, 8, 8, D)
    other = x.clone()
    other[:, 4:] = random(1, 4, 8, D, seed=1)
    assert torch.equal(theirs(x)[:, :4], theirs(other)[:, :4])
    assert not torch.allclose(ours(x)[:, :4], ours(other)[:, :4])
    query, _ = ours.router.route(x.flatten(1, 2), budgets=(M, M))
    # M queries in all, not M a patch
    rows = ours(x).flatten(1, 2) - ours.light_attn(x.view(1, 2, 4, 2, 4, D).transpose(2, 3).reshape(4, 16, D)).view(
        1, 2, 2, 4, 4, D
    ).transpose(2, 3).reshape(1, 64, D)
    away = ~torch.isclose(rows, ours.null_q_token.expand_as(rows), atol=1e-9).all(-1)
    assert torch.equal(away[0].nonzero().flatten(), query.indices[0, 0])


def test_images_take_a_mask_of_their_own_shape():
    ours, theirs = build("ConditionalRoutedImageAttention", D, **image_settings())
    x, mask = random(B, 8, 8, D), random(B, 8, 8, seed=2) > -0.5
    with pytest.raises(RuntimeError):
        theirs(x, mask=mask)
    other = torch.where(mask[..., None], x, 9.0 + x)
    assert torch.equal(ours(x, mask=mask)[mask], ours(other, mask=mask)[mask])


@pytest.mark.parametrize("routing", ["map", "patch"])
def test_images_whose_queries_are_not_routed(routing):
    settings = image_settings(num_heavy_tokens_q=64)
    theirs = reference.ConditionalRoutedImageAttention(D, **settings).double()
    x = random(B, 8, 8, D)
    with pytest.raises((TypeError, IndexError, RuntimeError)):
        theirs(x)
    ours = nn.ConditionalRoutedImageAttention(D, routing=routing, **settings).double()
    out = ours(x)
    assert out.shape == x.shape
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in ours.parameters())


@pytest.mark.parametrize(
    ("named", "settings"),
    [
        ("num_routed_kv", {"num_routed_kv": 3}),
        ("routing", {"routing": "image"}),
        ("light_window_size", {"light_window_size": 0}),
    ],
)
def test_image_attention_refuses_settings(named, settings):
    with pytest.raises(ValueError, match=f"^{named}: "):
        nn.ConditionalRoutedImageAttention(D, **image_settings(**settings))


@pytest.mark.parametrize(
    ("named", "x", "mask"),
    [
        ("x", random(2, 16, D), None),
        ("x", random(2, 8, 6, D), None),
        ("mask", random(2, 8, 8, D), torch.ones(2, 64, dtype=torch.bool)),
        ("mask", random(2, 8, 8, D), torch.ones(2, 8, 8)),
    ],
)
def test_image_attention_refuses_inputs(named, x, mask):
    with pytest.raises(ValueError, match=f"^{named}: "):
        nn.ConditionalRoutedImageAttention(D, **image_settings()).double()(x, mask=mask)


def test_local_attention_never_attends_to_its_padding():
    """The package local-attention does where the length is no multiple of its window and no mask is given."""
    settings = {
        "num_heavy_tokens_q": M,
        "num_heavy_tokens_kv": M,
        "light_window_size": 8,
        "router_kwargs": {"eps": 1.0},
    }
    ours, theirs = build("ConditionalRoutedAttention", D, **settings)
    x, everything = random(B, N - 2, D), torch.ones(B, N - 2, dtype=torch.bool)
    assert (ours(x) - theirs(x)).abs().max() > 1e-3
    torch.testing.assert_close(ours(x), theirs(x, mask=everything), rtol=0, atol=1e-9)


def test_of_saturated_scores_the_largest_are_taken():
    """At a low temperature more than num_tokens soft scores are 1; colt5-attention takes any of them."""
    ours, theirs = build("CoordinateDescentRouter", D, eps=0.03, fetch_k_ratio=2)
    x = 4 * random(B, N, D)
    raw = x @ ours.routing_tokens.weight[0]
    actual, expected = ours(x, num_tokens=M).indices, theirs(x, num_tokens=M).indices.sort(dim=-1).values
    assert torch.equal(actual, raw.topk(M).indices.sort(dim=-1).values)
    assert not torch.equal(actual, expected)


def test_topk_picks_no_masked_entry():
    x, mask = torch.tensor([[5.0, 1.0, 4.0, 2.0]]).double(), torch.tensor([[False, True, True, True]])
    assert reference.topk(x, 2, mask=mask).indices.tolist() == [[0, 2]]
    assert topk(x, 2, mask=mask).indices.tolist() == [[2, 3]]

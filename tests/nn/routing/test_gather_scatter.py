"""Gathering routed tokens and putting them back, against loops over positions."""

import pytest
import torch

from colt5dist.nn.routing.gather_scatter import add_routed, gather_positions, gather_tokens

INDICES = torch.tensor([[0, 3, 4], [1, 2, 6]])


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()


def test_gather_tokens():
    x = random(2, 7, 3)
    out = gather_tokens(x, INDICES)
    for sample in range(2):
        assert torch.equal(out[sample], x[sample][INDICES[sample]])
    assert torch.autograd.gradcheck(lambda t: gather_tokens(t, INDICES), x)


def test_gather_tokens_of_several_routes_takes_its_own_sample():
    x = random(2, 7, 3)
    routes = torch.stack((INDICES, INDICES.flip(0)), dim=1)
    out = gather_tokens(x, routes)
    assert out.shape == (2, 2, 3, 3)
    for sample in range(2):
        for route in range(2):
            assert torch.equal(out[sample, route], x[sample][routes[sample, route]])


def test_gather_positions():
    table = torch.arange(14.0).view(7, 2)
    assert torch.equal(gather_positions(table, INDICES[:, None]), table[INDICES[:, None]])


@pytest.mark.parametrize("filled", [False, True])
def test_add_routed(filled):
    base, tokens, fill = random(2, 7, 3), random(2, 3, 3), random(3) if filled else None
    out = add_routed(base, tokens, INDICES, fill)
    expected = base.detach().clone() + (fill.detach() if filled else 0.0)
    for sample in range(2):
        for place, position in enumerate(INDICES[sample].tolist()):
            expected[sample, position] = base[sample, position] + tokens[sample, place]
    assert torch.equal(out, expected)
    inputs = [base, tokens, fill] if filled else [base, tokens]
    assert torch.autograd.gradcheck(lambda b, t, f=None: add_routed(b, t, INDICES, f), inputs)


@pytest.mark.parametrize("routes", [1, 2, 3, 5])
def test_gradients_of_several_routes_that_meet_in_a_token(routes):
    """Every route takes token 2; what comes back to it is summed in the order of the routes."""
    x = random(2, 9, 3)
    generator = torch.Generator().manual_seed(1)
    others = torch.rand(2, routes, 8, generator=generator).argsort(dim=-1)[..., :3]
    others = others + (others >= 2)
    indices = torch.cat((others, torch.full((2, routes, 1), 2)), dim=-1).sort(dim=-1).values
    upstream = random(2, routes, 4, 3).detach()
    (grad,) = torch.autograd.grad(gather_tokens(x, indices), x, upstream)
    expected = torch.zeros(2, 9, 3, dtype=torch.float64)
    for sample in range(2):
        for route in range(routes):
            for place, position in enumerate(indices[sample, route].tolist()):
                expected[sample, position] += upstream[sample, route, place]
    assert torch.equal(grad, expected)


@pytest.mark.gpu
def test_the_same_bits_each_time_on_the_gpu():
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(2, 4096, 64, device="cuda", generator=generator, requires_grad=True)
    indices = torch.rand(2, 4, 4096, device="cuda", generator=generator).argsort(dim=-1)[..., :1024].sort(-1).values
    fill = torch.randn(64, device="cuda", generator=generator, requires_grad=True)
    upstream = torch.randn(2, 4096, 64, device="cuda", generator=generator)

    def result():
        tokens = gather_tokens(x, indices)
        out = add_routed(x, tokens.sum(1).sin(), indices[:, 0], fill)
        return out, *torch.autograd.grad(out, (x, fill), upstream)

    first = result()
    for _ in range(5):
        assert all(torch.equal(here, there) for here, there in zip(first, result(), strict=True))

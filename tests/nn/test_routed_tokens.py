"""Gathering routed tokens and putting them back, against loops over positions."""

import pytest
import torch

from colt5dist.nn.routed_tokens import add_routed, gather_positions, gather_tokens, replace_routed

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


@pytest.mark.parametrize(("function", "keeps"), [(add_routed, True), (replace_routed, False)])
def test_scatter(function, keeps):
    base, tokens = random(2, 7, 3), random(2, 3, 3)
    out = function(base, tokens, INDICES)
    expected = base.detach().clone()
    for sample in range(2):
        for place, position in enumerate(INDICES[sample].tolist()):
            there = expected[sample, position] if keeps else 0.0
            expected[sample, position] = there + tokens[sample, place]
    assert torch.equal(out, expected)
    assert torch.autograd.gradcheck(lambda b, t: function(b, t, INDICES), (base, tokens))

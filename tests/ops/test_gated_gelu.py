"""Gated GELU with its own backward against autograd."""

import torch
import torch.nn.functional as F

from colt5dist.ops.gated_gelu import gated_gelu


def test_equals_autograd():
    hidden = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    gate, value = hidden.chunk(2, dim=-1)
    expected = F.gelu(gate, approximate="tanh") * value
    out = gated_gelu(hidden)
    assert torch.equal(out, expected)
    upstream = torch.randn_like(out)
    (actual,) = torch.autograd.grad(out, hidden, upstream)
    (wanted,) = torch.autograd.grad(expected, hidden, upstream)
    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(gated_gelu, hidden)


def test_keeps_only_its_argument():
    hidden = torch.randn(4, 6, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        gated_gelu(hidden)
    assert kept == [hidden.numel()]

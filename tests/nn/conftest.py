"""Comparison of a layer with that of the package colt5-attention: outputs and every gradient; causality to the bit."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import pytest
import torch
from colt5_attention.transformer_block import CoordinateDescentRouter as ReferenceRouter
from torch import Tensor, nn

from colt5dist.nn.interop import colt5_attention_names, load_colt5_attention


class Precision(NamedTuple):
    """Type of numbers, final temperature of the routers, and how far apart two values may be, absolute and relative."""

    dtype: torch.dtype
    eps: float
    tolerance: float


PRECISIONS = {
    "float64-eps1": Precision(torch.float64, 1.0, 1e-9),
    "float64-eps0.03": Precision(torch.float64, 0.03, 1e-9),
    "float32-eps1": Precision(torch.float32, 1.0, 1e-5),
    "float32-eps0.03": Precision(torch.float32, 0.03, 5e-4),
}


@pytest.fixture(params=PRECISIONS.values(), ids=PRECISIONS.keys())
def precision(request: pytest.FixtureRequest) -> Precision:
    """Each of the precisions at which layers are compared."""
    return request.param


Parity = Callable[..., Tensor]


@pytest.fixture
def assert_parity() -> Parity:
    """See `compare_with_reference`."""
    return compare_with_reference


def compare_with_reference(
    ours: nn.Module,
    theirs: nn.Module,
    call: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    precision: Precision = PRECISIONS["float64-eps1"],
    *,
    call_theirs: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Give our module the weights of theirs, that of colt5-attention, and compare outputs and gradients.

    Compared are `call(module, *inputs)` and its gradients with respect to inputs and parameters; returns our output.

    call_theirs: where colt5-attention is called in another way. The routers' vectors are first made as short as the
    temperature asks for: where more scores than are routed saturate at 1, its choice among them is arbitrary.
    """
    ours, theirs = ours.to(precision.dtype), theirs.to(precision.dtype)
    with torch.no_grad():
        for router in theirs.modules():
            if isinstance(router, ReferenceRouter) and router.routing_token is not None:
                router.routing_token.mul_(precision.eps * router.routing_token.shape[-1] ** -0.5)
    load_colt5_attention(ours, theirs.state_dict())
    here, there = ([x.detach().to(precision.dtype).requires_grad_() for x in inputs] for _ in range(2))
    out, expected = call(ours, *here), (call_theirs or call)(theirs, *there)
    tolerance = {"rtol": precision.tolerance, "atol": precision.tolerance}
    torch.testing.assert_close(out, expected, **tolerance)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
    out.backward(upstream)
    expected.backward(upstream)
    for number, (x, reference_x) in enumerate(zip(here, there, strict=True)):
        torch.testing.assert_close(x.grad, reference_x.grad, **tolerance, msg=lambda m, n=number: f"input {n}: {m}")
    gradients = {name: _gradient(parameter) for name, parameter in theirs.named_parameters()}
    for name, sources in colt5_attention_names(ours).items():
        wanted = torch.cat([gradients[source] for source in sources])
        actual = _gradient(ours.get_parameter(name))
        torch.testing.assert_close(actual, wanted, **tolerance, msg=lambda m, n=name: f"{n}: {m}")
    return out


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


AssertCausal = Callable[[Callable[[Tensor], Tensor], Tensor, Iterable[int]], None]


@pytest.fixture
def assert_causal() -> AssertCausal:
    """See `change_later_tokens`."""
    return change_later_tokens


@torch.no_grad()
def change_later_tokens(layer: Callable[[Tensor], Tensor], x: Tensor, positions: Iterable[int]) -> None:
    """Other tokens from each position on move no output before it by one bit, and some output at it."""
    first = layer(x)
    for position in positions:
        changed = x.clone()
        changed[:, position:] = 3 * torch.randn_like(changed[:, position:])
        second = layer(changed)
        assert torch.equal(first[:, :position], second[:, :position]), position
        assert not torch.equal(first[:, position], second[:, position])

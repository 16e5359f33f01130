"""What the registered soft top-k operators have in common: result types, schemas, fake implementations, autograd.

The operators are defined through `torch.library.Library`, whose call costs the host less than that of `custom_op`.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

_LIBRARY = Library("colt5dist", "FRAGMENT")

SMALLEST_BUDGET = 1e-20
"""A tensor k is raised to this: asking whether it is positive would wait for the device."""


def arithmetic_dtype(scores: Tensor) -> torch.dtype:
    """Type of the elementwise arithmetic and of the result: float64 stays, everything else is computed in float32."""
    return torch.float64 if scores.dtype == torch.float64 else torch.float32


def empty_result(scores: Tensor) -> Tensor:
    """An uninitialised contiguous tensor for the result."""
    return torch.empty(scores.shape, dtype=arithmetic_dtype(scores), device=scores.device)


def budgets(scores: Tensor, k: Tensor | None, budget: float) -> Tensor:
    """One budget a row (...), float64: the tensor k, or where there is none the number `budget`."""
    if k is None:
        return torch.full(scores.shape[:-1], budget, dtype=torch.float64, device=scores.device)
    return k.to(torch.float64).clamp(min=SMALLEST_BUDGET)


def empty_budget_gradient(k: Tensor | None, like: Tensor) -> Tensor:
    """An uninitialised tensor for the gradient to k, float64; without elements where k is a number."""
    return torch.empty(0 if k is None else k.shape, dtype=torch.float64, device=like.device)


def _define(
    name: str, schema: str, forward: Callable, backward: Callable, fakes: tuple[Callable, Callable]
) -> tuple[Callable, Callable]:
    """Register `forward` and `backward` as operators; returns how they are called."""
    forward_schema, backward_schema = schema.split(";")
    operators = []
    for suffix, signature, function, fake in (
        ("forward", forward_schema, forward, fakes[0]),
        ("backward", backward_schema, backward, fakes[1]),
    ):
        _LIBRARY.define(f"{name}_{suffix}{signature.strip()}")
        _LIBRARY.impl(f"{name}_{suffix}", function, "CompositeExplicitAutograd")
        register_fake(f"colt5dist::{name}_{suffix}", fake, lib=_LIBRARY)
        operators.append(getattr(torch.ops.colt5dist, f"{name}_{suffix}").default)
    return operators[0], operators[1]


def _fake_forward(
    scores: Tensor,
    k: Tensor | None,
    mask: Tensor | None,
    budget: float,
    eps: float,
    eps_init: float,
    eps_decay: float,
    n_iters: int,
    segments: int,
) -> tuple[Tensor, Tensor, Tensor]:
    kept = (*scores.shape[:-1], segments)
    kept_a = torch.empty(kept, dtype=torch.float64, device=scores.device)
    return empty_result(scores), kept_a, torch.empty_like(kept_a, dtype=torch.int64)


def _fake_backward(grad: Tensor, scores: Tensor, k: Tensor | None, *_rest: object) -> tuple[Tensor, Tensor]:
    grad_scores = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    return grad_scores, empty_budget_gradient(k, scores)


def define_coordinate_descent(name: str, forward: Callable, backward: Callable) -> Callable:
    """Register a pair of coordinate-descent functions as operators with their gradient; returns the forward operator.

    What lives from the forward to the backward: the arguments by reference, and the kept a-values and clipped counts.
    """
    schema = (
        "(Tensor scores, Tensor? k, Tensor? mask, float budget, float eps, float eps_init, float eps_decay,"
        " int n_iters, int segments) -> (Tensor, Tensor, Tensor);"
        "(Tensor grad, Tensor scores, Tensor? k, Tensor? mask, Tensor kept_a, Tensor kept_clipped, float budget,"
        " float eps, float eps_init, float eps_decay, int n_iters) -> (Tensor, Tensor)"
    )
    forward, backward = _define(name, schema, forward, backward, (_fake_forward, _fake_backward))

    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        scores, k, mask, *ctx.schedule, _segments = inputs
        _, kept_a, kept_clipped = output
        ctx.mark_non_differentiable(kept_a, kept_clipped)
        ctx.save_for_backward(scores, k, mask, kept_a, kept_clipped)

    def gradient(ctx, grad, _grad_kept_a, _grad_kept_clipped):  # type: ignore[no-untyped-def]
        saved = ctx.saved_tensors  # once: activation checkpointing refuses a second look
        grad_scores, grad_k = backward(grad, *saved, *ctx.schedule)
        return grad_scores, None if saved[1] is None else grad_k.to(saved[1].dtype), *(None,) * 7

    register_autograd(f"colt5dist::{name}_forward", gradient, setup_context=setup_context, lib=_LIBRARY)
    return forward


def _fake_newton_forward(
    scores: Tensor, k: Tensor | None, mask: Tensor | None, budget: float, eps: float
) -> tuple[Tensor, Tensor]:
    return empty_result(scores), torch.empty(scores.shape[:-1], dtype=torch.float64, device=scores.device)


def define_newton(name: str, forward: Callable, backward: Callable) -> Callable:
    """Register a pair of Newton functions as operators with their gradient; returns the forward operator. Kept is one
    root a row."""
    schema = (
        "(Tensor scores, Tensor? k, Tensor? mask, float budget, float eps) -> (Tensor, Tensor);"
        "(Tensor grad, Tensor scores, Tensor? k, Tensor? mask, Tensor a, float eps) -> (Tensor, Tensor)"
    )
    forward, backward = _define(name, schema, forward, backward, (_fake_newton_forward, _fake_backward))

    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        scores, k, mask, _budget, ctx.eps = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(scores, k, mask, output[1])

    def gradient(ctx, grad, _grad_a):  # type: ignore[no-untyped-def]
        saved = ctx.saved_tensors
        grad_scores, grad_k = backward(grad, *saved, ctx.eps)
        return grad_scores, None if saved[1] is None else grad_k.to(saved[1].dtype), None, None, None

    register_autograd(f"colt5dist::{name}_forward", gradient, setup_context=setup_context, lib=_LIBRARY)
    return forward

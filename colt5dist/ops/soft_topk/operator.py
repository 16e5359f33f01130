"""What the soft top-k operators have in common: result types, schemas, fake implementations, the way to autograd.

Each is registered with PyTorch, for `torch.compile`, fake tensors and dispatch modes. Where none of these is about, the
registered operator would take the host longer than the GPU, so its functions are called without the dispatcher.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import Function
from torch.library import Library, fallthrough_kernel, register_fake
from torch.utils._python_dispatch import _get_current_dispatch_mode

_LIBRARY = Library("colt5dist", "FRAGMENT")
_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)

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


def budget_gradient(k: Tensor | None, gradient: Tensor) -> Tensor:
    """The gradient to k from the one to `budgets`: 0 where it was raised, no elements where k is a number."""
    return gradient.new_empty(0) if k is None else gradient.masked_fill(k < SMALLEST_BUDGET, 0.0)


def empty_budget_gradient(k: Tensor | None, like: Tensor) -> Tensor:
    """An uninitialised tensor for the gradient to k, float64; without elements where k is a number."""
    return torch.empty(0 if k is None else k.shape, dtype=torch.float64, device=like.device)


class _NoSecondDerivative(Function):
    """Passes a gradient on, and refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *_causes: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise RuntimeError("soft_topk has no second derivative; implementation='reference' has")


def _differentiable(forward: Callable, backward: Callable, num_settings: int) -> Callable:
    """`forward` of (scores, k, mask, *settings) to (result, kept), with its gradient.

    backward: of (grad, scores, k, mask, kept, *the first num_settings settings) to the gradients of scores and k.
    """

    class Differentiable(Function):
        @staticmethod
        def forward(ctx: Any, scores: Tensor, k: Tensor | None, mask: Tensor | None, *settings: Any) -> Any:
            result, kept = forward(scores, k, mask, *settings)
            ctx.save_for_backward(scores, k, mask, kept)
            ctx.settings = settings
            ctx.mark_non_differentiable(kept)
            ctx.set_materialize_grads(False)
            return result, kept

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            grad, none = grads[0], (None,) * len(ctx.settings)
            if grad is None:
                return None, None, None, *none
            saved = ctx.saved_tensors  # once: activation checkpointing refuses a second look
            k = saved[1]
            grad_scores, grad_k = backward(grad, *saved, *ctx.settings[:num_settings])
            if torch.is_grad_enabled():
                grad_scores, grad_k = (_NoSecondDerivative.apply(x, grad, *saved[:2]) for x in (grad_scores, grad_k))
            return grad_scores, None if k is None else grad_k.to(k.dtype), None, *none

    return Differentiable.apply


def _define(
    name: str, schemas: tuple[str, str], functions: tuple[Callable, Callable], fakes: tuple[Callable, Callable]
) -> tuple[Callable, Callable]:
    """Register a forward and its backward as operators; returns how they are called below autograd."""
    operators = []
    for suffix, schema, function, fake in zip(("forward", "backward"), schemas, functions, fakes, strict=True):
        _LIBRARY.define(f"{name}_{suffix}{schema}")
        _LIBRARY.impl(f"{name}_{suffix}", function, "CompositeExplicitAutograd")
        register_fake(f"colt5dist::{name}_{suffix}", fake, lib=_LIBRARY)
        operators.append(getattr(torch.ops.colt5dist, f"{name}_{suffix}").default)
    _LIBRARY.impl(f"{name}_backward", fallthrough_kernel, "Autograd")  # `_NoSecondDerivative` stands there
    return operators[0], operators[1]


def _callable(
    name: str, operators: tuple[Callable, Callable], functions: tuple[Callable, Callable], num_settings: int
) -> Callable:
    """Give the forward operator its gradient; returns how a door calls it."""
    operator = operators[0]

    def below_autograd(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    dispatched = _differentiable(below_autograd, operators[1], num_settings)
    direct = _differentiable(*functions, num_settings)

    def needs_gradient(scores: Tensor, k: Tensor | None) -> bool:
        return torch.is_grad_enabled() and (scores.requires_grad or (k is not None and k.requires_grad))

    def autograd(scores: Tensor, k: Tensor | None, mask: Tensor | None, *settings: Any) -> Any:
        run = dispatched if needs_gradient(scores, k) else below_autograd
        return run(scores, k, mask, *settings)

    _LIBRARY.impl(f"{name}_forward", autograd, "Autograd")

    def call(scores: Tensor, k: Tensor | None, mask: Tensor | None, *settings: Any) -> tuple[Tensor, Tensor]:
        if (
            torch.compiler.is_compiling()
            or type(scores) not in _PLAIN_TENSORS
            or scores.is_meta
            or _get_current_dispatch_mode() is not None
        ):
            return operator(scores, k, mask, *settings)
        return (direct if needs_gradient(scores, k) else functions[0])(scores, k, mask, *settings)

    return call


def _fake_gradients(grad: Tensor, scores: Tensor, k: Tensor | None, *_rest: object) -> tuple[Tensor, Tensor]:
    grad_scores = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    return grad_scores, empty_budget_gradient(k, scores)


def define_coordinate_descent(name: str, forward: Callable, backward: Callable) -> Callable:
    """Register a pair of coordinate-descent functions as operators; returns how the forward is called.

    What lives from the forward to the backward: the arguments by reference, and the kept a-values and clipped counts,
    (..., segments, 2) float64.
    """
    schemas = (
        "(Tensor scores, Tensor? k, Tensor? mask, float budget, float eps, float eps_init, float eps_decay,"
        " int n_iters, int segments) -> (Tensor, Tensor)",
        "(Tensor grad, Tensor scores, Tensor? k, Tensor? mask, Tensor kept, float budget, float eps, float eps_init,"
        " float eps_decay, int n_iters) -> (Tensor, Tensor)",
    )

    def fake(scores: Tensor, k: Tensor | None, mask: Tensor | None, *settings: Any) -> tuple[Tensor, Tensor]:
        kept = torch.empty((*scores.shape[:-1], settings[-1], 2), dtype=torch.float64, device=scores.device)
        return empty_result(scores), kept

    operators = _define(name, schemas, (forward, backward), (fake, _fake_gradients))
    return _callable(name, operators, (forward, backward), num_settings=5)


def define_newton(name: str, forward: Callable, backward: Callable) -> Callable:
    """Register a pair of Newton functions as operators; returns how the forward is called. Kept is one root a row."""
    schemas = (
        "(Tensor scores, Tensor? k, Tensor? mask, float budget, float eps) -> (Tensor, Tensor)",
        "(Tensor grad, Tensor scores, Tensor? k, Tensor? mask, Tensor a, float budget, float eps) -> (Tensor, Tensor)",
    )

    def fake(scores: Tensor, k: Tensor | None, mask: Tensor | None, *settings: Any) -> tuple[Tensor, Tensor]:
        return empty_result(scores), torch.empty(scores.shape[:-1], dtype=torch.float64, device=scores.device)

    operators = _define(name, schemas, (forward, backward), (fake, _fake_gradients))
    return _callable(name, operators, (forward, backward), num_settings=2)

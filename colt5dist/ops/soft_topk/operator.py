"""What the registered soft top-k operators have in common: result types, fake implementations, the way to autograd."""

from collections.abc import Callable

import torch
from torch import Tensor


def arithmetic_dtype(scores: Tensor) -> torch.dtype:
    """Type of the elementwise arithmetic and of the result: float64 stays, everything else is computed in float32."""
    return torch.float64 if scores.dtype == torch.float64 else torch.float32


def empty_result(scores: Tensor) -> Tensor:
    """An uninitialised contiguous tensor for the result."""
    return torch.empty(scores.shape, dtype=arithmetic_dtype(scores), device=scores.device)


def _fake_forward(
    scores: Tensor,
    k: Tensor,
    mask: Tensor | None,
    eps: float,
    eps_init: float,
    eps_decay: float,
    n_iters: int,
    segments: int,
) -> tuple[Tensor, Tensor, Tensor]:
    kept = (*scores.shape[:-1], segments)
    return empty_result(scores), k.new_empty(kept), k.new_empty(kept, dtype=torch.int64)


def _fake_backward(
    grad: Tensor,
    scores: Tensor,
    k: Tensor,
    mask: Tensor | None,
    kept_a: Tensor,
    kept_clipped: Tensor,
    eps: float,
    eps_init: float,
    eps_decay: float,
    n_iters: int,
) -> tuple[Tensor, Tensor]:
    return torch.empty(scores.shape, dtype=scores.dtype, device=scores.device), k.new_empty(k.shape)


def register_coordinate_descent(forward: Callable, backward: Callable) -> None:
    """Give a pair of coordinate-descent operators their fake implementations, and the forward its backward.

    What lives from the forward to the backward: the arguments by reference, and the kept a-values and clipped counts.
    """

    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        scores, k, mask, *ctx.schedule, _segments = inputs
        _, kept_a, kept_clipped = output
        ctx.mark_non_differentiable(kept_a, kept_clipped)
        ctx.save_for_backward(scores, k, mask, kept_a, kept_clipped)

    def gradient(ctx, grad, _grad_kept_a, _grad_kept_clipped):  # type: ignore[no-untyped-def]
        grad_scores, grad_k = backward(grad, *ctx.saved_tensors, *ctx.schedule)
        return grad_scores, grad_k, None, None, None, None, None, None

    forward.register_fake(_fake_forward)  # type: ignore[attr-defined]
    backward.register_fake(_fake_backward)  # type: ignore[attr-defined]
    forward.register_autograd(gradient, setup_context=setup_context)  # type: ignore[attr-defined]


def _fake_newton_forward(scores: Tensor, k: Tensor, mask: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return empty_result(scores), k.new_empty(k.shape)


def _fake_newton_backward(
    grad: Tensor, scores: Tensor, k: Tensor, mask: Tensor | None, a: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return torch.empty(scores.shape, dtype=scores.dtype, device=scores.device), k.new_empty(k.shape)


def register_newton(forward: Callable, backward: Callable) -> None:
    """Give a pair of Newton operators their fake implementations, and the forward its backward; kept is one root a
    row."""

    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        scores, k, mask, ctx.eps = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(scores, k, mask, output[1])

    def gradient(ctx, grad, _grad_a):  # type: ignore[no-untyped-def]
        grad_scores, grad_k = backward(grad, *ctx.saved_tensors, ctx.eps)
        return grad_scores, grad_k, None, None

    forward.register_fake(_fake_newton_forward)  # type: ignore[attr-defined]
    backward.register_fake(_fake_newton_backward)  # type: ignore[attr-defined]
    forward.register_autograd(gradient, setup_context=setup_context)  # type: ignore[attr-defined]

"""A step of AdamW in one pass over memory: clipping, weights, moments, the weights' 16-bit copy, and zeroed gradients.

With the gradient g, step t (from 1), learning rate lr, decay rates b1 and b2, for each element, in float32:

    g      = scale * gradient
    weight = weight - lr * weight_decay * weight
    m      = m + (1 - b1) * (g - m)                      exp_avg
    v      = b2 * v + (1 - b2) * g * g                   exp_avg_sq
    weight = weight - lr / (1 - b1**t) * m / (sqrt(v) / sqrt(1 - b2**t) + eps)
    copy     = weight                                    where there is one, rounded to its type
    gradient = 0                                         where `clear`

These are the formula and the order of torch.optim.AdamW (Loshchilov and Hutter, Decoupled Weight Decay Regularization,
2019, algorithm 2). Each of the four tensors is read once: 34 bytes an element with a 16-bit copy. As separate
operators (scale the gradient, torch's fused AdamW, copy, zero the gradient) it is 46.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from colt5dist.ops.adamw.reference import Scalars, adamw_reference_
from colt5dist.ops.implementation import HAS_TRITON, choose_implementation

if HAS_TRITON:
    from colt5dist.ops.adamw.triton import adamw_triton_

__all__ = ["adamw_"]


@torch.no_grad()
def adamw_(
    weights: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    scale: float = 1.0,
    copy: Tensor | None = None,
    clear: bool = False,
    implementation: str = "auto",
) -> None:
    """Step weights and moments, in place.

    Args:
        weights: (n,) float32, contiguous, as are the next three.
        gradient: (n,); changed only where `clear`, and then to zeros.
        exp_avg: (n,), first moment.
        exp_avg_sq: (n,), second moment.
        step: number of this step, 1 for the first.
        lr: learning rate.
        betas: decay rates of the two moments, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        scale: what the gradient is multiplied by first, as when it is clipped.
        copy: (n,) of a floating type, contiguous, in memory of its own: gets the new weights.
        clear: whether zeros are left in `gradient`.
        implementation: "triton" (CUDA tensors; CPU tensors under TRITON_INTERPRET=1), "reference" (PyTorch), or "auto":
            triton for CUDA tensors.

    Raises:
        ValueError: shapes, types or devices do not fit, or the step is below 1.
    """
    _check(weights, {"weights": weights, "gradient": gradient, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}, copy)
    if not step >= 1:
        raise ValueError(f"step: {step}; use 1 or more")
    scalars = _scalars(step, lr, betas, eps, weight_decay, scale)
    if choose_implementation(implementation, weights, plain="reference") == "triton":
        adamw_triton_(weights, gradient, exp_avg, exp_avg_sq, copy, scalars, clear=clear)
    else:
        adamw_reference_(weights, gradient, exp_avg, exp_avg_sq, copy, scalars, clear=clear)


def _scalars(step: float, lr: float, betas: Sequence[float], eps: float, weight_decay: float, scale: float) -> Scalars:
    """The factors of a step, in float64 here; an implementation rounds each once, to float32."""
    beta1, beta2 = betas
    return Scalars(
        scale=float(scale),
        decay=float(lr * weight_decay),
        rest1=float(1 - beta1),
        beta2=float(beta2),
        rest2=float(1 - beta2),
        step_size=float(lr / (1 - beta1**step)),
        root_correction=float((1 - beta2**step) ** 0.5),
        eps=float(eps),
    )


def _check(weights: Tensor, tensors: dict[str, Tensor], copy: Tensor | None) -> None:
    """Raise ValueError where the tensors of a step do not fit together."""
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name}: of type {tensor.dtype}; use torch.float32")
    if copy is not None:
        if not copy.is_floating_point():
            raise ValueError(f"copy: of type {copy.dtype}; use a floating type")
        if copy.numel() and copy.data_ptr() == weights.data_ptr():
            raise ValueError("copy: is the weights themselves; leave it out")
        tensors = {**tensors, "copy": copy}
    for name, tensor in tensors.items():
        if tensor.ndim != 1 or tensor.shape != weights.shape:
            raise ValueError(f"{name}: of shape {tuple(tensor.shape)}; use one dimension, as long as weights")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: not contiguous")
        if tensor.device != weights.device:
            raise ValueError(f"{name}: on {tensor.device}, weights on {weights.device}; use one device")

"""The backward pass of RMSNorm in plain PyTorch."""

from torch import Tensor


def rms_norm_gradient_reference(
    x: Tensor, rstd: Tensor, gamma: Tensor, grad_normed: Tensor, grad_input: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of the input and of gamma.

    Args:
        x: (..., dim), the input of the norm.
        rstd: (..., 1) float32, 1 / sqrt(mean square + eps) of each row.
        gamma: (dim,), the scale of each channel.
        grad_normed: (..., dim), the gradient of the normalised output.
        grad_input: (..., dim), a gradient that reaches the input on another way (the residual's), or None.

    Returns:
        The gradients of x (..., dim) and gamma (dim,), in the types of x and gamma.
    """
    grad, unit = grad_normed.float(), x.float() * rstd
    weighted = grad * gamma.float()
    result = rstd * (weighted - unit * (weighted * unit).mean(-1, keepdim=True))
    if grad_input is not None:
        result = result + grad_input.float()
    grad_gamma = (grad * unit).flatten(0, -2).sum(0)
    return result.to(x.dtype), grad_gamma.to(gamma.dtype)

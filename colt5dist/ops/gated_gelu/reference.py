"""The backward pass of the gated GELU in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_gelu_gradient_reference(hidden: Tensor, grad: Tensor) -> Tensor:
    """Gradient of `gelu(gate) * value`, with the tanh form of GELU.

    Args:
        hidden: (..., 2 * n), gate, then value.
        grad: (..., n), gradient of the product.

    Returns:
        (..., 2 * n), of the type of `hidden`.
    """
    gate, value = hidden.chunk(2, dim=-1)
    grad_gate = torch.ops.aten.gelu_backward(grad * value, gate, approximate="tanh")
    return torch.cat((grad_gate, grad * F.gelu(gate, approximate="tanh")), dim=-1)

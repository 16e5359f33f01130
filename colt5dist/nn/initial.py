"""Initial values that do not depend on where a parameter is made."""

import torch
from torch import Tensor


@torch.no_grad()
def normal_(tensor: Tensor, std: float) -> Tensor:
    """Fill `tensor` from a normal distribution with mean 0 and standard deviation `std`, in place.

    The numbers are drawn in float32 on the CPU whatever the tensor's type and device. Within `deepspeed.zero.Init`
    parameters are made in bf16 on the GPU, whose generator is another one: drawn there, the same seed would give a
    ZeRO-3 run other weights than a run at stages 0-2.
    """
    if not tensor.is_meta:
        tensor.copy_(torch.normal(0.0, std, tuple(tensor.shape), device="cpu"))
    return tensor

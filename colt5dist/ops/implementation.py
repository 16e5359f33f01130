"""Which implementation of an operator serves: Triton's or the one in PyTorch."""

import importlib.util

from torch import Tensor

from colt5dist.errors import ConfigError

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    from colt5dist.ops.triton_rows import INTERPRETED
else:
    INTERPRETED = False


def choose_implementation(implementation: str, tensor: Tensor, *, plain: str) -> str:
    """`implementation`, with "auto" resolved: "triton" for CUDA tensors, else `plain`.

    Args:
        implementation: what the caller asks for.
        tensor: a tensor of the call.
        plain: the implementation in PyTorch.

    Raises:
        ConfigError: "triton" cannot serve `tensor`.
    """
    if implementation == "auto":
        return "triton" if tensor.is_cuda and HAS_TRITON else plain
    if implementation == "triton" and not HAS_TRITON:
        raise ConfigError(f"implementation: 'triton' needs the package triton, which is not installed; use '{plain}'")
    if implementation == "triton" and not tensor.is_cuda and not INTERPRETED:
        raise ConfigError(
            f"implementation: 'triton' needs CUDA tensors, the scores are on {tensor.device.type}; use '{plain}', "
            "or set TRITON_INTERPRET=1 before Python starts"
        )
    return implementation

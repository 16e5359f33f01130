"""AdamW in PyTorch, an operator a line of the formula."""

from typing import NamedTuple

from torch import Tensor


class Scalars(NamedTuple):
    """The factors of one step."""

    scale: float
    """Of the gradient."""
    decay: float
    """Learning rate times weight decay."""
    rest1: float
    """1 - beta1."""
    beta2: float
    rest2: float
    """1 - beta2."""
    step_size: float
    """Learning rate over the first moment's bias correction."""
    root_correction: float
    """Square root of the second moment's bias correction."""
    eps: float


def adamw_reference_(
    weights: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copy: Tensor | None,
    scalars: Scalars,
    *,
    clear: bool,
) -> None:
    """As `colt5dist.ops.adamw.adamw_`, given the factors."""
    scaled = gradient * scalars.scale
    weights.sub_(weights, alpha=scalars.decay)
    exp_avg.lerp_(scaled, scalars.rest1)
    exp_avg_sq.mul_(scalars.beta2).addcmul_(scaled, scaled, value=scalars.rest2)
    denominator = (exp_avg_sq.sqrt() / scalars.root_correction).add_(scalars.eps)
    weights.addcdiv_(exp_avg, denominator, value=-scalars.step_size)
    if copy is not None:
        copy.copy_(weights)
    if clear:
        gradient.zero_()

"""The exponential moving average of the float32 weights: each rank averages the part that it holds."""

from collections.abc import Sequence

import torch
from torch import Tensor

ELEMENTS_AT_ONCE = 2**24
"""Elements that `swap` exchanges at once: bounds the memory that it takes."""


class WeightAverage:
    """average <- d * average + (1 - d) * weights, after every applied step.

    d is min(decay, (1 + t) / (10 + t)) at the t-th step of the average, counted from 0, so that the weights it began
    with are soon forgotten (as in TensorFlow's ExponentialMovingAverage with num_updates).

    Args:
        weights: the float32 tensors that this rank's optimizer steps on; they stay where they are.
        decay: the largest d, in (0, 1).
    """

    def __init__(self, weights: Sequence[Tensor], decay: float) -> None:
        self.weights = [weight.detach() for weight in weights]
        self.decay = decay
        self.averages = [torch.empty_like(weight) for weight in self.weights]
        self.num_updates = 0
        self.begin()

    def begin(self) -> None:
        """Begin anew, at the weights as they are now."""
        for average, weight in zip(self.averages, self.weights, strict=True):
            average.copy_(weight)
        self.num_updates = 0

    def update(self) -> None:
        """Take the weights of one more step in."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_(self.averages, self.weights, 1 - decay)
        self.num_updates += 1

    def swap(self) -> None:
        """Exchange weights and averages, to the bit; a second call brings both back."""
        for average, weight in zip(self.averages, self.weights, strict=True):
            pairs = zip(average.view(-1).split(ELEMENTS_AT_ONCE), weight.view(-1).split(ELEMENTS_AT_ONCE), strict=True)
            for one, other in pairs:
                kept = one.clone()
                one.copy_(other)
                other.copy_(kept)

"""Dropout in layers: its masks follow from the seed, the sample's number, the layer, the place and the position."""

from typing import NamedTuple

from torch import Tensor

from colt5dist.nn.checks import check_sample_index
from colt5dist.ops.counter_random import counter_keys
from colt5dist.ops.dropout import drop_elements

STREAM = 0x64726F70
"""Separates the keys of dropout from what random routing draws for the same sample."""


class Dropout(NamedTuple):
    """What a layer needs to drop elements in a training pass; a layer that is given None drops nothing.

    Args:
        keys: (b,) int64, a key for each sample.
        rate: share of the elements that are dropped, in (0, 1).
    """

    keys: Tensor
    rate: float

    def at(self, place: int) -> "Dropout":
        """For a part of the layer: its masks are others than those of another place."""
        return Dropout(counter_keys(self.keys, stream=place), self.rate)

    def parts(self, number: int) -> list["Dropout"]:
        """One for each of so many parts, for instance the layers of a model."""
        return [self.at(part) for part in range(number)]


def dropout_of(rate: float, sample_index: Tensor | None, x: Tensor, *, seed: int, training: bool) -> Dropout | None:
    """The dropout of a model's pass; None in evaluation, or where the rate is 0.

    Args:
        rate: share of the elements that are dropped, in [0, 1).
        sample_index: (b,) int64, the samples' numbers in the run.
        x: (b, ...), the samples.
        seed: of the run.
        training: whether the model is in training mode.

    Raises:
        ValueError: sample_index is missing, or does not fit x.
    """
    if not (training and rate):
        return None
    if sample_index is None:
        raise ValueError(
            "sample_index: needed for dropout, which is a function of the sample's number; give it, or call eval()"
        )
    check_sample_index(sample_index, x)
    return Dropout(counter_keys(sample_index, stream=STREAM, seed=seed), rate)


def drop(x: Tensor, dropout: Dropout | None, place: int) -> Tensor:
    """x (b, n, d) with elements dropped, or x itself where dropout is None.

    Args:
        x: (b, n, d).
        dropout: of the layer.
        place: number of this place in the layer.
    """
    return x if dropout is None else drop_elements(x, dropout.keys, rate=dropout.rate, place=place)


def parts_of(dropout: Dropout | None, number: int) -> list[Dropout | None]:
    """`Dropout.parts`, or as many times None."""
    return [None] * number if dropout is None else [*dropout.parts(number)]


def at(dropout: Dropout | None, place: int) -> Dropout | None:
    """`Dropout.at`, or None."""
    return None if dropout is None else dropout.at(place)

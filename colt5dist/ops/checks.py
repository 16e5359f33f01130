"""Checks of numbers that a caller gives: comparisons in Python, which read no value of a tensor."""

import math
from numbers import Integral, Real
from typing import Any

import torch


def is_whole_number(value: Any) -> bool:
    """Whether value is an integer, also one of NumPy or of a compiler, and no bool."""
    if type(value) is int:
        return True
    return isinstance(value, (Integral, torch.SymInt)) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether value is a real number, also one of NumPy or of a compiler, and no bool."""
    if type(value) is int or type(value) is float:
        return True
    return isinstance(value, (Real, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)


def not_whole(name: str, value: Any) -> str:
    """Message for an argument that is no whole number."""
    return f"{name}: {_given(value)}; use a whole number"


def not_a_number(name: str, value: Any) -> str:
    """Message for an argument that is no number."""
    return f"{name}: {_given(value)}; use a number"


def _given(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"{value!r} is of type {type(value).__name__}"


def check_counts(*, at_least: int = 1, **values: Any) -> None:
    """Raise where an argument, given by its name, is no whole number or too small.

    Raises:
        TypeError: a value is no whole number.
        ValueError: a value is below at_least.
    """
    for name, value in values.items():
        if not is_whole_number(value):
            raise TypeError(not_whole(name, value))
        if value < at_least:
            raise ValueError(f"{name}: {value}; use {at_least} or more")


def check_whole(**values: Any) -> None:
    """Raise TypeError where an argument, given by its name, is no whole number."""
    for name, value in values.items():
        if not is_whole_number(value):
            raise TypeError(not_whole(name, value))


def check_optional_counts(*, at_least: int = 1, **values: Any) -> None:
    """As `check_counts`, for arguments that may be None."""
    check_counts(at_least=at_least, **{name: value for name, value in values.items() if value is not None})


def check_positive(**values: Any) -> None:
    """Raise where an argument, given by its name, is no finite number above 0.

    Raises:
        TypeError: a value is no number.
        ValueError: a value is 0, negative, infinite or NaN.
    """
    for name, value in values.items():
        if not is_number(value):
            raise TypeError(not_a_number(name, value))
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: {value}; use a number above 0")


def check_not_negative(**values: Any) -> None:
    """Raise where an argument, given by its name, is no finite number of 0 or more.

    Raises:
        TypeError: a value is no number.
        ValueError: a value is negative, infinite or NaN.
    """
    for name, value in values.items():
        if not is_number(value):
            raise TypeError(not_a_number(name, value))
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: {value}; use 0 or more")


def check_optional_not_negative(**values: Any) -> None:
    """As `check_not_negative`, for arguments that may be None."""
    check_not_negative(**{name: value for name, value in values.items() if value is not None})

"""Checks of the tensors and budgets that a layer is given.

They compare shapes, types and devices in Python and read no value of a tensor: they never wait for a device, and leave
no trace in a compiled graph.
"""

from typing import Any

import torch
from torch import Tensor

from colt5dist.ops.checks import check_counts


def check_tensor(name: str, tensor: Any) -> None:
    """Raise TypeError where the argument is no tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: {type(tensor).__name__}; use a tensor")


def check_features(name: str, x: Any, dim: int) -> None:
    """Raise where x is not of floating point and shape (..., dim).

    Raises:
        TypeError: x is no tensor.
        ValueError: its type or its last dimension is wrong.
    """
    check_tensor(name, x)
    if x.dim() == 0 or x.shape[-1] != dim:
        raise ValueError(f"{name}: shape {tuple(x.shape)}; use (..., {dim}), the dim of this layer last")
    if not x.is_floating_point():
        raise ValueError(f"{name}: {x.dtype}; use a floating-point type")


def check_tokens(name: str, x: Any, dim: int) -> None:
    """Raise where x is not of floating point and shape (batch, tokens, dim).

    Raises:
        TypeError: x is no tensor.
        ValueError: its type or shape is wrong.
    """
    check_tensor(name, x)
    if x.dim() != 3 or x.shape[-1] != dim:
        raise ValueError(f"{name}: shape {tuple(x.shape)}; use (batch, tokens, {dim})")
    if not x.is_floating_point():
        raise ValueError(f"{name}: {x.dtype}; use a floating-point type")


def check_device(name: str, tensor: Tensor, x: Tensor, of: str = "x") -> None:
    """Raise ValueError where a tensor is not on the device of the argument x, whose name is `of`."""
    if tensor.device != x.device:
        raise ValueError(f"{name}: on {tensor.device}, but {of} is on {x.device}; use one device")


def check_mask(name: str, mask: Any, shape: tuple[int, ...], x: Tensor, of: str = "x") -> None:
    """Raise where a mask, unless it is None, is not bool, of this shape and on the device of x, whose name is `of`.

    Raises:
        TypeError: the mask is no tensor.
        ValueError: its type, shape or device is wrong.
    """
    if mask is None:
        return
    check_tensor(name, mask)
    if mask.shape != shape or mask.dtype != torch.bool:
        raise ValueError(f"{name}: {tuple(mask.shape)} of {mask.dtype}; use bool {tuple(shape)}, as {of} has it")
    check_device(name, mask, x, of)


def check_sample_index(sample_index: Any, x: Tensor, of: str = "x") -> None:
    """Raise where sample_index, unless it is None, is not int64 of shape (batch,) on the device of x.

    Raises:
        TypeError: it is no tensor.
        ValueError: its type, shape or device is wrong.
    """
    if sample_index is None:
        return
    check_tensor("sample_index", sample_index)
    if sample_index.shape != x.shape[:1] or sample_index.dtype != torch.int64:
        given = f"{tuple(sample_index.shape)} of {sample_index.dtype}"
        raise ValueError(f"sample_index: {given}; use int64 {tuple(x.shape[:1])}, a number for each sample")
    check_device("sample_index", sample_index, x, of)


def budget(name: str, given: int | None, default: int) -> int:
    """A budget given to `forward`, checked, or the constructor's where it is None.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is below 1.
    """
    if given is None:
        return default
    check_counts(**{name: given})
    return given

"""Checks of what the models are given: shapes, types and devices, without a look at any value."""

from typing import Any

import torch
from torch import Tensor

from colt5dist.model.activation_checkpointing import ACTIVATION_CHECKPOINTING
from colt5dist.model.config import CoLT5Config
from colt5dist.nn.checks import check_device, check_mask, check_sample_index, check_tensor
from colt5dist.ops.checks import check_whole


def check_model_arguments(model: str, architecture: str, config: Any, activation_checkpointing: str, seed: Any) -> None:
    """Raise where the arguments of the constructor of class `model`, which is of this architecture, are wrong.

    Raises:
        TypeError: config is no CoLT5Config, or seed no whole number.
        ValueError: every other problem, one line each.
    """
    if not isinstance(config, CoLT5Config):
        raise TypeError(f"config: {type(config).__name__}; use a CoLT5Config")
    check_whole(seed=seed)
    problems = config.problems()
    if config.architecture != architecture:
        problems.append(f"model.architecture: {config.architecture!r}; {model} is {architecture!r}")
    if activation_checkpointing not in ACTIVATION_CHECKPOINTING:
        allowed = ", ".join(ACTIVATION_CHECKPOINTING)
        problems.append(f"activation_checkpointing: {activation_checkpointing!r}; use one of {allowed}")
    if problems:
        raise ValueError("\n".join(problems))


def check_ids(name: str, ids: Any) -> None:
    """Raise where ids are not integers of shape (batch, tokens).

    Raises:
        TypeError: ids are no tensor.
        ValueError: their type or shape is wrong.
    """
    check_tensor(name, ids)
    if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name}: {tuple(ids.shape)} of {ids.dtype}; use int64 (batch, tokens)")


def check_batch(
    input_ids: Any,
    decoder_input_ids: Any,
    target_ids: Any,
    input_mask: Tensor | None,
    target_mask: Tensor | None,
    sample_index: Tensor | None,
) -> None:
    """Raise where the arguments of a model's `forward` do not fit each other.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: a type, shape or device is wrong.
    """
    check_ids("input_ids", input_ids)
    check_ids("decoder_input_ids", decoder_input_ids)
    check_tensor("target_ids", target_ids)
    if decoder_input_ids.shape[0] != input_ids.shape[0]:
        raise ValueError(
            f"decoder_input_ids: a batch of {decoder_input_ids.shape[0]}; use {input_ids.shape[0]}, as input_ids has it"
        )
    if target_ids.shape != decoder_input_ids.shape or target_ids.dtype != torch.int64:
        raise ValueError(
            f"target_ids: {tuple(target_ids.shape)} of {target_ids.dtype}; use int64 "
            f"{tuple(decoder_input_ids.shape)}, as decoder_input_ids has it"
        )
    check_device("decoder_input_ids", decoder_input_ids, input_ids, "input_ids")
    check_device("target_ids", target_ids, input_ids, "input_ids")
    check_mask("input_mask", input_mask, input_ids.shape, input_ids, "input_ids")
    check_mask("target_mask", target_mask, target_ids.shape, target_ids, "target_ids")
    check_sample_index(sample_index, input_ids, "input_ids")


def one_of(name: str, value: Any, other_name: str, other: Any) -> Any:
    """The one of two arguments that is given.

    Raises:
        TypeError: both are given, or none.
    """
    if (value is None) == (other is None):
        raise TypeError(f"{name}: {'missing' if value is None else f'given together with {other_name}'}; give one")
    return other if value is None else value

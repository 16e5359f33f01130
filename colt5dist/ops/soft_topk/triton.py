"""Soft top-k with one scalar of state a row, in Triton. `colt5dist.ops.soft_topk` derives what is computed.

Forward: one kernel (`triton_forward`). Backward: one kernel (`triton_backward`); where not all states were kept, the
forward's kernel runs before it, a row a segment: the same compiled code on the same values, so that the replayed states
have the same bits.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from colt5dist.ops.kernel_call import KernelCall, tensor_key
from colt5dist.ops.row_split import RowSplit, messages, split_rows, spread_rows
from colt5dist.ops.soft_topk.operator import (
    arithmetic_dtype,
    define_coordinate_descent,
    empty_result,
)
from colt5dist.ops.soft_topk.schedule import epsilon_schedule
from colt5dist.ops.soft_topk.triton_backward import gradient_kernel
from colt5dist.ops.soft_topk.triton_forward import descend_kernel
from colt5dist.ops.triton_rows import INTERPRETED, arithmetic_type, as_rows, float64_bits, row_arguments


def shared_device(scores: Tensor) -> torch.device | None:
    """The device over which rows may be split; None for float64 rows, since what is exchanged is float32."""
    return scores.device if scores.is_cuda and scores.dtype != torch.float64 else None


def contiguous(k: Tensor | None) -> Tensor | None:
    """k as the kernels take it."""
    return None if k is None else k.contiguous()


class _Schedule(NamedTuple):
    """Temperatures as the kernels take them: bits of float64. tail: the first iteration with the result's eps."""

    first: int
    decay: int
    log_decay: int
    last: int
    tail: int


@lru_cache(maxsize=256)
def _schedule(eps: float, eps_init: float, eps_decay: float, n_iters: int) -> _Schedule:
    epsilons = epsilon_schedule(eps, eps_init, eps_decay, n_iters)
    bits = (epsilons[0], eps_decay, math.log(eps_decay), epsilons[-1])
    first, decay, log_decay, last = (float64_bits(value) for value in bits)
    return _Schedule(first, decay, log_decay, last, tail=1 + epsilons.index(epsilons[-1]))


def row_constants(scores: Tensor, k: Tensor | None, mask: Tensor | None, layout: RowSplit) -> dict[str, Any]:
    """What every kernel is compiled for, in the order of its arguments, and its launch options."""
    return dict(_row_constants(layout, mask is not None, k is not None, arithmetic_type(scores)))


@lru_cache(maxsize=1024)
def _row_constants(layout: RowSplit, has_mask: bool, has_k: bool, dtype: Any) -> dict[str, Any]:
    return {
        "RESIDENT": layout.blocks == 1,
        **layout.launch,
        "HAS_MASK": has_mask,
        "HAS_K": has_k,
        "DTYPE": dtype,
        "COMPILED": not INTERPRETED,
    }


_descend = KernelCall(descend_kernel)
_gradients = KernelCall(gradient_kernel)


def _forward(
    scores: Tensor,
    k: Tensor | None,
    mask: Tensor | None,
    budget: float,
    eps: float,
    eps_init: float,
    eps_decay: float,
    n_iters: int,
    segments: int,
) -> tuple[Tensor, Tensor]:
    """As that of `scalar_state`."""
    result = empty_result(scores)
    kept = torch.empty((*scores.shape[:-1], segments, 2), dtype=torch.float64, device=scores.device)
    schedule = _schedule(eps, eps_init, eps_decay, n_iters)
    with torch.cuda.device_of(scores):
        _descend_rows(scores, k, mask, budget, None, kept, result, schedule, n_iters)
    return result, kept


def _descend_rows(
    scores: Tensor,
    k: Tensor | None,
    mask: Tensor | None,
    budget: float,
    segment_states: Tensor | None,
    states: Tensor,
    result: Tensor | None,
    schedule: _Schedule,
    n_iters: int,
) -> None:
    """Launch the forward's kernel: for the result, or for all states from those at the ends of segments."""
    n = scores.shape[-1]
    num_rows = scores.numel() // n
    segments = 1 if segment_states is None else segment_states.shape[-2]
    layout = split_rows(num_rows, n, shared_device(scores))
    groups = num_rows * segments if layout.parts == 1 else layout.groups
    k = contiguous(k)
    key = (
        layout,
        scores.device,
        tensor_key(scores),
        tensor_key(mask),
        None if k is None else (k.dtype, k.data_ptr() % 16 == 0),
    )
    arguments = (
        *row_arguments(scores, mask),
        states if k is None else k,
        float64_bits(math.log(budget) if k is None else 0.0),
        float64_bits(math.log(n)),
        states if segment_states is None else segment_states,
        states,
        states if result is None else result,
        *messages(layout, states),
        num_rows,
        n,
        layout.parts,
        layout.blocks,
        n_iters,
        segments,
        states.shape[-2],
        schedule.tail,
        schedule.first,
        schedule.decay,
        schedule.last,
        int(result is not None),
    )
    _descend(key, layout.parts * groups, arguments, row_constants(scores, k, mask, layout))


def _backward(
    grad: Tensor,
    scores: Tensor,
    k: Tensor | None,
    mask: Tensor | None,
    kept: Tensor,
    budget: float,
    eps: float,
    eps_init: float,
    eps_decay: float,
    n_iters: int,
) -> tuple[Tensor, Tensor]:
    """As that of `scalar_state`."""
    n = scores.shape[-1]
    num_rows = scores.numel() // n
    schedule = _schedule(eps, eps_init, eps_decay, n_iters)
    k, states = contiguous(k), kept.contiguous()
    grad_scores = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    layout = spread_rows(num_rows, n, shared_device(scores))
    programs = layout.parts * layout.groups
    tables = torch.empty(programs * n_iters * 4, dtype=arithmetic_dtype(scores), device=scores.device)
    grad_k = tables if k is None else torch.empty(k.shape, dtype=torch.float64, device=scores.device)
    with torch.cuda.device_of(scores):
        if states.shape[-2] < n_iters:
            kept, states = states, states.new_empty((num_rows, n_iters, 2))
            _descend_rows(scores, k, mask, budget, kept, states, None, schedule, n_iters)
        key = (
            layout,
            scores.device,
            tensor_key(scores),
            tensor_key(mask),
            tensor_key(grad),
            None if k is None else (k.dtype, k.data_ptr() % 16 == 0),
            n_iters,
        )
        arguments = (
            *row_arguments(scores, mask),
            *as_rows(grad),
            states if k is None else k,
            float64_bits(budget),
            states,
            tables,
            grad_scores,
            grad_k,
            *messages(layout, states),
            num_rows,
            n,
            layout.parts,
            layout.blocks,
            n_iters,
            schedule.tail,
            schedule.first,
            schedule.log_decay,
            schedule.decay,
            schedule.last,
        )
        constants = row_constants(scores, k, mask, layout) | {"ITERATIONS": 1 << (n_iters - 1).bit_length()}
        _gradients(key, programs, arguments, constants)
    return grad_scores, tables.new_empty(0) if k is None else grad_k


soft_topk_triton_forward = define_coordinate_descent("soft_topk_triton", _forward, _backward)

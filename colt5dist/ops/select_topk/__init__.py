"""Which tokens are routed: the positions of the largest scores, the same set in the same order on every device.

Selection by the scores themselves, not by their soft top-k: that saturates at 1 and so has ties by construction, while
the two orders agree wherever it does not.
"""

import torch
from torch import Tensor
from torch.library import Library, register_fake

from colt5dist.errors import ConfigError
from colt5dist.ops.checks import is_whole_number, not_whole
from colt5dist.ops.implementation import HAS_TRITON, choose_implementation
from colt5dist.ops.select_topk.reference import select_topk_reference

if HAS_TRITON:
    from colt5dist.ops.select_topk.triton import can_select, select_topk_triton

__all__ = ["IMPLEMENTATIONS", "select_topk"]

IMPLEMENTATIONS = ("auto", "reference", "triton")

_LIBRARY = Library("colt5dist", "FRAGMENT")
_LIBRARY.define("select_topk(Tensor scores, int num_tokens, Tensor? mask, bool triton) -> Tensor")


def _select(scores: Tensor, num_tokens: int, mask: Tensor | None, triton: bool) -> Tensor:
    if scores.numel() == 0 or num_tokens == 0:
        return torch.zeros((*scores.shape[:-1], num_tokens), dtype=torch.int64, device=scores.device)
    layout = can_select(scores) if triton else None
    if layout is None:
        return select_topk_reference(scores, num_tokens, mask)
    return select_topk_triton(scores, num_tokens, mask, layout)


def _fake_select(scores: Tensor, num_tokens: int, mask: Tensor | None, triton: bool) -> Tensor:
    return scores.new_empty((*scores.shape[:-1], num_tokens), dtype=torch.int64)


_LIBRARY.impl("select_topk", _select, "CompositeExplicitAutograd")
register_fake("colt5dist::select_topk", _fake_select, lib=_LIBRARY)


def select_topk(scores: Tensor, num_tokens: int, mask: Tensor | None = None, *, implementation: str = "auto") -> Tensor:
    """Positions of the `num_tokens` largest scores of each row, ascending.

    No gradient, no host synchronisation, and no sum whose order matters: the result is a function of the values alone.
    Registered as `colt5dist::select_topk`, for selective activation checkpointing to keep.

    Args:
        scores: (..., n) of any floating type, finite where valid. Of equal scores the one at the smaller position is
            taken first.
        num_tokens: 0 to n.
        mask: (..., n) bool, True = valid; None: all. Masked (and -inf or NaN) entries come last of all, those at
            smaller positions first.
        implementation: "reference" (PyTorch), "triton" (CUDA tensors; CPU tensors under TRITON_INTERPRET=1; float64,
            and rows that do not fit into the registers of the whole device, are left to the reference), or "auto":
            triton for CUDA tensors, else the reference. The results are equal.

    Returns:
        (..., num_tokens) int64.

    Raises:
        ConfigError: num_tokens is not within 0 .. n, the mask's shape, type or device is wrong, or the implementation
            cannot serve.
    """
    if not is_whole_number(num_tokens):
        raise ConfigError(not_whole("num_tokens", num_tokens))
    if not 0 <= num_tokens <= scores.shape[-1]:
        raise ConfigError(f"num_tokens: {num_tokens} of rows of {scores.shape[-1]} scores; use 0 to {scores.shape[-1]}")
    if mask is not None and (mask.shape != scores.shape or mask.dtype != torch.bool):
        raise ConfigError(
            f"mask: {tuple(mask.shape)} of {mask.dtype} for scores {tuple(scores.shape)}; use bool of the scores' shape"
        )
    if mask is not None and mask.device != scores.device:
        raise ConfigError(f"mask: on {mask.device}, but the scores are on {scores.device}; use one device")
    if implementation not in IMPLEMENTATIONS:
        raise ConfigError(f"implementation: {implementation!r} is unknown; use one of {', '.join(IMPLEMENTATIONS)}")
    triton = choose_implementation(implementation, scores, plain="reference") == "triton"
    return torch.ops.colt5dist.select_topk.default(scores.detach(), num_tokens, mask, triton)

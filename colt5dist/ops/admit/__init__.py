"""Which tokens of a sequence are routed when no decision may look at a later token.

A top-k over the sequence is no such decision: a later token can push an earlier one out. Here a window of tokens admits
those whose score reaches a threshold that was set by the windows before it, in order, until its places are taken.
`admit_in_order` decides over whole windows, `admit_next` over one more token, as decoding does.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from colt5dist.errors import ConfigError

__all__ = ["HISTORY", "admission_threshold", "admit_in_order", "admit_next", "num_admitted", "trailing_mean"]

HISTORY = 8
"""Windows over whose values a threshold is averaged: one window's value is noisy, old ones may be of another text."""


def trailing_mean(values: Tensor) -> Tensor:
    """values (..., v), one a window in order -> (..., v): the mean of each with those of up to HISTORY - 1 windows
    before it. Differentiable; no value depends on a later one by one bit."""
    num_windows = values.shape[-1]
    summed = F.pad(values, (HISTORY - 1, 0)).unfold(-1, HISTORY, 1).sum(dim=-1)
    return summed / torch.arange(1, num_windows + 1, device=values.device, dtype=values.dtype).clamp(max=HISTORY)


def admission_threshold(earlier: Tensor, num_tokens: int) -> Tensor:
    """Scores that the tokens of a window have to reach.

    Args:
        earlier: (..., v, w), w scores of each of v windows, in order.
        num_tokens: 1 .. w.

    Returns:
        (..., v): entry i is the num_tokens-th largest score of a window, averaged over window i of `earlier` and up to
        HISTORY - 1 before it. About num_tokens of a like window reach it.
    """
    return trailing_mean(earlier.topk(num_tokens, dim=-1, sorted=False).values.amin(dim=-1))


def _reach(scores: Tensor, threshold: Tensor | None) -> Tensor:
    """Which scores reach the threshold; threshold None: all do that are no -inf or NaN."""
    real = scores > float("-inf")
    return real if threshold is None else (scores >= threshold) & real


def num_admitted(scores: Tensor, threshold: Tensor | None, num_places: int) -> Tensor:
    """How many a window has admitted after its first scores (..., n), given its threshold (...): (...) int64."""
    return _reach(scores, None if threshold is None else threshold.unsqueeze(-1)).sum(dim=-1).clamp(max=num_places)


def admit_next(score: Tensor, threshold: Tensor | None, admitted_before: Tensor, num_places: int) -> Tensor:
    """Whether a window that has admitted `admitted_before` (...) tokens admits the next one, of this score (...)."""
    return _reach(score, threshold) & (admitted_before < num_places)


@torch.library.custom_op("colt5dist::admit_in_order", mutates_args=())
def _admit_in_order(scores: Tensor, earlier: Tensor, num_tokens: int, num_places: int) -> tuple[Tensor, Tensor]:
    admitted = _reach(scores, admission_threshold(earlier, num_tokens).unsqueeze(-1))
    count = admitted.cumsum(dim=-1)
    rank = torch.arange(1, num_places + 1, device=scores.device).expand(*scores.shape[:-1], num_places)
    taken = rank <= count[..., -1:]
    # the j-th admitted position is where the running count first reaches j; after them come those that are not admitted
    others = torch.searchsorted((~admitted).cumsum(dim=-1), (rank - count[..., -1:]).clamp(min=1))
    return torch.where(taken, torch.searchsorted(count, rank.contiguous()), others), taken


@_admit_in_order.register_fake
def _(scores: Tensor, earlier: Tensor, num_tokens: int, num_places: int) -> tuple[Tensor, Tensor]:
    shape = (*scores.shape[:-1], num_places)
    return scores.new_empty(shape, dtype=torch.int64), scores.new_empty(shape, dtype=torch.bool)


def admit_in_order(
    scores: Tensor, earlier: Tensor, *, num_tokens: int, num_places: int | None = None
) -> tuple[Tensor, Tensor]:
    """Positions that each window admits.

    Args:
        scores: (..., v, w), w scores of each of v windows; -inf (and NaN) is never admitted.
        earlier: (..., v, w); entry i is the newest window that may take part in the decision over window i. The
            threshold is the num_tokens-th largest score of a window, averaged over entry i and up to HISTORY - 1
            before it, so that about num_tokens of a window reach it.
        num_tokens: 1 .. w.
        num_places: the most that a window admits, 1 .. w; None: num_tokens.

    Returns:
        Positions within the window (..., v, num_places) int64, all different, and whether the place is taken (..., v,
        num_places) bool: taken places come first, ascending, then free ones, which hold positions that are not
        admitted. No gradient, no host synchronisation; a function of the values alone. Registered as
        `colt5dist::admit_in_order`, for `routing_decision` to keep.

    Raises:
        ConfigError: num_tokens or num_places is not within 1 .. w, or the shapes differ.
    """
    num_places = num_tokens if num_places is None else num_places
    if scores.shape != earlier.shape or scores.dim() < 2:
        raise ConfigError(
            f"earlier: {tuple(earlier.shape)} for scores {tuple(scores.shape)}; use one shape (..., v, w)"
        )
    for name, value in (("num_tokens", num_tokens), ("num_places", num_places)):
        if not 1 <= value <= scores.shape[-1]:
            raise ConfigError(f"{name}: {value} of windows of {scores.shape[-1]} scores; use 1 to {scores.shape[-1]}")
    return _admit_in_order(scores.detach(), earlier.detach(), num_tokens, num_places)

"""Soft top-k as published, for reading and for tests: the state is a vector, the backward is autograd's."""

import torch
from torch import Tensor


def soft_topk_reference(scores: Tensor, k: Tensor, mask: Tensor | None, epsilons: list[float]) -> Tensor:
    """Coordinate descent in the two blocks a (one value per row) and b (one value per element).

    Source: Wright 1502.04759 (coordinate descent); Qian et al. 2211.01267, eq. 4-5 (these two updates); CoLT5
    2303.09752, appendix C (as a router).

    Args:
        scores: (..., n) float32 or float64.
        k: (...) float64, the budgets.
        mask: (..., n) bool, True = valid; None: all.
        epsilons: the T + 1 temperatures of `epsilon_schedule`.

    Returns:
        (..., n) in the type of `scores`.
    """
    log_k = k.log().to(scores.dtype).unsqueeze(-1)
    counted = None
    if mask is not None:
        # a row without a valid entry is computed as if all of it were valid, and emptied at the end
        counted = mask | ~mask.any(dim=-1, keepdim=True)
        scores = scores.masked_fill(~mask, 0.0)
    a = torch.zeros_like(log_k)
    b = -scores
    for eps in epsilons[:-1]:
        exponent = (scores + b) / eps
        if counted is not None:
            exponent = exponent.masked_fill(~counted, float("-inf"))
        a = eps * (log_k - exponent.logsumexp(dim=-1, keepdim=True))
        b = -torch.relu(scores + a)
    selected = ((scores + a + b) / epsilons[-1]).exp()
    return selected if mask is None else selected.masked_fill(~mask, 0.0)

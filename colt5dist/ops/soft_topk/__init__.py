"""Soft top-k: which k of n scores are the largest, as a differentiable function. `soft_topk` is the door.

**The problem.** For one row of scores s, a budget k > 0 and a temperature eps > 0,

    maximise  s.y + eps * H(y)   subject to  sum_i y_i = k,  0 <= y_i <= 1      (H: entropy)

As eps -> 0, y becomes the indicator of the k largest scores. Masked entries take no part and get y = 0.

**As published.** Coordinate descent on the dual (Wright 1502.04759), which has one value a for the budget and one value
b_i for each bound y_i <= 1 (Qian et al. 2211.01267, eq. 4-5). As a router: CoLT5 2303.09752, appendix C (eps = 1, 50
iterations); CoDA 2304.04947 (20 iterations at a falling eps). With eps_t = max(eps_init * decay^(t-1), eps), b = -s at
first, and t = 1 .. T:

    a_t = eps_t * (log k - logsumexp_i((s_i + b_i) / eps_t))
    b_i = -relu(s_i + a_t)
    y_i = exp((s_i + a_T + b_i) / eps_{T+1})

`reference.py` is this, with autograd through the iterations.

**The state is one scalar per row.** b_i = -relu(s_i + a) gives s_i + b_i = min(s_i, -a): no vector b is needed.

    a_1 = eps_1 * (log k - log n_valid)                                    since s + b = 0 at first
    a_t = eps_t * (log k - logsumexp_i(min(s_i, -a_{t-1}) / eps_t))        t = 2 .. T
    y_i = exp(min(s_i + a_T, 0) / eps_{T+1})

The maximum that a stable logsumexp subtracts is min(max_i s_i, -a_{t-1}), so an iteration is one sum over the row. Its
largest term is exactly 1: it neither overflows nor vanishes.

**Backward.** Let g = dL/dy, and C_t = {i : s_i > -a_{t-1}} the entries that iteration t clips (strictly: the slope of
relu at 0 is 0). The weight of entry i in the logsumexp of iteration t is

    w_{t,i} = exp(min(s_i, -a_{t-1}) / eps_t - logsumexp(...)) = exp((min(s_i, -a_{t-1}) + a_t) / eps_t) / k

and with da_t = (eps_t / k) dk - sum_i w_{t,i} d min(s_i, -a_{t-1}) the chain of scalars is followed back. Let A_t =
dL/da_t:

    d_i      = [s_i + a_T <= 0] * g_i * y_i / eps_{T+1}                    what y gives to s directly
    A_T      = sum_i d_i                                                   the only sum over the row
    A_{t-1}  = A_t * |C_t| * exp((a_t - a_{t-1}) / eps_t) / k              clipped entries all have the same weight
    dL/ds_i  = d_i - sum_{t=2..T} A_t * [i not in C_t] * exp((s_i + a_t) / eps_t) / k
    dL/dk    = sum_{t=1..T} A_t * eps_t / k

Given all a_t and |C_t|, dL/ds is elementwise and the cost linear in T. `checkpoint_segments` = S cuts the T iterations
into S segments and keeps a_t and |C_t| at their ends only, S scalars of each kind per row; the backward replays what is
between, each segment from the state that ends the one before. It repeats the forward's operations on the forward's
values, so the gradients are the same to the last bit for every S.

**Newton.** What coordinate descent converges to is y_i = min(1, exp((s_i + a) / eps)), a being the root of

    F(a) = sum_i min(1, exp((s_i + a) / eps)) = k        for 0 < k < n_valid; for k >= n_valid the answer is y = 1

Let c = #{i : s_i + a >= 0}, and M the sum of exp((s_i + a) / eps) over the others. As a function of u = exp(a / eps), F
is concave and piecewise linear, F(a') = c + M * u'/u on the piece of a. So Newton's step in u, written in a, is

    a <- a + eps * log((k - c) / M)

By concavity it never lands above the root, from whichever side it comes, and from the root's own piece it lands on the
root. It says nothing where c >= k, and from below it may pass no more than one breakpoint per step. So a bracket
is kept,
at first [eps * (log k - logsumexp(s / eps)), -min s] (nothing clipped; everything clipped); while it is wider than
4 eps, every other pass goes to its middle, on a scale that is logarithmic far from 0. M is kept as a logarithm, so that
it cannot underflow.

The gradient is implicit. Let U = {i : s_i + a < 0}; dF = dk gives da = (eps dk - sum_U y_i ds_i) / sum_U y_i, and with
m = sum_U y_i g_i / sum_U y_i, the mean gradient of the unclipped mass,

    dL/ds_i = (y_i / eps) * (g_i - m)  on U, 0 elsewhere;        dL/dk = m

**Arithmetic.** Elementwise in float32, or float64 for float64 scores. Row scalars are float64; between two sums the
Triton kernels carry them as the sum of two float32, 48 bits. The difference s + a is formed with the scalar split in
two, so that its sign, which says on which side of a threshold an entry is, is that of float64. Scores have to be
below about 1e9 * eps, beyond which a cannot resolve eps.
"""

import math

import torch
from torch import Tensor

from colt5dist.errors import ConfigError
from colt5dist.ops.checks import is_number, is_whole_number, not_a_number, not_whole
from colt5dist.ops.implementation import HAS_TRITON, choose_implementation
from colt5dist.ops.soft_topk.newton import soft_topk_newton_forward
from colt5dist.ops.soft_topk.operator import arithmetic_dtype, budgets
from colt5dist.ops.soft_topk.reference import soft_topk_reference
from colt5dist.ops.soft_topk.scalar_state import soft_topk_scalar_forward
from colt5dist.ops.soft_topk.schedule import epsilon_schedule

if HAS_TRITON:
    from colt5dist.ops.soft_topk.newton_triton import soft_topk_newton_triton_forward
    from colt5dist.ops.soft_topk.triton import soft_topk_triton_forward

__all__ = ["IMPLEMENTATIONS", "SOLVERS", "soft_topk", "soft_topk_problems"]

IMPLEMENTATIONS = ("auto", "reference", "scalar", "triton")
SOLVERS = ("coordinate_descent", "newton")


def soft_topk_problems(
    *,
    eps: float,
    eps_init: float | None,
    eps_decay: float,
    n_iters: int,
    solver: str,
    implementation: str,
    checkpoint_segments: int | None = None,
) -> list[str]:
    """What is wrong with these settings of `soft_topk`, one message each, beginning with the argument's name."""
    numbers = {"eps": eps, "eps_decay": eps_decay} | ({} if eps_init is None else {"eps_init": eps_init})
    counts = {"n_iters": n_iters} | (
        {} if checkpoint_segments is None else {"checkpoint_segments": checkpoint_segments}
    )
    problems = [not_a_number(name, value) for name, value in numbers.items() if not is_number(value)]
    problems += [not_whole(name, value) for name, value in counts.items() if not is_whole_number(value)]
    if problems:
        return problems
    if not 0 < eps < math.inf:
        problems.append(f"eps: {eps} is no temperature; use a number above 0")
    if eps_init is not None and not 0 < eps_init < math.inf:
        problems.append(f"eps_init: {eps_init} is no temperature; use a number above 0, or None for eps")
    if not 0 < eps_decay <= 1:
        problems.append(f"eps_decay: {eps_decay} is outside (0, 1]; use 1 for a constant temperature")
    if n_iters < 1:
        problems.append(f"n_iters: {n_iters} iterations; use 1 or more")
    if checkpoint_segments is not None and not 1 <= checkpoint_segments <= n_iters:
        problems.append(f"checkpoint_segments: {checkpoint_segments} is outside 1 .. n_iters = {n_iters}")
    if solver not in SOLVERS:
        problems.append(f"solver: {solver!r} is unknown; use one of {', '.join(SOLVERS)}")
    if implementation not in IMPLEMENTATIONS:
        problems.append(f"implementation: {implementation!r} is unknown; use one of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "reference" and solver == "newton":
        problems.append(
            "implementation: 'reference' is coordinate descent as published; use 'scalar' with solver='newton'"
        )
    return problems


def soft_topk(
    scores: Tensor,
    k: float | Tensor,
    *,
    mask: Tensor | None = None,
    eps: float = 1.0,
    eps_init: float | None = None,
    eps_decay: float = 1.0,
    n_iters: int = 50,
    solver: str = "coordinate_descent",
    implementation: str = "auto",
    checkpoint_segments: int | None = None,
) -> Tensor:
    """Weights in [0, 1], larger for larger scores, that sum to about k in every row (to k with `solver="newton"`).

    Args:
        scores: (..., n), any floating type, any strides; finite where valid. A NaN in a valid place makes all valid
            places of its row NaN, forward and backward.
        k: budget of a row, above 0, need not be whole: a number, or a tensor that broadcasts to (...) and gets a
            gradient. Where k >= n_valid every valid weight tends to 1 (is 1 with Newton).
        mask: (..., n) bool, True = valid. Whatever the masked scores are, weight and gradient there are 0. A row may
            have no valid entry.
        eps: temperature of the result, in units of the scores.
        eps_init: temperature of the first iteration; None: `eps`.
        eps_decay: factor of the temperature from one iteration to the next, down to `eps`, in (0, 1].
        n_iters: iterations of coordinate descent, T.
        solver: "coordinate_descent", or "newton" for what that converges to. Newton ignores `eps_init`, `eps_decay`,
            `n_iters` and `checkpoint_segments`: it needs none of them.
        implementation: "reference" (as published), "scalar" (PyTorch, any device), "triton" (CUDA tensors; CPU
            tensors under TRITON_INTERPRET=1), or "auto": triton for CUDA tensors, else scalar.
        checkpoint_segments: S of the module's docstring, 1 .. n_iters; None keeps every state. "reference" ignores it.

    Returns:
        (..., n) float32, or float64 for float64 scores. Gradients have the types of `scores` and `k`. There is no
        second derivative except through "reference".

    Raises:
        ConfigError: settings, shapes or types are wrong.
    """
    problems = soft_topk_problems(
        eps=eps,
        eps_init=eps_init,
        eps_decay=eps_decay,
        n_iters=n_iters,
        solver=solver,
        implementation=implementation,
        checkpoint_segments=checkpoint_segments,
    )
    if not isinstance(scores, Tensor):
        raise ConfigError(f"scores: {type(scores).__name__}; use a tensor of floating-point rows (..., n)")
    if mask is not None and not isinstance(mask, Tensor):
        raise ConfigError(f"mask: {type(mask).__name__}; use a bool tensor of the scores' shape")
    if scores.dim() == 0 or not scores.is_floating_point():
        problems.append(f"scores: {tuple(scores.shape)} of {scores.dtype}; use floating-point rows (..., n)")
    if mask is not None and (mask.shape != scores.shape or mask.dtype != torch.bool):
        problems.append(
            f"mask: {tuple(mask.shape)} of {mask.dtype}; use bool of the scores' shape {tuple(scores.shape)}"
        )
    if mask is not None and mask.device != scores.device:
        problems.append(f"mask: on {mask.device}, but the scores are on {scores.device}; use one device")
    if isinstance(k, Tensor):
        if k.dim() > 0 and k.device != scores.device:
            problems.append(f"k: on {k.device}, but the scores are on {scores.device}; use one device")
        if not _broadcasts(k.shape, scores.shape[:-1]):
            problems.append(f"k: shape {tuple(k.shape)} for rows {tuple(scores.shape[:-1])}; use the rows' shape")
    elif not is_number(k):
        problems.append(not_a_number("k", k))
    elif not 0 < k < math.inf:
        problems.append(f"k: {k} is no budget; use a number above 0")
    if problems:
        raise ConfigError("\n".join(problems))
    implementation = choose_implementation(implementation, scores, plain="scalar")

    budgets_given, budget = None, 0.0
    if isinstance(k, Tensor):
        budgets_given = k if k.shape == scores.shape[:-1] else k.expand(scores.shape[:-1])
    else:
        budget = float(k)
    if scores.numel() == 0:
        return scores.to(arithmetic_dtype(scores)) * budgets(scores, budgets_given, budget).unsqueeze(-1).to(
            scores.dtype
        )
    if solver == "newton":
        newton = soft_topk_newton_triton_forward if implementation == "triton" else soft_topk_newton_forward
        return newton(scores, budgets_given, mask, budget, float(eps))[0]
    eps_init = eps if eps_init is None else eps_init
    if implementation == "reference":
        epsilons = epsilon_schedule(eps, eps_init, eps_decay, n_iters)
        rows = scores.to(arithmetic_dtype(scores))
        return soft_topk_reference(rows, budgets(scores, budgets_given, budget), mask, epsilons)
    descend = soft_topk_triton_forward if implementation == "triton" else soft_topk_scalar_forward
    segments = n_iters if checkpoint_segments is None else checkpoint_segments
    return descend(
        scores, budgets_given, mask, budget, float(eps), float(eps_init), float(eps_decay), n_iters, segments
    )[0]


def _broadcasts(shape: torch.Size, target: torch.Size) -> bool:
    trailing = target[len(target) - len(shape) :]
    return len(shape) <= len(target) and all(size in (1, full) for size, full in zip(shape, trailing, strict=True))

"""Routing that looks at no later token: a window admits tokens by a threshold from the windows before it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from colt5dist.nn.routing.kept_routing import keep_value, routing_decision
from colt5dist.nn.routing.router import CoordinateDescentRouter, Route, take_all
from colt5dist.ops.admit import admit_in_order, trailing_mean
from colt5dist.ops.checks import check_counts
from colt5dist.ops.soft_topk.schedule import epsilon_schedule

_SMALLEST_SCORE = 1e-30


class Admission(NamedTuple):
    """How the windows admit the tokens of one group of routes.

    Args:
        num_tokens: tokens of a window that reach the threshold in the mean.
        num_places: the most that a window admits.
        after_window: True: only later windows read what is admitted, so that the window itself takes part in its
            threshold, and the last window, which nothing reads, admits nothing. False: the first window, which has no
            earlier one, admits nothing.
    """

    num_tokens: int
    num_places: int
    after_window: bool

    def routes(self, window_size: int) -> bool:
        """Whether windows of this size choose among their tokens; otherwise they admit all."""
        return self.num_tokens < window_size


class CausalRouter(CoordinateDescentRouter):
    """`CoordinateDescentRouter` over windows, none of whose decisions depends on a later token.

    For each window the soft top-k with the window's budget gives the dual variable a (see `colt5dist.ops.soft_topk`).
    With the mean of a over the windows before, a token's score is that which the soft top-k would give it,

        y = exp(min(s + a, 0) / eps)

    and it is admitted in order, by a threshold on s that is set by the same windows (`admit_in_order`). y is
    differentiable: with respect to s, and through a to the scores of the earlier windows, which compete with it.
    straight_through and the controls routing="static" and "random" are as in `CoordinateDescentRouter`.

    Args:
        dim: width of a token.
        window_size: tokens of a window.
        settings: the other arguments of `CoordinateDescentRouter`, which describes them; learned_routing_tokens,
            route_block_size and noise are refused.

    Raises:
        TypeError: an argument has the wrong type, such as a string for a number.
        ValueError: an argument has a wrong value; the message names it and says what to use.
    """

    def __init__(self, dim: int, *, window_size: int, **settings: Any) -> None:
        super().__init__(dim, **settings)
        if self.takes_routing_tokens:
            raise ValueError("learned_routing_tokens: windows of one sequence have one router's vectors; leave it out")
        if self.route_block_size is not None:
            raise ValueError("route_block_size: the sequence is cut into windows already; leave it out")
        if self.noise:
            raise ValueError("noise: has no form for windows; leave it out")
        check_counts(window_size=window_size)
        self.window_size = window_size

    def raw_scores(self, x: Tensor) -> Tensor:
        """Scores (b, r, n) of x (b, n, dim) before any soft top-k; learned routing only."""
        if self.routing != "learned":
            raise ValueError(f"routing: {self.routing!r} is a control of training; decoding needs 'learned'")
        return self._scores(x, None, True)[0]

    def at_once(self, num_tokens: int) -> Admission:
        """Admission of tokens whose own window reads them: queries, and tokens of a feed-forward."""
        return Admission(num_tokens, min(num_tokens, self.window_size), after_window=False)

    @property
    def final_eps(self) -> float:
        """Temperature of the scores."""
        eps_init = self.eps if self.eps_init is None else self.eps_init
        if self.solver == "newton":
            return self.eps
        return epsilon_schedule(self.eps, eps_init, self.eps_decay, self.n_iters)[-1]

    def admit(
        self,
        x: Tensor,
        admissions: Sequence[Admission],
        *,
        random_route: bool = False,
        sample_index: Tensor | None = None,
    ) -> list[Route]:
        """Admit tokens window by window.

        A free place is False in the route's mask, has score 0, and a position that no other place has. Where there is
        one window only, a route is one free place. A budget of a whole window or more takes all tokens, score 1.

        Args:
            x: (b, n, dim), any n.
            admissions: how each group of routes admits.
            random_route: whether to admit at random, with scores 1, as a negative control.
            sample_index: (b,) int64, the samples' numbers, needed for routing="random".

        Returns:
            A `Route` for each group of routes, with (windows - 1) * num_places places.
        """
        self._check(x, [admission.num_tokens for admission in admissions], None, None)
        length, width = x.shape[1], self.window_size
        num_decided = -(-length // width) - 1
        routed = [admission.routes(width) for admission in admissions]
        scores, touch = self._scores(x, None, num_decided > 0 and any(routed))
        if num_decided == 0:
            return [_nothing(x, size, touch) for size in self.route_groups]
        learned = self.routing == "learned" and not random_route
        duals = self.duals(scores, admissions, num_decided) if learned and any(routed) else None
        draws = self._random_scores(x, sample_index) if random_route or self.routing == "random" else None
        routes, first = [], 0
        for size, admission, is_routed in zip(self.route_groups, admissions, routed, strict=True):
            group = slice(first, first + size)
            first += size
            soft = None
            if not is_routed:
                pick_by = x.new_zeros(x.shape[0], size, length)
            elif draws is not None:
                pick_by = draws[:, group]
            elif duals is not None:
                pick_by = scores[:, group]
                soft = self._soft_by_past(pick_by, duals[:, group], admission.after_window)
            else:
                place = torch.arange(length, device=x.device) % width
                spread = (place * admission.num_tokens) % width < admission.num_tokens
                pick_by = spread.float().expand(x.shape[0], size, length)
            indices, taken = self.places(pick_by, admission, num_decided)
            routes.append(self._weigh_admitted(x, indices, taken, soft, touch))
        return routes

    def route_windows(
        self, x: Tensor, budgets: tuple[int, int], *, mask: Tensor, random_route: bool = False
    ) -> list[Route]:
        """Routes of queries and keys/values as colt5-attention has them, window by window.

        Each of the v windows after the first routes queries of its own and keys/values of all windows before it. This
        is NOT causal: a later token of a window can push an earlier query of it out. v rows of scores of the whole
        sequence are held in memory.

        Args:
            x: (b, windows * w, dim), two or more whole windows.
            budgets: queries that a window routes, and keys/values that it routes for each set.
            mask: (b, windows * w) bool, False = padding.
            random_route: whether to route at random, with scores 1, as a negative control.

        Returns:
            The route of the queries, at positions within the window, and that of the keys/values, at positions in the
            sequence; both of b * v rows.
        """
        self._check(x, budgets, mask, None)
        batch, length, width = *x.shape[:2], self.window_size
        windows = length // width
        scores, touch = self._scores(x, None, budgets[0] < width or budgets[1] < length)
        pick_by = scores
        if scores.shape[-1] != length:
            pick_by = x.new_zeros(batch, self.num_routing_tokens, length)
        if random_route:
            pick_by = self._random_scores(x, None)

        def by_window(of_tokens: Tensor) -> Tensor:
            """(b, r, n) -> (b * v, r, w)."""
            return rearrange(of_tokens[..., width:], "b r (v w) -> (b v) r w", w=width)

        def by_past(of_tokens: Tensor) -> Tensor:
            """(b, r, n) -> (b * v, r, n)."""
            return repeat(of_tokens, "b r n -> (b v) r n", v=windows - 1)

        position = torch.arange(length, device=x.device)
        past = position < width * torch.arange(1, windows, device=x.device).unsqueeze(-1)
        query = (by_window(pick_by[:, :1]), by_window(mask.unsqueeze(1)).squeeze(1))
        key_value = (by_past(pick_by[:, 1:]), past.repeat(batch, 1))
        return [
            self._route_rows(rows, budget, row_mask, random_route, touch)
            for (rows, row_mask), budget in zip((query, key_value), budgets, strict=True)
        ]

    def _route_rows(self, scores: Tensor, budget: int, mask: Tensor, random_route: bool, touch: Tensor | None) -> Route:
        """Route of rows of scores (b, r, n) as in colt5-attention."""
        like = scores.transpose(1, 2)
        length = scores.shape[-1]
        if length <= budget:
            return take_all(like, scores.shape[1], mask, touch)
        soft = None
        if self.routing == "learned" and not random_route:
            soft = self._soft_topk(scores, min(budget * self.fetch_k_ratio, length), mask)
        return self._weigh(like, self._select(scores, budget, mask), soft, mask, touch)

    def duals(self, scores: Tensor, admissions: Sequence[Admission], num_decided: int) -> Tensor:
        """Mean of the dual variable a over each window and those before it.

        Args:
            scores: (b, r, n), raw scores.
            admissions: how each group of routes admits.
            num_decided: windows to take, all but the last one.

        Returns:
            (b, r, num_decided).
        """
        windows = scores[..., : num_decided * self.window_size].unflatten(-1, (num_decided, self.window_size))
        sums = [min(admission.num_tokens * self.fetch_k_ratio, self.window_size) for admission in admissions]
        k: float | Tensor = sums[0]
        if len(set(sums)) > 1:
            parts = zip(self.route_groups, sums, strict=True)
            k = torch.cat([scores.new_full((size, 1), total) for size, total in parts])
        soft = self._soft_topk(windows, k, None)
        return trailing_mean(dual_variable(windows, soft, self.final_eps))

    def scores_by_past(self, scores: Tensor, duals: Tensor) -> Tensor:
        """y of raw scores by the dual variables a of the windows before, of one shape or broadcast to it."""
        return ((scores + duals).clamp(max=0.0) / self.final_eps).exp()

    def _soft_by_past(self, scores: Tensor, duals: Tensor, after_window: bool) -> Tensor:
        """y of every token, scores (b, r, n) -> (b, r, n); 0 where nothing is admitted."""
        length = scores.shape[-1]
        by_token = duals.repeat_interleave(self.window_size, dim=-1)
        if after_window:
            decided = scores[..., : by_token.shape[-1]]
        else:
            decided = scores[..., self.window_size :]
            by_token = by_token[..., : decided.shape[-1]]
        soft = keep_value(self.scores_by_past(decided, by_token))
        missing = length - soft.shape[-1]
        return F.pad(soft, (0, missing) if after_window else (missing, 0))

    def places(self, pick_by: Tensor, admission: Admission, num_decided: int) -> tuple[Tensor, Tensor]:
        """Positions in the sequence (b, r, places) and whether each place is taken (b, r, places) bool."""
        length, width = pick_by.shape[-1], self.window_size
        windows = F.pad(pick_by, (0, (num_decided + 1) * width - length), value=float("-inf"))
        windows = windows.unflatten(-1, (num_decided + 1, width))
        with routing_decision():
            positions, taken = admit_in_order(
                windows[..., :-1, :] if admission.after_window else windows[..., 1:, :],
                windows[..., :-1, :],
                num_tokens=min(admission.num_tokens, width),
                num_places=admission.num_places,
            )
        first = torch.arange(num_decided, device=pick_by.device) + (0 if admission.after_window else 1)
        indices = positions + first.unsqueeze(-1) * width
        # free places beyond a short last window get positions in the first one, where nothing is routed then
        return torch.where(indices < length, indices, positions).flatten(2), taken.flatten(2)

    def _weigh_admitted(
        self, x: Tensor, indices: Tensor, taken: Tensor, soft: Tensor | None, touch: Tensor | None
    ) -> Route:
        route = self._weigh(x, indices, soft, None, touch)
        soft_scores = route.soft_scores
        if soft is None:
            soft_scores = torch.zeros_like(soft_scores).scatter(-1, indices, taken.to(soft_scores.dtype))
        return Route(indices, route.scores.masked_fill(~taken, 0.0), taken, soft_scores)


def dual_variable(scores: Tensor, soft: Tensor, eps: float) -> Tensor:
    """a (...) such that soft = exp(min(scores + a, 0) / eps), of soft scores (..., w); differentiable by both.

    Read off the largest score whose soft score is below 1: there is no smaller rounding error. Where all are 1, the
    smallest a that makes them so.
    """
    free = soft < 1
    key = torch.where(free.any(dim=-1, keepdim=True), scores.masked_fill(~free, float("-inf")), -scores)
    place = key.argmax(dim=-1, keepdim=True)
    return (eps * soft.gather(-1, place).clamp(min=_SMALLEST_SCORE).log() - scores.gather(-1, place)).squeeze(-1)


def _nothing(x: Tensor, size: int, touch: Tensor | None) -> Route:
    """A route of one free place."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    scores = torch.zeros(x.shape[0], size, 1, dtype=dtype, device=x.device)
    taken = torch.zeros(x.shape[0], size, 1, dtype=torch.bool, device=x.device)
    soft = torch.zeros(x.shape[0], size, x.shape[1], dtype=dtype, device=x.device)
    return Route(taken.to(torch.int64), scores if touch is None else scores + touch, taken, soft)

"""Which tokens the heavy branch sees, and the scores by which it is weighed."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from colt5dist.nn.checks import check_device, check_mask, check_sample_index, check_tensor, check_tokens
from colt5dist.nn.initial import normal_
from colt5dist.nn.routing.gather_scatter import gather_tokens
from colt5dist.nn.routing.kept_routing import keep_value, routing_decision
from colt5dist.nn.routing.routing_tokens import RoutingTokens, cosine_similarity, routing_scores
from colt5dist.ops.checks import (
    check_counts,
    check_not_negative,
    check_optional_counts,
    check_positive,
    check_whole,
)
from colt5dist.ops.counter_random import counter_uniform
from colt5dist.ops.select_topk import select_topk
from colt5dist.ops.soft_topk import soft_topk, soft_topk_problems

ROUTINGS = ("learned", "static", "random")


class RouterReturn(NamedTuple):
    """What `CoordinateDescentRouter` returns; with several routes, r follows the batch dimension.

    Args:
        indices: (b, m) int64 ascending; None where all tokens are taken.
        scores: (b, m).
        routed_tokens: (b, m, d).
        routed_mask: (b, m) bool; None where no mask was given.
    """

    indices: Tensor | None
    scores: Tensor
    routed_tokens: Tensor
    routed_mask: Tensor | None


class Route(NamedTuple):
    """The routing of one group of r routes, without the tokens.

    Args:
        indices: (b, r, m) int64 ascending; None where all n tokens are taken.
        scores: (b, r, m), exactly 0 where a masked token had to be picked.
        mask: (b, r, m) bool; None where no mask was given.
        soft_scores: (b, r, n), detached: the soft top-k of every token, or 1 at the routed ones where none was
            computed.
    """

    indices: Tensor | None
    scores: Tensor
    mask: Tensor | None
    soft_scores: Tensor


class CoordinateDescentRouter(nn.Module):
    """Picks tokens by the soft top-k of their products with learned vectors.

    The sum of the soft scores is `num_tokens * fetch_k_ratio`. It is found by coordinate descent while the temperature
    epsilon falls from eps_init by the factor eps_decay to eps (CoLT5, arXiv 2303.09752, section 3.1 and appendix C).
    Arguments from routing on are not in colt5-attention.

    Args:
        dim: width of a token.
        straight_through: whether the returned scores are exactly 1 (0 at masked tokens) and carry the gradient of the
            soft scores; False: the soft scores.
        n_iters: iterations of coordinate descent.
        fetch_k_ratio: sum of the soft scores for each token to route, 1 or more.
        eps: final temperature of the soft top-k, above 0, in units of the scores.
        eps_decay: factor of the temperature from one iteration to the next, in (0, 1].
        eps_init: temperature of the first iteration; None: eps.
        num_routing_tokens: routes r, each with a vector and picks of its own.
        learned_routing_tokens: whether the vectors are given to `forward` as routing_tokens; False: they are parameters
            of the router.
        use_triton: whether the Triton kernels serve wherever the tokens are; False leaves the choice to implementation.
        cosine_sim_routing: whether the scores are products of unit vectors, times cosine_sim_scale.
        cosine_sim_scale: factor of the scores with cosine_sim_routing.
        route_block_size: the sequence is cut into whole blocks of so many tokens, and equally many are picked from
            each; None: from the whole sequence.
        triton_checkpoint_segments: segments of iterations of which the backward pass keeps the ends only, 1 to n_iters:
            `checkpoint_segments` of `soft_topk`; None: every iteration is kept.
        routing: "learned"; or one of the paper's controls, whose scores are 1: "static", the first token of equal
            blocks; "random", by the sample's number. They own no vector, but draw its initial numbers, so that the same
            seed gives the layers around them the same weights.
        route_groups: sizes of groups of routes with a budget each, for `route`; they sum to num_routing_tokens. None:
            one group.
        std: standard deviation of the initial vectors.
        solver: "coordinate_descent", or "newton" for the exact soft top-k.
        implementation: of `soft_topk`: "auto", "reference", "scalar" or "triton".
        random_seed: seed of random routing, whose picks are a function of random_seed, random_stream and the sample's
            number.
        random_stream: stream of random numbers of the first route; route i draws from stream random_stream + i.
        noise: standard deviation of the normal noise that training mode adds to learned scores before the soft top-k
            and the choice of tokens (noisy top-k gating, arXiv 1701.06538, with a fixed size). It is drawn as random
            routing is, so `route` needs the samples' numbers; `forward` takes none. 0: none.

    Raises:
        TypeError: an argument has the wrong type, such as a string for a number.
        ValueError: an argument has a wrong value; the message names it and says what to use.
    """

    def __init__(
        self,
        dim: int,
        straight_through: bool = True,
        n_iters: int = 20,
        fetch_k_ratio: float = 9 / 8,
        eps: float = 0.03,
        eps_decay: float = 0.7,
        eps_init: float | None = 4.0,
        num_routing_tokens: int = 1,
        learned_routing_tokens: bool = False,
        use_triton: bool = False,
        cosine_sim_routing: bool = False,
        cosine_sim_scale: float = 8,
        route_block_size: int | None = None,
        triton_checkpoint_segments: int | None = None,
        *,
        routing: str = "learned",
        route_groups: Sequence[int] | None = None,
        std: float = 1.0,
        solver: str = "coordinate_descent",
        implementation: str = "auto",
        random_seed: int = 0,
        random_stream: int = 0,
        noise: float = 0.0,
    ) -> None:
        super().__init__()
        check_counts(dim=dim, num_routing_tokens=num_routing_tokens)
        check_optional_counts(route_block_size=route_block_size, triton_checkpoint_segments=triton_checkpoint_segments)
        check_positive(fetch_k_ratio=fetch_k_ratio, cosine_sim_scale=cosine_sim_scale)
        check_not_negative(std=std, noise=noise)
        check_whole(random_seed=random_seed, random_stream=random_stream)
        implementation = "triton" if use_triton else implementation
        if not 1 <= fetch_k_ratio < math.inf:
            raise ValueError(f"fetch_k_ratio: {fetch_k_ratio}; use 1 or more")
        if problems := soft_topk_problems(
            eps=eps,
            eps_init=eps_init,
            eps_decay=eps_decay,
            n_iters=n_iters,
            solver=solver,
            implementation=implementation,
            checkpoint_segments=triton_checkpoint_segments,
        ):
            raise ValueError("\n".join(problems))
        if route_block_size is not None and routing == "static":
            raise ValueError("route_block_size: static routing cuts the sequence itself; leave one of the two out")
        if routing not in ROUTINGS:
            raise ValueError(f"routing: {routing!r}; use one of {', '.join(ROUTINGS)}")
        self.route_groups = (num_routing_tokens,) if route_groups is None else tuple(route_groups)
        if sum(self.route_groups) != num_routing_tokens:
            raise ValueError(f"route_groups: {self.route_groups} do not sum to num_routing_tokens {num_routing_tokens}")
        self.dim = dim
        self.straight_through = straight_through
        self.n_iters = n_iters
        self.fetch_k_ratio = fetch_k_ratio
        self.eps = eps
        self.eps_decay = eps_decay
        self.eps_init = eps_init
        self.num_routing_tokens = num_routing_tokens
        self.cosine_sim_routing = cosine_sim_routing
        self.cosine_sim_scale = cosine_sim_scale
        self.route_block_size = route_block_size
        self.checkpoint_segments = triton_checkpoint_segments
        self.routing = routing
        self.solver = solver
        self.implementation = implementation
        self.random_seed = random_seed
        self.random_stream = random_stream
        self.noise = noise
        self.takes_routing_tokens = routing == "learned" and learned_routing_tokens
        self.routing_tokens: RoutingTokens | None = None
        if routing == "learned" and not learned_routing_tokens:
            self.routing_tokens = RoutingTokens(num_routing_tokens, dim, std=std, cosine_sim=cosine_sim_routing)
        elif not learned_routing_tokens:  # drawn and dropped: a control's other weights start as those beside a router
            normal_(torch.empty(num_routing_tokens, dim), std)

    def forward(
        self,
        x: Tensor,
        *,
        num_tokens: int,
        mask: Tensor | None = None,
        random_route: bool = False,
        routing_tokens: Tensor | None = None,
        keep_one_route_dim: bool = False,
    ) -> RouterReturn:
        """Route tokens.

        Args:
            x: (b, n, dim).
            num_tokens: how many tokens to route, 1 or more. n <= num_tokens: nothing is routed: indices None, scores 1,
                x and mask as they are (repeated over several routes).
            mask: (b, n) bool, True = valid; None: all.
            random_route: whether to pick at random among the unmasked tokens, from PyTorch's default generator, with
                scores
                1: a negative control.
            routing_tokens: (b, dim) or (b, r, dim), with learned_routing_tokens only.
            keep_one_route_dim: whether a single route keeps its dimension r = 1.

        Returns:
            `RouterReturn`.
        """
        if len(self.route_groups) > 1:
            raise ValueError(
                "a router with several groups is called through `route`, which takes a budget for each group"
            )
        route = self.route(
            x, budgets=(num_tokens,), mask=mask, random_route=random_route, routing_tokens=routing_tokens
        )[0]
        one_route = self.num_routing_tokens == 1 and not keep_one_route_dim
        indices, scores, routed_mask = route.indices, route.scores.to(x.dtype), route.mask
        if one_route:
            indices = None if indices is None else indices.squeeze(1)
            scores = scores.squeeze(1)
            routed_mask = None if routed_mask is None else routed_mask.squeeze(1)
        if indices is not None:
            tokens = gather_tokens(x, indices)
        else:
            tokens = x if one_route else x.unsqueeze(1).expand(-1, self.num_routing_tokens, -1, -1)
        return RouterReturn(indices, scores, tokens, routed_mask)

    def route(
        self,
        x: Tensor,
        *,
        budgets: Sequence[int],
        mask: Tensor | None = None,
        random_route: bool = False,
        routing_tokens: Tensor | None = None,
        sample_index: Tensor | None = None,
    ) -> list[Route]:
        """Route tokens with a budget for each group of routes, without gathering them.

        x is read once and, where all groups route, one soft top-k serves them all.

        Args:
            x: (b, n, dim).
            budgets: tokens to route, one number for each group.
            mask: (b, n) bool, True = valid; None: all.
            random_route: whether to pick at random, with scores 1, as a negative control.
            routing_tokens: (b, dim) or (b, r, dim), with learned_routing_tokens only.
            sample_index: (b,) int64, the samples' numbers, needed for routing="random" and, in training, for noise.

        Returns:
            A `Route` for each group.

        Raises:
            TypeError: an argument is no tensor, or a budget no whole number.
            ValueError: a budget is below 1, a tensor does not fit x, or routing_tokens are given to a router that has
                its own, or are missing.
        """
        self._check(x, budgets, mask, routing_tokens)
        length = x.shape[1]
        routed = any(budget < length for budget in budgets)
        scores, touch = self._scores(x, routing_tokens, routed)
        if routed and self.noise and self.training and self.routing == "learned" and not random_route:
            scores = scores + self._noise(x, sample_index).to(scores.dtype)
        pick_by, soft = scores, None
        if self.routing == "random" or random_route:
            pick_by = self._random_scores(x, sample_index)
        elif self.routing == "learned":
            soft = self._soft_scores(scores, budgets, mask)
        routes, first = [], 0
        for size, budget in zip(self.route_groups, budgets, strict=True):
            group = slice(first, first + size)
            first += size
            if length <= budget:
                routes.append(take_all(x, size, mask, touch))
                continue
            if self.routing == "static" and not random_route:
                indices = torch.arange(budget, device=x.device) * length // budget
                indices = indices.expand(x.shape[0], size, budget)
            else:
                indices = self._select(pick_by[:, group], budget, mask)
            routes.append(self._weigh(x, indices, None if soft is None else soft[:, group], mask, touch))
        return routes

    def _check(self, x: Tensor, budgets: Sequence[int], mask: Tensor | None, routing_tokens: Tensor | None) -> None:
        """Raise for arguments of `route` that do not fit."""
        check_tokens("x", x, self.dim)
        if len(budgets) != len(self.route_groups):
            raise ValueError(f"budgets: {len(budgets)} for {len(self.route_groups)} groups of routes; use one for each")
        for budget in budgets:
            check_counts(num_tokens=budget)
        check_mask("mask", mask, x.shape[:2], x)
        if self.takes_routing_tokens and routing_tokens is None:
            raise ValueError("routing_tokens: needed, because the router was built with learned_routing_tokens")
        if not self.takes_routing_tokens and routing_tokens is not None:
            raise ValueError("routing_tokens: this router has no use for them; build it with learned_routing_tokens")
        if routing_tokens is not None:
            check_tensor("routing_tokens", routing_tokens)
            check_device("routing_tokens", routing_tokens, x)
            b, r, dim = x.shape[0], self.num_routing_tokens, x.shape[-1]
            if routing_tokens.shape != (b, r, dim) and not (r == 1 and routing_tokens.shape == (b, dim)):
                raise ValueError(f"routing_tokens: {tuple(routing_tokens.shape)}; use {(b, r, dim)}, a vector a route")

    def _scores(self, x: Tensor, routing_tokens: Tensor | None, routed: bool) -> tuple[Tensor, Tensor | None]:
        """Raw scores (b, r, n), and a zero that depends on the learned vectors.

        The zero is added where their scores are not used, so that they have a gradient in every step whatever the
        input's length: ZeRO-3 applies the last step's to a parameter that has none.
        """
        if self.routing != "learned":
            return x.new_empty(0), None
        if self.routing_tokens is None:
            assert routing_tokens is not None
            if routing_tokens.dim() == 2:
                routing_tokens = routing_tokens.unsqueeze(1)
            scores = routing_scores(x, routing_tokens)
            if self.cosine_sim_routing:
                scores = cosine_similarity(scores, x, routing_tokens)
        else:
            scores = self.routing_tokens(x if routed else x[:, :1])
        if self.cosine_sim_routing:
            scores = scores * self.cosine_sim_scale
        return scores, 0.0 * scores[..., 0].sum()

    def _soft_scores(self, scores: Tensor, budgets: Sequence[int], mask: Tensor | None) -> Tensor | None:
        """Soft top-k (b, r, n) of the raw scores; 0 in groups that take all tokens and in what block routing cuts
        off."""
        length = scores.shape[-1]
        routed = [budget < length for budget in budgets]
        if not any(routed):
            return None
        groups = scores.split(self.route_groups, dim=1)
        if all(routed) and self.route_block_size is None:
            sums = [min(budget * self.fetch_k_ratio, length) for budget in budgets]
            k: float | Tensor = sums[0]
            if len(set(sums)) > 1:
                k = torch.cat(
                    [group.new_full(group.shape[:2], total) for group, total in zip(groups, sums, strict=True)], 1
                )
            return self._soft_topk(scores, k, mask)
        soft = []
        for group, budget, is_routed in zip(groups, budgets, routed, strict=True):
            if not is_routed:
                soft.append(torch.zeros_like(group))
                continue
            blocks, block_mask, num_tokens = self._blocks(group, budget, mask)
            part = self._soft_topk(blocks, min(num_tokens * self.fetch_k_ratio, blocks.shape[-1]), block_mask).flatten(
                2
            )
            soft.append(nn.functional.pad(part, (0, length - part.shape[-1])))
        return torch.cat(soft, dim=1)

    def _soft_topk(self, scores: Tensor, k: float | Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None and mask.dim() < scores.dim():
            mask = mask.unsqueeze(1)
        with routing_decision():
            soft = soft_topk(
                scores,
                k,
                mask=None if mask is None else mask.expand_as(scores),
                eps=self.eps,
                eps_init=self.eps_init,
                eps_decay=self.eps_decay,
                n_iters=self.n_iters,
                solver=self.solver,
                implementation=self.implementation,
                checkpoint_segments=self.checkpoint_segments,
            )
        return keep_value(soft) if self.implementation == "reference" else soft

    def _blocks(self, scores: Tensor, budget: int, mask: Tensor | None) -> tuple[Tensor, Tensor | None, int]:
        """Scores (b, r, n) -> (b, r, blocks, w), mask (b, n) -> (b, 1, blocks, w), and the tokens to pick from each
        block."""
        length = scores.shape[-1]
        width = length if self.route_block_size is None else self.route_block_size
        num_blocks = length // width
        if num_blocks == 0:
            raise ValueError(f"route_block_size: {width} is longer than the sequence of {length}; use {length} or less")
        whole = num_blocks * width
        blocks = scores[..., :whole].unflatten(-1, (num_blocks, width))
        block_mask = None if mask is None else mask[:, None, :whole].unflatten(-1, (num_blocks, width))
        return blocks, block_mask, min(math.ceil(budget / num_blocks), width)

    def _select(self, scores: Tensor, budget: int, mask: Tensor | None) -> Tensor:
        """Positions (b, r, m), ascending, of the largest scores (b, r, n) of each block."""
        blocks, block_mask, num_tokens = self._blocks(scores, budget, mask)
        if block_mask is not None:
            block_mask = block_mask.expand_as(blocks)
        with routing_decision():
            indices = select_topk(blocks, num_tokens, block_mask)
        first = torch.arange(blocks.shape[-2], device=scores.device) * blocks.shape[-1]
        return (indices + first.unsqueeze(-1)).flatten(2)

    def _random_scores(self, x: Tensor, sample_index: Tensor | None) -> Tensor:
        """Uniform numbers (b, r, n); without the samples' numbers from PyTorch's default generator."""
        check_sample_index(sample_index, x)
        if sample_index is not None:
            return self._uniform(x, sample_index)
        if self.routing == "random":
            raise ValueError("sample_index: needed for random routing, which is a function of the sample's number")
        return torch.rand(x.shape[0], self.num_routing_tokens, x.shape[1], device=x.device)

    def _uniform(self, x: Tensor, sample_index: Tensor) -> Tensor:
        """Numbers (b, r, n) in [0, 1), a function of seed, streams and the samples' numbers."""
        streams = range(self.random_stream, self.random_stream + self.num_routing_tokens)
        rows = [counter_uniform(sample_index, x.shape[1], stream=s, seed=self.random_seed) for s in streams]
        return torch.stack(rows, dim=1)

    def _noise(self, x: Tensor, sample_index: Tensor | None) -> Tensor:
        """Normal numbers (b, r, n) of standard deviation `noise`."""
        check_sample_index(sample_index, x)
        if sample_index is None:
            raise ValueError(
                "sample_index: needed for noise in training, which is a function of the sample's number; give it, call "
                "eval(), or leave noise at 0"
            )
        uniform = self._uniform(x, sample_index).clamp(min=2.0**-25)  # of multiples of 2^-24: no infinite quantile
        return self.noise * math.sqrt(2) * torch.erfinv(2 * uniform - 1)

    def _weigh(
        self, x: Tensor, indices: Tensor, soft: Tensor | None, mask: Tensor | None, touch: Tensor | None
    ) -> Route:
        """Scores and mask of the picked tokens."""
        routed_mask = None
        if mask is not None:
            routed_mask = mask.unsqueeze(1).expand(-1, indices.shape[1], -1).gather(-1, indices)
        if soft is not None:
            scores = soft.gather(-1, indices)
            if self.straight_through:
                scores = scores + (1.0 - scores).detach()
        else:
            dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
            scores = torch.ones(indices.shape, dtype=dtype, device=x.device)
            scores = scores if touch is None else scores + touch
        if routed_mask is not None:
            scores = scores.masked_fill(~routed_mask, 0.0)
        if soft is None:
            empty = torch.zeros(*indices.shape[:2], x.shape[1], dtype=scores.dtype, device=x.device)
            soft = empty.scatter(-1, indices, scores.detach())
        return Route(indices, scores, routed_mask, soft.detach())


def take_all(x: Tensor, size: int, mask: Tensor | None, touch: Tensor | None) -> Route:
    """The route that takes every token, masked ones too, with score 1."""
    ones = torch.ones(x.shape[0], size, x.shape[1], dtype=x.dtype, device=x.device)
    scores = ones if touch is None else ones + touch.to(x.dtype)
    return Route(None, scores, None if mask is None else mask.unsqueeze(1).expand(-1, size, -1), ones)

"""Conditional feed-forward: a light branch for every token, a heavy branch for the routed ones."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from colt5dist.nn.checks import budget, check_mask, check_tokens
from colt5dist.nn.dropout import Dropout, drop, parts_of
from colt5dist.nn.feed_forward import OUTPUT, FeedForward
from colt5dist.nn.norm import RMSNorm, norm_branch
from colt5dist.nn.routing.causal_router import CausalRouter
from colt5dist.nn.routing.gather_scatter import add_routed, gather_tokens
from colt5dist.nn.routing.router import CoordinateDescentRouter, Route
from colt5dist.nn.routing.router_kwargs import NO_KWARGS, router_arguments
from colt5dist.ops.checks import check_counts, check_optional_counts, check_positive


class ConditionalRoutedFeedForward(nn.Module):
    """Conditional feed-forward: a light branch for all tokens, a heavy branch for the routed ones.

    x (b, n, dim) -> light(x) + scatter(heavy(routed x) * score), without the residual (CoLT5, arXiv 2303.09752, section
    3.2). Arguments from routing on are not in colt5-attention.

    Args:
        dim: width of a token.
        num_heavy_tokens: budget, 1 or more: how many tokens the heavy branch sees.
        light_ff_mult: hidden size of the light feed-forward, in multiples of dim.
        heavy_ff_mult: hidden size of the heavy feed-forward, in multiples of dim.
        router_straight_through: whether routing scores are exactly 1 in the forward pass and carry the gradient of the
            soft scores; False: the soft scores multiply.
        router_kwargs: further arguments of the router (`CoordinateDescentRouter`), for instance {"eps": 1.0, "n_iters":
            50}.
        use_triton: whether the router uses the Triton kernels wherever the tokens are; False leaves the choice to the
            router: Triton on CUDA.
        routing: "topk": the best tokens of the whole sequence, as in colt5-attention. "causal", for decoders: the
            sequence is cut into windows of window_size tokens and num_heavy_tokens is the budget of a window. A token
            is admitted by a threshold that the windows before it set (`CausalRouter`), so that no output depends on a
            later token by one bit; in the first window nothing is routed.
        window_size: tokens of a window with routing="causal".
        light_hidden_dim: hidden size of the light branch itself; None: dim * light_ff_mult.
        heavy_hidden_dim: hidden size of the heavy branch itself; None: dim * heavy_ff_mult.
        gated: whether both branches use gated GELU, as T5.1.1 does, instead of GELU.
        bias: whether the linear maps of both branches have a bias.
        shared_norm: whether one RMSNorm serves the router and both branches. False: one in each branch, and none before
            the router.
        norm_eps: added to the mean square in RMSNorm; None: the smallest that is of use, as in colt5-attention.
        std: standard deviation of the initial weights; None: PyTorch's initialisation.
        output_std: the same of the second linear map of each branch.

    Raises:
        TypeError: an argument has the wrong type, such as a string for a number.
        ValueError: an argument has a wrong value; the message names it and says what to use.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heavy_tokens: int,
        light_ff_mult: float = 0.5,
        heavy_ff_mult: float = 4,
        router_straight_through: bool = True,
        router_kwargs: Mapping[str, Any] = NO_KWARGS,
        use_triton: bool = False,
        routing: str = "topk",
        window_size: int = 128,
        light_hidden_dim: int | None = None,
        heavy_hidden_dim: int | None = None,
        gated: bool = False,
        bias: bool = True,
        shared_norm: bool = False,
        norm_eps: float | None = None,
        std: float | None = None,
        output_std: float | None = None,
    ) -> None:
        super().__init__()
        check_counts(dim=dim, num_heavy_tokens=num_heavy_tokens, window_size=window_size)
        check_positive(light_ff_mult=light_ff_mult, heavy_ff_mult=heavy_ff_mult)
        check_optional_counts(light_hidden_dim=light_hidden_dim, heavy_hidden_dim=heavy_hidden_dim)
        self.dim = dim
        self.num_heavy_tokens = num_heavy_tokens
        router = router_arguments(router_kwargs, straight_through=router_straight_through, use_triton=use_triton)
        branch: dict[str, Any] = {
            "gated": gated,
            "bias": bias,
            "prenorm": not shared_norm,
            "norm_eps": norm_eps,
            "std": std,
            "output_std": output_std,
        }
        self.norm = RMSNorm(dim, eps=norm_eps) if shared_norm else nn.Identity()
        self.router: CoordinateDescentRouter
        if routing == "causal":
            self.router = CausalRouter(dim, window_size=window_size, **router)
        elif routing == "topk":
            self.router = CoordinateDescentRouter(dim, **router)
        else:
            raise ValueError(f"routing: {routing!r}; use topk or causal")
        self.light_ff = FeedForward(dim, light_ff_mult, hidden_dim=light_hidden_dim, **branch)
        self.heavy_ff = FeedForward(dim, heavy_ff_mult, hidden_dim=heavy_hidden_dim, **branch)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        num_heavy_tokens: int | None = None,
        *,
        sample_index: Tensor | None = None,
        return_route: bool = False,
        residual: bool = False,
        dropout: Dropout | None = None,
    ) -> Tensor | tuple[Tensor, Route]:
        """Both branches.

        Args:
            x: (b, n, dim).
            mask: (b, n) bool, True = valid; None: all. Refused with routing="causal", where padding has to be at the
                end.
            num_heavy_tokens: budget in place of the constructor's.
            sample_index: (b,) int64, the samples' numbers, needed for random routing and, in training, for noise.
            return_route: whether to return the routing too.
            residual: whether to add x to the result.
            dropout: of the hidden units of both branches (those of the heavy one by the number of the routed token)
                and, with residual, of what is added to x; None: none.

        Returns:
            (b, n, dim); with return_route a tuple of this and the `Route`.
        """
        check_tokens("x", x, self.dim)
        num_tokens = budget("num_heavy_tokens", num_heavy_tokens, self.num_heavy_tokens)
        residual_input, x = norm_branch(self.norm, x, residual=residual)
        if isinstance(self.router, CausalRouter):
            if mask is not None:
                raise ValueError("mask: causal routing takes none; put the padding at the end, where no token sees it")
            route = self.router.admit(x, (self.router.at_once(num_tokens),), sample_index=sample_index)[0]
        else:
            check_mask("mask", mask, x.shape[:2], x)
            route = self.router.route(x, budgets=(num_tokens,), mask=mask, sample_index=sample_index)[0]
        scores = route.scores.squeeze(1).unsqueeze(-1)
        light, heavy_part = parts_of(dropout, 2)
        out = self.light_ff(x, dropout=light)
        if route.indices is None:
            out = out + self.heavy_ff(x, dropout=heavy_part) * scores.to(out.dtype)
        else:
            indices = route.indices.squeeze(1)
            heavy = self.heavy_ff(gather_tokens(x, indices), dropout=heavy_part)
            out = add_routed(out, heavy * scores.to(heavy.dtype), indices)
        out = residual_input + drop(out, dropout, OUTPUT) if residual else out
        return (out, route) if return_route else out

"""What the routers did, as numbers to log: scores, saturation, coverage, overlap, positions."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from colt5dist.nn.routing.router import Route

ROUTER_NAMES = ("feed_forward", "query", "key_value")


class RoutedTokens(NamedTuple):
    """What one router picked.

    Args:
        indices: (b, m) int64.
        mask: (b, m) bool; False: a masked token, or none.
        soft_scores: (b, n).
    """

    indices: Tensor
    mask: Tensor
    soft_scores: Tensor


class LayerRouting(NamedTuple):
    """The three routers of one conditional layer."""

    feed_forward: RoutedTokens
    query: RoutedTokens
    key_value: RoutedTokens


def routed_tokens(route: Route) -> RoutedTokens:
    """The only route of a group, without gradient."""
    soft_scores = route.soft_scores[:, 0]
    if route.indices is None:
        indices = torch.arange(soft_scores.shape[-1], device=soft_scores.device).expand_as(soft_scores)
    else:
        indices = route.indices[:, 0]
    mask = torch.ones_like(indices, dtype=torch.bool) if route.mask is None else route.mask[:, 0]
    return RoutedTokens(indices, mask, soft_scores)


def _routers(routing: Sequence[LayerRouting]) -> Iterator[tuple[str, str, RoutedTokens]]:
    for number, layer in enumerate(routing):
        for name in ROUTER_NAMES:
            yield f"router/layer_{number:02d}/{name}", name, getattr(layer, name)


def _routed(tokens: RoutedTokens, input_mask: Tensor) -> Tensor:
    """(b, n) bool: the valid tokens that this router picked."""
    return torch.zeros_like(input_mask).scatter(-1, tokens.indices, tokens.mask) & input_mask


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return part.sum() / whole.sum().clamp(min=1)


@torch.no_grad()
def routing_statistics(routing: Sequence[LayerRouting], input_mask: Tensor | None = None) -> dict[str, Tensor]:
    """Scores, saturation, coverage and overlap of what the routers did.

    Args:
        routing: one entry per conditional layer; none for the dense encoder.
        input_mask: (b, n) bool, True = valid; None: all.

    Returns:
        Float32 scalars on the device of `routing`, without a host synchronisation. For each layer LL and each ROUTER of
        feed_forward, query, key_value:
        `router/layer_LL/ROUTER/mean_score`: mean soft score of the routed valid tokens;
        `router/layer_LL/ROUTER/clipped_share`: share of the valid tokens whose soft score is saturated at 1 (static and
        random routing have no soft score: their routed tokens count as 1, the others as 0);
        `router/layer_LL/query_key_value_overlap`: share of the routed queries that are also routed as keys/values;
        `router/unrouted_share/ROUTER`: share of the valid tokens that this router picked in no layer.
        Empty where routing is.
    """
    statistics: dict[str, Tensor] = {}
    if not routing:
        return statistics
    if input_mask is None:
        input_mask = torch.ones_like(routing[0].query.soft_scores, dtype=torch.bool)
    routed_anywhere = {name: torch.zeros_like(input_mask) for name in ROUTER_NAMES}
    for key, name, tokens in _routers(routing):
        routed = _routed(tokens, input_mask)
        routed_anywhere[name] |= routed
        statistics[f"{key}/mean_score"] = _share(tokens.soft_scores.float() * routed, routed)
        statistics[f"{key}/clipped_share"] = _share((tokens.soft_scores >= 1) & input_mask, input_mask)
    for number, layer in enumerate(routing):
        query, key_value = _routed(layer.query, input_mask), _routed(layer.key_value, input_mask)
        statistics[f"router/layer_{number:02d}/query_key_value_overlap"] = _share(query & key_value, query)
    for name, routed in routed_anywhere.items():
        statistics[f"router/unrouted_share/{name}"] = _share(input_mask & ~routed, input_mask)
    return statistics


@torch.no_grad()
def routed_position_histograms(
    routing: Sequence[LayerRouting], input_mask: Tensor | None = None, num_bins: int = 64
) -> dict[str, Tensor]:
    """Where in the input the routed tokens are.

    Args:
        routing: one entry per conditional layer; none for the dense encoder.
        input_mask: (b, n) bool, True = valid; None: all.
        num_bins: bins of a histogram. Bin i counts positions p with p * num_bins // length = i, where length is the
            sample's number of valid tokens.

    Returns:
        `router/layer_LL/ROUTER/positions` -> (num_bins,) int64, routed valid tokens by relative position.
    """
    histograms: dict[str, Tensor] = {}
    if not routing:
        return histograms
    if input_mask is None:
        input_mask = torch.ones_like(routing[0].query.soft_scores, dtype=torch.bool)
    length = input_mask.sum(dim=-1, keepdim=True).clamp(min=1)
    position = torch.arange(input_mask.shape[-1], device=input_mask.device)
    bins = (position * num_bins // length).clamp(max=num_bins - 1)
    for key, _, tokens in _routers(routing):
        # counted by addition of integers: bincount would wait for the device
        counts = torch.zeros(num_bins, dtype=torch.int64, device=bins.device)
        histograms[f"{key}/positions"] = counts.index_add(
            0, bins.flatten(), _routed(tokens, input_mask).flatten().to(torch.int64)
        )
    return histograms

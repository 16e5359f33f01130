"""What the conditional layers of the encoder and of the decoder-only model have in common: routers and their record."""

from typing import Any

import torch

from colt5dist.model.config import CoLT5Config
from colt5dist.model.routing_statistics import RoutedTokens
from colt5dist.nn.routing.router import Route


def router_settings(config: CoLT5Config, seed: int) -> dict[str, Any]:
    """Arguments of a layer's routers; seed: of random routing."""
    return {
        "n_iters": config.router_n_iters,
        "fetch_k_ratio": config.fetch_k_ratio,
        "eps": config.router_eps,
        "eps_init": config.router_eps_init,
        "eps_decay": config.router_eps_decay,
        "routing": config.routing,
        "solver": config.router_solver,
        "implementation": config.router_implementation,
        # the routers read normalised tokens: their scores start with variance 1
        "std": config.d_model**-0.5,
        "random_seed": seed,
    }


def routed_tokens(route: Route) -> RoutedTokens:
    """The only route of a group, without gradient."""
    soft_scores = route.soft_scores[:, 0]
    if route.indices is None:
        indices = torch.arange(soft_scores.shape[-1], device=soft_scores.device).expand_as(soft_scores)
    else:
        indices = route.indices[:, 0]
    mask = torch.ones_like(indices, dtype=torch.bool) if route.mask is None else route.mask[:, 0]
    return RoutedTokens(indices, mask, soft_scores)

"""The CoLT5 encoder-decoder and the decoder-only CausalCoLT5: configuration, parts, loss, what their routers did."""

from colt5dist.model.causal_colt5 import CausalCoLT5
from colt5dist.model.colt5 import CoLT5, CoLT5Output
from colt5dist.model.config import CoLT5Config
from colt5dist.model.routing_statistics import LayerRouting, routed_position_histograms, routing_statistics

__all__ = [
    "CausalCoLT5",
    "CoLT5",
    "CoLT5Config",
    "CoLT5Output",
    "LayerRouting",
    "routed_position_histograms",
    "routing_statistics",
]

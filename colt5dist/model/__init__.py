"""The CoLT5 encoder-decoder: its configuration, its parts, its loss, and what its routers did."""

from colt5dist.model.colt5 import CoLT5, CoLT5Output
from colt5dist.model.config import CoLT5Config
from colt5dist.model.routing_statistics import LayerRouting, routed_position_histograms, routing_statistics

__all__ = [
    "CoLT5",
    "CoLT5Config",
    "CoLT5Output",
    "LayerRouting",
    "routed_position_histograms",
    "routing_statistics",
]

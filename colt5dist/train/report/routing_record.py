"""The routers' statistics: a collapse, and what is routed where, can be seen in them."""

import torch

from colt5dist.model.colt5 import LayerRouting
from colt5dist.model.routing_statistics import routed_position_histograms, routing_statistics
from colt5dist.train.report.monitor import Monitor, Record


def record_routing(monitor: Monitor, step: int, routing: tuple[LayerRouting, ...], mask: torch.Tensor) -> Record:
    """Statistics of rank 0's last micro-batch of the step; the histograms go to TensorBoard at once.

    Returns:
        The scalars, for the step's record; empty on the other ranks.
    """
    if not monitor.is_first or not routing:
        return {}
    monitor.histograms(step, routed_position_histograms(routing, mask))
    statistics = routing_statistics(routing, mask)
    values = torch.stack([value.double() for value in statistics.values()]).tolist()  # one host read
    return dict(zip(statistics, values, strict=True))

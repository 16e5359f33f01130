"""The routers' statistics of a step: they show a collapse, and which positions are routed."""

import torch

from colt5dist.model.colt5 import LayerRouting
from colt5dist.model.routing_statistics import routed_position_histograms, routing_statistics
from colt5dist.train.report.monitor import Monitor, Record


def record_routing(monitor: Monitor, step: int, routing: tuple[LayerRouting, ...], mask: torch.Tensor) -> Record:
    """Compute the statistics of rank 0's last micro-batch of the step, and write the histograms to TensorBoard.

    Args:
        monitor: writes the histograms.
        step: number of the step.
        routing: decisions of every layer's routers; empty if they were not collected.
        mask: (batch, tokens) boolean, True for valid tokens.

    Returns:
        The scalars, for the step's record; empty on the other ranks.
    """
    if not monitor.is_first or not routing:
        return {}
    monitor.histograms(step, routed_position_histograms(routing, mask))
    statistics = routing_statistics(routing, mask)
    values = torch.stack([value.double() for value in statistics.values()]).tolist()  # one host read
    return dict(zip(statistics, values, strict=True))

"""All that a run works with."""

from dataclasses import dataclass
from pathlib import Path

from colt5dist.data import Sources, parse_mixture
from colt5dist.train.checkpoint import Saver, TrainerState
from colt5dist.train.config.schema import RunConfig
from colt5dist.train.engine.engine import Engine
from colt5dist.train.guard.heartbeat import Heartbeat
from colt5dist.train.guard.stop import StopRequests
from colt5dist.train.ranks import Ranks
from colt5dist.train.report.meter import Meter
from colt5dist.train.report.monitor import Monitor


@dataclass(kw_only=True)
class Run:
    """The parts of a run, made once at its start; what changes from step to step is in `state`."""

    config: RunConfig
    run_dir: Path
    ranks: Ranks
    shards: Sources
    engine: Engine
    state: TrainerState
    monitor: Monitor
    meter: Meter
    stop: StopRequests
    heartbeat: Heartbeat
    saver: Saver

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the denoising objectives."""
        return parse_mixture(self.config.data.mixture).names

"""All that a run works with."""

from dataclasses import dataclass
from pathlib import Path

from colt5dist.data import Sources, parse_mixture
from colt5dist.train.checkpoint import Saver, TrainerState
from colt5dist.train.config import RunConfig
from colt5dist.train.engine import Engine
from colt5dist.train.heartbeat import Heartbeat
from colt5dist.train.meter import Meter
from colt5dist.train.monitor import Monitor
from colt5dist.train.runtime import Ranks
from colt5dist.train.stop import StopRequests


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

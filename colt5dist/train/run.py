"""The parts that a run works with."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from colt5dist.data import ModelTokenizer, Sources, model_tokenizer, parse_mixture
from colt5dist.data.read.readers import Readers
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
    """The parts of a run, made once at its start; only `state` changes from step to step."""

    config: RunConfig
    """Its configuration."""
    run_dir: Path
    """Its folder."""
    ranks: Ranks
    """Place of this rank."""
    shards: Sources
    """The training and held-out text."""
    validation: dict[str, Sources] = field(default_factory=dict)
    """Further held-out text by name, each measured by itself."""
    readers: Readers | None
    """Makes the reader processes; None if this process reads itself."""
    engine: Engine
    """Model, optimizer and ZeRO."""
    state: TrainerState
    """Step, position in the data, and counts."""
    monitor: Monitor
    """Writes metrics.jsonl, TensorBoard and the console."""
    meter: Meter
    """Measures time and tokens per step."""
    stop: StopRequests
    """Collects requests to stop or save."""
    heartbeat: Heartbeat
    """Detects lost ranks."""
    saver: Saver
    """Writes checkpoints."""

    @cached_property
    def tokenizer(self) -> ModelTokenizer:
        """The tokenizer of the model."""
        return model_tokenizer(self.shards.tokenizer, self.config.data)

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the denoising objectives."""
        return parse_mixture(self.config.data.mixture).names

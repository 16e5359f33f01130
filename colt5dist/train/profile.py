"""A window of steps recorded with torch.profiler."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from colt5dist.train.config import ProfileConfig
from colt5dist.train.runtime import Ranks


class Profile:
    """Records the steps of `profile.steps` on rank 0 and writes a trace that a Chromium browser or Perfetto opens."""

    def __init__(self, config: ProfileConfig, run_dir: Path, ranks: Ranks) -> None:
        self.window = tuple(config.steps) if ranks.is_first else ()
        self.path = run_dir / "profile" / "trace.json"
        self._profiler: torch.profiler.profile | None = None

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around every step."""
        if self.window and step == self.window[0]:
            self._profiler = torch.profiler.profile()
            self._profiler.start()
        yield
        if self._profiler and step == self.window[1]:
            self._profiler.stop()
            self.path.parent.mkdir(exist_ok=True)
            self._profiler.export_chrome_trace(str(self.path))
            self._profiler = None

"""A window of steps recorded with torch.profiler."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from colt5dist.train.config.schema import ProfileConfig
from colt5dist.train.ranks import Ranks


class Profile:
    """Records the steps of `profile.steps` on rank 0 and writes a trace that a Chromium browser or Perfetto opens.

    A run that starts or ends inside the window records its part of it.

    Args:
        config: section `profile` of the configuration.
        run_dir: folder of the run.
        ranks: place of this rank.
    """

    def __init__(self, config: ProfileConfig, run_dir: Path, ranks: Ranks) -> None:
        self.window = range(config.steps[0], config.steps[1] + 1) if config.steps and ranks.is_first else range(0)
        self.path = run_dir / "profile" / "trace.json"
        self._profiler: torch.profiler.profile | None = None

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Wrap a step, and record it if it is in the window.

        Args:
            step: number of the step.
        """
        if step in self.window and self._profiler is None:
            self._profiler = torch.profiler.profile()
            self._profiler.start()
        yield
        if self.window and step == self.window[-1]:
            self.close()

    def close(self) -> None:
        """Write the trace; a profiler that is still running when Python exits would crash it."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        try:
            self.path.parent.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(self.path))
        except OSError as error:
            print(f"warning: {self.path} cannot be written ({error.strerror})", file=sys.stderr, flush=True)

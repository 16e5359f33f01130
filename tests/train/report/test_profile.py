"""A recorded window of steps is written on every way out of the training."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from colt5dist.train import loop
from colt5dist.train.config.schema import ProfileConfig
from colt5dist.train.ranks import Ranks
from colt5dist.train.report.profile import Profile


def test_an_error_in_the_window_closes_the_profiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that still runs when Python exits would crash it."""

    def fail(run: Any, profile: Profile) -> None:
        with profile.step(2):
            torch.ones(3).sum()
            raise ZeroDivisionError

    monkeypatch.setattr(loop, "train_steps", fail)
    ranks = Ranks(rank=0, local_rank=0, world_size=1, local_world_size=1)
    run: Any = SimpleNamespace(
        config=SimpleNamespace(profile=ProfileConfig(steps=[2, 5])), run_dir=tmp_path, ranks=ranks
    )
    with pytest.raises(ZeroDivisionError):
        loop.train(run)
    assert "aten::sum" in (tmp_path / "profile" / "trace.json").read_text()
    with torch.profiler.profile():  # fails while another one runs
        torch.ones(3).sum()

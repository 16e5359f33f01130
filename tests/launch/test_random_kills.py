"""Kills at random moments: a short version of tests/torture.py, in a file of its own because it takes minutes."""

from collections.abc import Callable
from pathlib import Path

from conftest import ROOT

ROUNDS = 4
"""Kills: at the start, in training and in saves, of either rank and of both; the last is of a real `deepspeed`."""


def test_kills_at_random_moments_change_no_loss(run_ranks: Callable[..., str], tmp_path: Path) -> None:
    """tests/torture.py: each start resumes from the newest whole checkpoint, and losses equal the undisturbed run's."""
    options = ("--rounds", str(ROUNDS), "--launcher-every", str(ROUNDS), "--seed", "1", "--output", str(tmp_path))
    printed = run_ranks(ROOT / "tests" / "torture.py", *options, processes=1)  # a fork, which has imported everything
    assert ", 0 of them differ from the undisturbed run" in printed

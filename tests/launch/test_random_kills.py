"""Kills at random moments: a short version of tests/torture.py, in a file of its own because it takes minutes."""

import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

ROUNDS = 4
"""Kills: at the start, in training and in saves, of either rank and of both; the last is of a real `deepspeed`."""


def test_kills_at_random_moments_change_no_loss(tmp_path: Path) -> None:
    """tests/torture.py: each start resumes from the newest whole checkpoint, and losses equal the undisturbed run's."""
    command = [sys.executable, str(ROOT / "tests" / "torture.py"), "--rounds", str(ROUNDS), "--launcher-every"]
    command += [str(ROUNDS), "--seed", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "torture")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=480,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert ", 0 of them differ from the undisturbed run" in done.stdout

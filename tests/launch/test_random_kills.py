"""Kills at random moments: a short version of tests/torture.py, in a file of its own because it takes minutes."""

import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

TORTURE_MINUTES = 1.0
"""Minutes of kills; with the undisturbed run that it is compared with, the test takes about two."""


def test_kills_at_random_moments_change_no_loss(tmp_path: Path) -> None:
    """tests/torture.py: each start resumes from the newest whole checkpoint, and losses equal the undisturbed run's."""
    command = [sys.executable, str(ROOT / "tests" / "torture.py"), "--minutes", str(TORTURE_MINUTES), "--seed", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "torture")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60 * TORTURE_MINUTES + 420,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert ", 0 of them differ from the undisturbed run" in done.stdout

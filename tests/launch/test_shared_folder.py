"""A start detects that the run directory is not the same folder on all hosts."""

import subprocess
import sys
from pathlib import Path

from conftest import trainer_environment


def test_hosts_that_see_different_folders_are_named(tmp_path: Path, micro_settings: tuple[str, ...]) -> None:
    torchrun = Path(sys.executable).parent / "torchrun"
    script = Path(__file__).with_name("elsewhere.py")
    command = [str(torchrun), "--standalone", "--nproc-per-node", "2", str(script), str(tmp_path), "run_dir=runs/x"]
    command += micro_settings
    done = subprocess.run(command, env=trainer_environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "is not the folder that host" in lines[0]
    assert "exitcode  : 2" in done.stderr
    assert not (tmp_path / "0" / "runs" / "x" / "config.yaml").exists()

"""The seed's layers under ZeRO-3 on two processes: every gradient is a plain module's, with activation checkpointing,
too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("zero3_layers.py")


@pytest.mark.slow
def test_gradients_are_those_of_plain_modules(tmp_path: Path) -> None:
    output = tmp_path / "differences.json"
    command = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [*command, str(SCRIPT), str(output)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    for mode, differences in json.loads(output.read_text()).items():
        assert len(differences) > 50
        wrong = {name: value for name, value in differences.items() if not value < 1e-4}
        assert wrong == {}, mode

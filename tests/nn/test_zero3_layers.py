"""The layers of colt5-attention under ZeRO-3 on two processes: every gradient is a plain module's.

With activation checkpointing, too."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("zero3_layers.py")


@pytest.mark.slow
def test_gradients_are_those_of_plain_modules(tmp_path: Path, run_ranks: Callable[..., str]) -> None:
    output = tmp_path / "differences.json"
    run_ranks(SCRIPT, str(output), processes=2)
    for mode, differences in json.loads(output.read_text()).items():
        assert len(differences) > 50
        wrong = {name: value for name, value in differences.items() if not value < 1e-4}
        assert wrong == {}, mode

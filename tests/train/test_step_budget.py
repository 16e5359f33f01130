"""A step's budget of dispatched operators and of host reads: a slip in the hot path shows here, without a GPU."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("step_budget.py")
OPERATORS = 4100
"""For two micro-batches of the micro model (2 encoder layers, 1 decoder layer); 3,924 with PyTorch 2.13."""
READS = 7
"""Two count the targets of the micro-batches, which are on the host anyway; one is the ranks' agreement, which on a GPU
is the only wait; the others are AdamW's on CPUs, and a mask's."""


@pytest.mark.parametrize("stage", ["1", "2"])
def test_a_step_keeps_to_its_budget(
    run_ranks: Callable[..., str], tmp_path: Path, micro_settings: tuple[str, ...], stage: str
) -> None:
    output = tmp_path / "budget.json"
    run_ranks(SCRIPT, str(output), *micro_settings, "train.micro_batch_size=4", processes=1)
    found = json.loads(output.read_text())[stage]
    assert found["micro_batches"] == 2
    assert found["operators"] <= OPERATORS, found["names"]
    assert found["reads"] <= READS, found["names"]

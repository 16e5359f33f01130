"""train.deterministic: equal settings give equal bits, and the committed trace.

The committed trace is compared to the bit if torch, numpy and the CPU are the same as when it was written. Elsewhere
that is impossible: matrix products and sums are split by the width of the CPU's vectors and depend on the libraries, so
float32 rounds in another order. Measured: without vector instructions (ATEN_CPU_CAPABILITY=default against AVX2) the 50
losses differ by up to 2e-8 of their value and the gradient norms by 1e-7. The tolerances 1e-5 and 1e-4 allow for other
libraries, while another seed changes the first loss by 4e-4, and a warm-up of 5 steps instead of 4 changes the second
by 1e-3.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("reference_trace.py")
REFERENCE = Path(__file__).with_name("reference_trace.json")


def run_trace(output: Path, *options: str) -> dict[str, Any]:
    """Run reference_trace.py in a new process."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(output), *options], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def trace(run_ranks: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Fifty steps on this machine."""
    output = tmp_path_factory.mktemp("trace") / "trace.json"
    run_ranks(SCRIPT, str(output), processes=1)
    return json.loads(output.read_text())


def test_the_committed_trace(trace: dict[str, Any]) -> None:
    """See above; `python tests/train/reference_trace.py tests/train/reference_trace.json` writes a new one."""
    reference = json.loads(REFERENCE.read_text())
    losses, norms = zip(*trace["loss_and_gradient_norm"], strict=True)
    expected_losses, expected_norms = zip(*reference["loss_and_gradient_norm"], strict=True)
    assert len(losses) == 50
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert norms == pytest.approx(expected_norms, rel=1e-4)
    if trace["environment"] == reference["environment"]:
        assert (losses, norms) == (expected_losses, expected_norms)


def test_equal_settings_give_equal_bits(trace: dict[str, Any], tmp_path: Path) -> None:
    """The first ten steps in a second process, with another hash seed and other addresses in memory."""
    again = run_trace(tmp_path / "again.json", "--steps", "10")
    assert again["loss_and_gradient_norm"] == trace["loss_and_gradient_norm"][:10]

"""The lines at the end of a run."""

import json
from pathlib import Path
from typing import Any

import pytest

from colt5dist.train.checkpoint import TrainerState
from colt5dist.train.report.summary import summary


def lines_of(run_dir: Path, record: dict[str, Any], unigram_entropy: float) -> list[str]:
    """The summary of a run with one evaluation."""
    (run_dir / "metrics.jsonl").write_text(json.dumps({"step": 1, **record}) + "\n")
    state = TrainerState(step=1, first_held_out_loss=5.0)
    text = summary(run_dir, state, None, unigram_entropy=unigram_entropy, tokens_per_second=None)
    return text.splitlines()


def test_held_out_figures(tmp_path: Path) -> None:
    record = {"eval/loss": 3.0, "eval/bits_per_byte": 4.5, "eval/loss_shuffled_inputs": 3.3}
    lines = lines_of(tmp_path, record, 4.0)
    assert "unigram entropy of the held-out tokens: 4.0000; the loss is 25.0% below it" in lines
    assert any(line.startswith("held-out bits per byte of target text: 4.5000 (") for line in lines)
    assert any("another sample's input: 3.3000 (+10.0%" in line for line in lines)


def test_the_averaged_weights_are_no_validation_set(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, {"eval/loss": 3.0, "eval/ema/loss": 2.5, "eval/code/loss": 2.0}, 4.0)
    assert "held-out loss of the averaged weights (train.ema): 2.5000" in lines
    assert "held-out loss of each validation set: code 2.0000" in lines
    lines = lines_of(tmp_path, {"eval/loss": 3.0, "eval/ema/loss": None}, 4.0)
    assert "held-out loss of the averaged weights (train.ema): not finite" in lines
    assert not any("validation set" in line for line in lines)


def test_a_run_that_stopped_says_how_to_go_on(tmp_path: Path) -> None:
    text = summary(tmp_path, TrainerState(step=4), "signal", unigram_entropy=1.0, tokens_per_second=None)
    assert text.splitlines()[0] == "stopped at step 4 (signal); the same command continues it"


@pytest.mark.parametrize("loss", [0.0, 3.0])
def test_targets_without_a_known_token(tmp_path: Path, loss: float) -> None:
    """No byte of text, and one token only: the lines say what could not be measured, and why."""
    record = {"eval/loss": loss, "eval/bits_per_byte": None, "eval/loss_shuffled_inputs": 3.3}
    lines = lines_of(tmp_path, record, 0.0)
    assert lines[1].startswith("held-out loss: 5.0000 before, ")
    assert any("the held-out targets hold no byte of text" in line for line in lines)
    assert any("all target tokens are the same" in line for line in lines)

"""Whole runs in one process with numbers made bad on purpose; started by test_health.py.

    python tests/train/health_runs.py OUTPUT FOLDER SETTING...

Writes, for each run, the exit status of every start, its last checkpoint's state and what it printed.
"""

import contextlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from colt5dist.train.engine import Engine

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "launch"))
from pretrain import main

WINDOW = ("health.spike_window=4", "checkpoint.every_steps=3")
BACK = (*WINDOW, "health.on_spike=rollback", "health.skip_steps=2")

Change = Callable[[torch.Tensor], torch.Tensor]
Start = tuple[tuple[str, ...], bool]
"""Settings of a start, and whether the samples of the run are bad."""


def high(loss: torch.Tensor) -> torch.Tensor:
    """A loss that is a spike, without a gradient of its own."""
    return loss + 5000


def not_finite(loss: torch.Tensor) -> torch.Tensor:
    """A loss and gradients that are NaN."""
    return loss * float("nan")


RUNS: dict[str, tuple[range, Change, list[Start]]] = {
    # sample 40 is of step 6
    "warned": (range(40, 41), high, [((*WINDOW, "train.steps=8"), True)]),
    "warned, resumed": (
        range(40, 41),
        high,
        [((*WINDOW, "train.steps=5"), True), ((*WINDOW, "train.steps=8"), True)],
    ),
    "rolled back": (range(40, 41), high, [((*BACK, "train.steps=8"), True)]),
    "rolled back, resumed": (
        range(40, 41),
        high,
        [((*BACK, "train.steps=6"), True), ((*BACK, "train.steps=8"), True)],
    ),
    **{
        f"rolled back, stage {name}": (range(40, 41), high, [((*BACK, "train.steps=8", *own), True)])
        for name, own in {
            "0": ("zero.stage=0",),
            "2": ("zero.stage=2",),
            "3": ("zero.stage=3",),
            "3 offloaded": ("zero.stage=3", "zero.offload=optimizer"),
        }.items()
    },
    "skipping": (range(0), high, [((*BACK, "train.steps=8", "data.skip=[[32,48]]"), False)]),
    "no checkpoint": (range(40, 41), high, [((*BACK, "train.steps=6", "checkpoint.every_steps=100"), True)]),
    "used up": (range(40, 41), high, [((*BACK, "train.steps=6", "health.max_rollbacks=0"), True)]),
    # the third step on
    "given up": (
        range(16, 1000),
        not_finite,
        [
            (("checkpoint.every_steps=2", "health.max_skipped=3", "train.steps=9"), True),
            (("checkpoint.every_steps=2", "health.max_skipped=3", "train.steps=9"), True),
            (("checkpoint.every_steps=2", "health.max_skipped=3", "train.steps=9", "data.skip=[[16,40]]"), False),
        ],
    ),
}


def last_state(run_dir: Path) -> tuple[str, Any]:
    """Name and state of the newest checkpoint."""
    folder = max((run_dir / "checkpoints").glob("step_*"))
    return folder.name, json.loads((folder / "trainer.json").read_text())["state"]


def run(run_dir: Path, settings: list[str], bad: range, change: Change, starts: list[Start]) -> dict[str, Any]:
    """Start a run as often as told."""
    forward = Engine.forward
    spoilt = True

    def bad_forward(engine: Engine, batch: Any, **options: Any) -> Any:
        output = forward(engine, batch, **options)
        rows = torch.tensor([spoilt and int(number) in bad for number in batch["sample_index"]])
        if not rows.any() or not torch.is_grad_enabled():
            return output
        first = (torch.arange(output.token_loss.shape[1]) == 0) & rows[:, None]
        return output._replace(token_loss=torch.where(first, change(output.token_loss), output.token_loss))

    result: dict[str, Any] = {"starts": []}
    for own, spoilt in starts:  # noqa: B007 (bad_forward reads it)
        printed, errors = io.StringIO(), io.StringIO()
        with (
            patch.object(Engine, "forward", bad_forward),
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(errors),
        ):
            status = main([f"run_dir={run_dir}", *settings, *own])
        checkpoint, state = last_state(run_dir)
        result["starts"].append(
            {
                "status": status,
                "printed": printed.getvalue(),
                "errors": errors.getvalue(),
                "checkpoint": checkpoint,
                "state": state,
                "status.json": json.loads((run_dir / "status.json").read_text()),
            }
        )
    return result


if __name__ == "__main__":
    output, folder, *settings = sys.argv[1:]
    # one process group for all runs: DeepSpeed cannot make a second one in a process
    with patch("colt5dist.train.pretrain.finish_process_group", lambda: None):
        results = {
            name: run(Path(folder) / name.replace(", ", "-").replace(" ", "-"), settings, *what)
            for name, what in RUNS.items()
        }
    Path(output).write_text(json.dumps(results))
    torch.distributed.destroy_process_group()

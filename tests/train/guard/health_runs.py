"""Complete runs in one process, with losses changed on purpose; started by test_health.py.

    python tests/train/guard/health_runs.py OUTPUT FOLDER SETTING...

Writes, for each run, the exit status of every start, its last checkpoint's state and what it printed.
"""

import contextlib
import gc
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from colt5dist.train.checkpoint import Saver, TrainerState
from colt5dist.train.checkpoint import save as saver
from colt5dist.train.engine.engine import Engine
from colt5dist.train.report.monitor import Monitor

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "launch"))
from pretrain import main

MODEL = ("model.num_encoder_layers=1", "train.micro_batch_size=8")
"""Settings of all runs that do not say otherwise: what is tested depends on neither, and a step takes a third."""
TWO_MICRO_BATCHES = "train.micro_batch_size=4"
WINDOW = ("health.spike_window=4", "checkpoint.every_steps=3")
BACK = (*WINDOW, "health.on_spike=rollback", "health.skip_steps=2")
GIVEN_UP = ("checkpoint.every_steps=2", "health.max_skipped=3", "train.steps=9", TWO_MICRO_BATCHES)
BESIDE = "checkpoint.asynchronous=true"

Change = Callable[[torch.Tensor], torch.Tensor]
Start = tuple[tuple[str, ...], bool]
"""Settings of a start, and whether the samples of the run are bad."""


def high(loss: torch.Tensor) -> torch.Tensor:
    """A loss that is a spike, with unchanged gradients."""
    return loss + 5000


def not_finite(loss: torch.Tensor) -> torch.Tensor:
    """A loss and gradients that are NaN."""
    return loss * float("nan")


@contextlib.contextmanager
def writing_is_held() -> Iterator[None]:
    """A save in the background writes nothing until the run waits for it."""
    write, finish = saver.write_rank_file, Saver.finish
    awaited = threading.Event()

    def write_later(*arguments: Any, **options: Any) -> Any:
        if threading.current_thread().name == "checkpoint":
            assert awaited.wait(60), "the run does not wait for the save"
            awaited.clear()
        return write(*arguments, **options)

    def finish_all(self: Saver, **options: Any) -> None:
        if self._save is not None:
            awaited.set()
        finish(self, **options)

    with patch.object(saver, "write_rank_file", write_later), patch.object(Saver, "finish", finish_all):
        yield


@contextlib.contextmanager
def stop_in_a_save() -> Iterator[None]:
    """Like `writing_is_held`; a signal asks the run to stop once the first save in the background has started."""
    save = Saver.save

    def save_and_ask(self: Saver, *arguments: Any, **options: Any) -> None:
        save(self, *arguments, **options)
        if self._save is not None:
            os.kill(os.getpid(), signal.SIGTERM)

    with writing_is_held(), patch.object(Saver, "save", save_and_ask):
        yield


@contextlib.contextmanager
def first_write_fails() -> Iterator[None]:
    """The first save fails for lack of space."""
    write = saver.write_rank_file
    failures = iter([OSError(28, "No space left on device")])

    def write_once(*arguments: Any, **options: Any) -> Any:
        for failure in failures:
            raise failure
        return write(*arguments, **options)

    with patch.object(saver, "write_rank_file", write_once):
        yield


@contextlib.contextmanager
def checkpoint_of_step_4_is_damaged() -> Iterator[None]:
    """A byte in its weights or moments changes after it was written."""
    save = Saver.save

    def save_and_damage(self: Saver, state: TrainerState, **options: Any) -> None:
        save(self, state, **options)
        path = self.root / "step_00000004" / "rank_00000.safetensors"
        if state.step == 4:
            content = bytearray(path.read_bytes())
            content[-100] ^= 1
            path.write_bytes(content)

    with patch.object(Saver, "save", save_and_damage):
        yield


@contextlib.contextmanager
def stop_in_a_rollback() -> Iterator[None]:
    """A signal arrives during the first rollback, before the data is opened again."""
    roll_back = Monitor.roll_back
    signals = iter([signal.SIGTERM])

    def roll_back_and_ask(self: Monitor, step: int) -> None:
        roll_back(self, step)
        for number in signals:
            os.kill(os.getpid(), number)

    with patch.object(Monitor, "roll_back", roll_back_and_ask):
        yield


CIRCUMSTANCES: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "rolled back, beside a save": writing_is_held,
    "no checkpoint, beside a save": first_write_fails,
    "given up, beside a save": writing_is_held,
    "stopped, beside a save": stop_in_a_save,
    "rolled back, stopped there": stop_in_a_rollback,
    "rolled back, past a damaged checkpoint": checkpoint_of_step_4_is_damaged,
}

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
    # the save of step 3 is in progress until the rollback of step 6
    "rolled back, beside a save": (range(40, 41), high, [((*BACK, "train.steps=8", BESIDE), True)]),
    "no checkpoint, beside a save": (
        range(40, 41),
        high,
        [((*BACK, "train.steps=6", "checkpoint.every_steps=5", BESIDE), True)],
    ),
    "stopped, beside a save": (range(0), high, [((*BACK, "train.steps=8", BESIDE), False)]),
    "rolled back, past a damaged checkpoint": (
        range(40, 41),
        high,
        [((*BACK, "train.steps=8", "checkpoint.every_steps=2"), True)],
    ),
    "rolled back, stopped there": (range(40, 41), high, [((*BACK, "train.steps=8"), True)] * 2),
    "given up, beside a save": (
        range(16, 1000),
        not_finite,
        [(("checkpoint.every_steps=4", "health.max_skipped=3", "train.steps=9", BESIDE), True)],
    ),
    # bad from the third step on
    "given up": (
        range(16, 1000),
        not_finite,
        [
            (GIVEN_UP, True),
            (GIVEN_UP, True),
            ((*GIVEN_UP, "data.skip=[[16,40]]"), False),
        ],
    ),
}


def last_state(run_dir: Path) -> tuple[str, Any]:
    """Return name and state of the newest checkpoint."""
    folder = max((run_dir / "checkpoints").glob("step_*"))
    return folder.name, json.loads((folder / "trainer.json").read_text())["state"]


def run(
    run_dir: Path,
    settings: list[str],
    bad: range,
    change: Change,
    starts: list[Start],
    circumstances: contextlib.AbstractContextManager[None],
) -> dict[str, Any]:
    """Make all starts of a run; returns the outcome of each."""
    forward = Engine.forward
    damaged = True

    def bad_forward(engine: Engine, batch: Any, **options: Any) -> Any:
        output = forward(engine, batch, **options)
        rows = torch.tensor([damaged and int(number) in bad for number in batch["sample_index"]])
        if not rows.any() or not torch.is_grad_enabled():
            return output
        first = (torch.arange(output.token_loss.shape[1]) == 0) & rows[:, None]
        return output._replace(token_loss=torch.where(first, change(output.token_loss), output.token_loss))

    result: dict[str, Any] = {"starts": []}
    with circumstances, patch.object(Engine, "forward", bad_forward):
        for own, damaged in starts:  # noqa: B007 (bad_forward reads it)
            printed, errors = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
                status = main([f"run_dir={run_dir}", *settings, *MODEL, *own])
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
    # what was imported stays frozen: each of the runs' collections would look through it
    gc.freeze()
    with (
        patch("colt5dist.train.pretrain.finish_process_group", lambda: None),
        patch("colt5dist.train.garbage.gc.unfreeze", lambda: None),
    ):
        results = {
            name: run(
                Path(folder) / name.replace(", ", "-").replace(" ", "-"),
                settings,
                *what,
                CIRCUMSTANCES.get(name, contextlib.nullcontext)(),
            )
            for name, what in RUNS.items()
        }
    Path(output).write_text(json.dumps(results))
    torch.distributed.destroy_process_group()

"""Runs that record the order of their calls; started by test_watched_runs.py.

    torchrun --nproc-per-node 2 tests/train/guard/watched_runs.py FOLDER SETTING...

First a run that only the last rank's time limit stops, then the same run to its end. Lengths change at step 3. At last
a run in which the reader process of the last rank is killed after step 2. Each rank writes its calls, and how its
starts ended, to FOLDER/rank_N.json.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import psutil

from colt5dist.data.read.loader import DataWorkerError
from colt5dist.train import loop
from colt5dist.train.checkpoint import Saver
from colt5dist.train.engine.engine import Engine
from colt5dist.train.guard import heartbeat
from colt5dist.train.guard.heartbeat import Heartbeat
from colt5dist.train.losses import LossSums
from colt5dist.train.ranks import barrier, ranks_from_environment
from colt5dist.train.read_ahead import ReadAhead

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "launch"))
from pretrain import main

RANKS = ranks_from_environment()
IS_LAST = RANKS.rank == RANKS.world_size - 1
WATCHED: list[tuple[str, Any, str]] = [
    ("held-out samples", loop, "held_out_batches"),
    ("open", loop, "training_batches"),
    ("read", ReadAhead, "read"),
    ("forward", Engine, "forward"),
    ("agree", LossSums, "read"),
    ("step", Engine, "step"),
    ("save", Saver, "save"),
]
"""The recorded calls: name in the results, owner and name of the function."""


@contextmanager
def watched(seen: list[list[Any]]) -> Iterator[None]:
    """Append each call to `seen`, with the place, step and timeout that the heartbeat was told before it."""
    told: dict[str, Any] = {"place": "", "step": 0, "timeout": None}
    at, set_timeout = Heartbeat.at, heartbeat.set_collective_timeout

    def tell(self: Heartbeat, place: str, step: int) -> None:
        told.update(place=place, step=step)
        at(self, place, step)

    def tell_timeout(seconds: float) -> None:
        told["timeout"] = seconds
        set_timeout(seconds)

    def noting(what: str, call: Any) -> Any:
        def noted(*arguments: Any, **options: Any) -> Any:
            seen.append([what, *told.values()])
            return call(*arguments, **options)

        return noted

    with ExitStack() as stack:
        stack.enter_context(patch.object(Heartbeat, "at", tell))
        stack.enter_context(patch.object(heartbeat, "set_collective_timeout", tell_timeout))
        for what, owner, name in WATCHED:
            stack.enter_context(patch.object(owner, name, noting(what, getattr(owner, name))))
        yield


@contextmanager
def clock(minutes_per_step: float) -> Iterator[None]:
    """Replace the clock of train.max_minutes: it advances on the last rank only, by `minutes_per_step`."""
    now = [0.0]
    step = Engine.step

    def step_and_advance(self: Engine, rate: float) -> Any:
        outcome = step(self, rate)
        now[0] += 60 * minutes_per_step * IS_LAST
        return outcome

    # the process has just begun
    clock_of_stops = SimpleNamespace(monotonic=lambda: now[0], CLOCK_BOOTTIME=0, clock_gettime=lambda clock: 0.0)
    with (
        patch("colt5dist.train.guard.stop.time", clock_of_stops),
        patch.object(Engine, "step", step_and_advance),
    ):
        yield


@contextmanager
def reader_is_killed(after_step: int) -> Iterator[None]:
    """Kill the last rank's reader processes, as a system without free memory does."""
    step = Engine.step
    steps_left = [after_step]

    def step_and_kill(self: Engine, rate: float) -> Any:
        outcome = step(self, rate)
        steps_left[0] -= 1
        if IS_LAST and steps_left[0] == 0:
            for starter in psutil.Process().children():
                for reader in starter.children():
                    reader.kill()
        return outcome

    with patch.object(Engine, "step", step_and_kill):
        yield


def run_all(folder: Path, settings: list[str]) -> dict[str, Any]:
    """Make all runs; returns how their starts ended, and the calls of the first run's starts."""
    stopped = [f"run_dir={folder / 'stopped'}", *settings, "data.num_workers=0"]
    lost = [f"run_dir={folder / 'lost'}", *settings, "data.num_workers=1", "train.steps=1000"]
    seen: tuple[list[list[Any]], list[list[Any]]] = ([], [])
    ended: list[Any] = []
    # one process group for all runs: DeepSpeed cannot make a second one in a process
    with patch("colt5dist.train.pretrain.finish_process_group", lambda: None):
        with clock(minutes_per_step=31), watched(seen[0]):
            ended.append(main([*stopped, "train.max_minutes=60"]))
        barrier()  # the first rank has written status.json
        status = json.loads((folder / "stopped" / "status.json").read_text())
        barrier()  # all ranks have read it; the next start removes it
        with watched(seen[1]):
            ended.append(main([*stopped, "checkpoint.every_steps=2"]))
    try:
        with reader_is_killed(after_step=2):
            ended.append(main(lost))
    except DataWorkerError as error:
        ended.append(f"DataWorkerError: {error}")
    return {"ended": ended, "seen": seen, "status": status}


if __name__ == "__main__":
    results = run_all(Path(sys.argv[1]), sys.argv[2:])
    (Path(sys.argv[1]) / f"rank_{RANKS.rank}.json").write_text(json.dumps(results))

"""The order of the trainer's work: stopping at the time limit, progress told to the heartbeat, ending without data."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from colt5dist.train.checkpoint import find_checkpoints
from colt5dist.train.report.monitor import read_metrics

SCRIPT = Path(__file__).with_name("watched_runs.py")
LONG, SHORT = 20 * 60 + 60, 500 + 60
"""Timeouts of collective operations in seconds, while train.timeout_minutes or train.timeout_seconds counts."""
SETTINGS = (
    "train.timeout_minutes=20",
    "train.timeout_seconds=500",
    "train.steps=6",
    "train.eval_samples=2",
    "train.routing_every=0",
    "train.eval_shuffled_inputs=false",
    "checkpoint.every_steps=0",
    "checkpoint.keep_last=9",
    "data.length_schedule=[{step: 3, input_length: 128, target_length: 32}]",
)


class Watched:
    """Results of watched_runs.py on two processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ranks: list[dict[str, Any]] = [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in (0, 1)]

    def ended(self, start: int) -> list[Any]:
        """Return the exit status, or the error, of a start on each rank."""
        return [rank["ended"][start] for rank in self.ranks]

    def checkpoints(self, run: str) -> list[str]:
        """Return the names of a run's whole checkpoints; there must be no others."""
        whole, damaged = find_checkpoints(self.folder / run / "checkpoints")
        assert not damaged
        return [folder.name for folder in whole]


@pytest.fixture(scope="module")
def watched(
    tmp_path_factory: pytest.TempPathFactory,
    micro_settings: tuple[str, ...],
    short_texts: Path,
    run_ranks: Callable[..., str],
) -> Watched:
    """All runs, in one start of the script."""
    folder = tmp_path_factory.mktemp("watched")
    run_ranks(SCRIPT, str(folder), *micro_settings, f"data.shards={short_texts}", *SETTINGS, processes=2)
    return Watched(folder)


def test_the_time_limit_on_one_rank_stops_all_with_a_checkpoint(watched: Watched) -> None:
    """62 minutes have passed after step 2, the limit is 60: step 3 is the last one, is saved, and is resumed from."""
    assert watched.ended(0) == [75, 75]
    assert watched.ranks[0]["status"] == {"status": "stopped", "step": 3, "reason": "train.max_minutes"}
    assert watched.ended(1) == [0, 0]
    assert watched.checkpoints("stopped") == [f"step_{step:08d}" for step in (3, 4, 6)]
    assert [record["step"] for record in read_metrics(watched.folder / "stopped")] == [1, 2, 3, 4, 5, 6]


def a_step(step: int, timeout: int, *, is_last: bool = False) -> list[list[Any]]:
    """The calls in a step of one micro-batch, each with the place, step and timeout of the heartbeat."""
    wait = [] if is_last else [["read", "waiting for data", step, timeout]]
    agreeing = "agreeing on the step"
    own = [["agree", agreeing, step, timeout], ["step", agreeing, step, timeout]]
    return [["forward", "training", step, timeout], *wait, *own]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_heartbeat_is_told_of_every_part_of_a_run(watched: Watched, rank: int) -> None:
    """The long timeout counts for the first step of a start and of new lengths, while data is opened, and in saves.

    The short one counts at all other times.
    """
    first, second = watched.ranks[rank]["seen"]
    assert first == [
        ["held-out samples", "reading the held-out samples", 1, LONG],
        ["forward", "evaluating", 0, LONG],
        ["agree", "evaluating", 0, LONG],
        ["open", "opening the data", 1, LONG],
        ["read", "opening the data", 1, LONG],
        *a_step(1, LONG),
        *a_step(2, SHORT),
        ["held-out samples", "reading the held-out samples", 3, LONG],
        *a_step(3, LONG),
        ["save", "saving", 3, LONG],
    ]
    assert second == [
        ["held-out samples", "reading the held-out samples", 4, LONG],
        ["open", "opening the data", 4, LONG],
        ["read", "opening the data", 4, LONG],
        *a_step(4, LONG),
        ["save", "saving", 4, LONG],
        *a_step(5, SHORT),
        *a_step(6, SHORT, is_last=True),
        ["forward", "evaluating", 6, SHORT],
        ["agree", "evaluating", 6, SHORT],
        ["save", "saving", 6, LONG],
    ]


def test_a_killed_reader_of_one_rank_ends_all_with_a_checkpoint(watched: Watched) -> None:
    """Both ranks end with the same error, which names the rank; the last step is in a whole checkpoint."""
    error, other = watched.ended(2)
    assert error == other and error.startswith("DataWorkerError: rank 1: a reader process of rank 1 ended (")
    for rank in (0, 1):
        assert error in (watched.folder / "lost" / "failures" / f"rank_{rank}.txt").read_text()
    status = json.loads((watched.folder / "lost" / "status.json").read_text())
    last = read_metrics(watched.folder / "lost")[-1]["step"]
    assert status["status"] == "failed" and status["step"] == last >= 2 and error in status["reason"]
    assert watched.checkpoints("lost") == [f"step_{last:08d}"]

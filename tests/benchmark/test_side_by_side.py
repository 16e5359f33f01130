"""Runs of the trainer side by side: which GPU each gets, that they train at once, are stopped, and continue."""

import sys
import time

import pytest
import torch

from colt5dist.benchmark import side_by_side
from colt5dist.errors import ConfigError
from colt5dist.train.report.monitor import read_metrics


def test_runs_whose_settings_changed_are_refused(tmp_path):
    side_by_side.check_unchanged({"a": ["x=1", "y=2"]}, tmp_path / "settings.json")
    with pytest.raises(ConfigError, match=r"a was started with other settings \(x=1, x=3\)"):
        side_by_side.check_unchanged({"a": ["x=3", "y=2"]}, tmp_path / "settings.json")


@pytest.mark.parametrize(
    ("count", "named", "expected"),
    [
        (0, None, [None]),
        (2, None, ["0", "1"]),
        (2, "5, GPU-8f", ["5", "GPU-8f"]),
        (1, "3,-1,4", ["3"]),
        (0, "", [None]),
    ],
)
def test_the_gpus_are_those_that_the_environment_allows(monkeypatch, count, named, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert side_by_side.visible_gpus() == expected


def starts(jobs, parallel, num_gpus, lasts=1):
    """The runs that start in each round, as (name, GPU); those of a round end `lasts` rounds later."""
    waiting, running, rounds = list(jobs), [], []
    while waiting or running:
        now = []
        while found := side_by_side.next_start(waiting, [entry for entry, _ in running], parallel, num_gpus):
            waiting.remove(found[0])
            running.append((found, len(rounds) + lasts))
            now.append((found[0].name, found[1]))
        rounds.append(now)
        running = [entry for entry in running if entry[1] > len(rounds)]
    return rounds


def test_timed_runs_have_the_first_gpu_alone_while_the_others_train(tmp_path):
    timed, curves = (
        [side_by_side.Job(name=name, folder=tmp_path / name, settings=(), steps=3, alone=alone) for name in names]
        for names, alone in (("AB", True), ("abcdef", False))
    )
    assert starts([*timed, *curves], 2, 2) == [
        [("A", 0), ("a", 1), ("b", 1)],
        [("B", 0), ("c", 1), ("d", 1)],
        [("e", 0), ("f", 1)],
    ]
    assert starts([*timed, *curves], 4, 1) == [[("A", 0)], [("B", 0)], [(n, 0) for n in "abcd"], [("e", 0), ("f", 0)]]
    # what trains on the first GPU ends first, and nothing follows it there
    assert side_by_side.next_start([timed[0], curves[1]], [(curves[0], 0)], 2, 2) == (curves[1], 1)
    assert side_by_side.next_start([timed[0], curves[1]], [(curves[0], 0)], 2, 1) is None
    assert side_by_side.next_start([curves[1]], [(timed[0], 0)], 2, 1) is None


TRAINER = """
import json, os, pathlib, signal, sys, time
folder, steps, other = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
folder.mkdir(exist_ok=True)
if not other:
    sys.exit("no GPU is left")
while not folder.with_name(other).exists():
    time.sleep(0.01)
log = folder / "metrics.jsonl"
done = len(log.read_text().splitlines()) if log.exists() else 0
with log.open("a") as file:
    for step in range(done + 1, steps + 1):
        file.write(json.dumps({"step": step, "gpu": os.environ.get("CUDA_VISIBLE_DEVICES")}) + "\\n")
"""
"""Obeys a signal and continues as the trainer does; trains once the run `other` has begun, and fails without a name."""


class WaitingJob(side_by_side.Job):
    """A run of TRAINER, whose setting is the name of the other run."""

    def command(self):
        return [sys.executable, "-c", TRAINER, str(self.folder), str(self.steps), *self.settings]


def test_runs_train_side_by_side_are_stopped_and_continue(tmp_path, capsys):
    def job(name: str, other: str) -> side_by_side.Job:
        return WaitingJob(name=name, folder=tmp_path / name, settings=(other,), steps=3)

    def minutes(count: int) -> float:
        return time.monotonic() + 60 * count

    # each of the first two waits for the other: they train at the same time, or not at all
    jobs = [job("first", "second"), job("second", "first"), job("broken", "")]
    problems = side_by_side.train(jobs, 1, minutes(5), ["5", "7"])
    assert [{record["gpu"] for record in read_metrics(j.folder)} for j in jobs] == [{"5"}, {"7"}, set()]
    assert [j.is_done() for j in jobs] == [True, True, False]
    assert list(problems) == ["broken"] and "ended with status 1" in problems["broken"]
    assert "no GPU is left" in problems["broken"] and "second: done, step 3" in capsys.readouterr().out
    assert side_by_side.train([job("late", "never")], 1, time.monotonic() + 1) == {}
    assert "late: stopped, step 0" in capsys.readouterr().out
    # a finished run is not started again, nor is anything when the time is up
    again = [job("late", "first"), job("first", "")]
    assert side_by_side.train(again, 1, time.monotonic() - 1) == {} and not again[0].is_done()
    assert side_by_side.train(again, 1, minutes(5)) == {} and again[0].is_done()

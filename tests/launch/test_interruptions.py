"""Signals to the real `deepspeed` command, lost hosts: short versions of the scripts."""

import contextlib
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, TRAINER_VARIABLES, Fork

sys.path.insert(0, str(ROOT / "tests"))

import signals
import two_hosts


@pytest.fixture
def trainer_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Set the environment that the started processes inherit; those that a failed test leaves are ended."""
    before = set(psutil.Process().children(recursive=True))
    for name in TRAINER_VARIABLES:
        monkeypatch.setenv(name, TRAINER_VARIABLES[name])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    yield
    for process in set(psutil.Process().children(recursive=True)) - before:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.mark.parametrize(
    ("way", "moment", "processes"),
    [
        ("group", "training", 2),
        ("runner", "evaluating", 1),
        ("rank", "training", 2),
        ("interrupt", "saving", 1),
        ("slurm", "training", 1),
    ],
)
def test_a_signal_loses_nothing(
    way: str,
    moment: str,
    processes: int,
    trainer_environment: None,
    micro_settings: tuple[str, ...],
    tmp_path: Path,
) -> None:
    """All processes end within 25 s with the last step in a whole checkpoint; repeated signals change nothing."""
    arguments = (tmp_path / "run", tmp_path / "log", way, moment, random.Random(0), micro_settings)
    seen = signals.one_signal(*arguments, processes=processes)
    reason = "launcher is gone" if way == "runner" else "signal"
    assert seen["status"] == {"status": "stopped", "step": seen["step"], "reason": reason}


@pytest.mark.skipif(bool(two_hosts.why_not()), reason=two_hosts.why_not() or "-")
def test_a_host_that_is_cut_off(fork: Fork, tmp_path: Path) -> None:
    """The other stops within train.timeout_seconds and names it; one host resumes."""
    seconds = two_hosts.lose_a_host("cut", tmp_path / "cut")
    assert seconds <= two_hosts.TIMEOUT_SECONDS
    two_hosts.resume_alone(tmp_path / "cut", lambda script, arguments: fork(script, arguments, 1))

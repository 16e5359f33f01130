"""Speed of the steps, and the slowest rank; with a simulated clock."""

from types import SimpleNamespace

import pytest
import torch

from colt5dist.train.loop import console_line
from colt5dist.train.losses import LossMeans
from colt5dist.train.report import meter
from colt5dist.train.report.meter import Meter

MEANS = LossMeans(
    loss=1.0, by_objective={}, z_loss=0.0, loss_sum=1.0, input_tokens=700, target_tokens=300, target_bytes=0, extra=()
)


class Clock:
    """A clock that tests advance."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        """Like time.perf_counter."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Clock that all meters use."""
    own = Clock()
    monkeypatch.setattr(meter, "time", SimpleNamespace(perf_counter=own.perf_counter))
    return own


def two_steps(own: Meter, clock: Clock) -> None:
    """Two steps of one second each: 0.25 s for the data, 0.25 s for two micro-batches."""
    for _ in range(2):
        with own.step():
            with own.waiting_for_data():
                clock.now += 0.25
            for _ in range(2):
                with own.computing():
                    clock.now += 0.125
            clock.now += 0.5
        own.count(MEANS)


def others(monkeypatch: pytest.MonkeyPatch, *rows: list[float]) -> list[list[float]]:
    """Make `gather_rows` add the rows of other ranks; returns a list that collects this rank's own rows."""
    mine: list[list[float]] = []

    def gather_rows(row: list[float], device: torch.device) -> list[list[float]]:
        mine.append(row)
        return [row, *rows]

    monkeypatch.setattr(meter, "gather_rows", gather_rows)
    return mine


def test_the_slowest_rank_is_named_with_its_host(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps take equally long on all ranks, because they wait for each other; data and computation show the slowest."""
    own = Meter(torch.device("cpu"), ["host-a", "host-a", "host-b", "host-b"], step_flops=0)
    mine = others(monkeypatch, [1.0, 0.0, 0.25, 7.0], [1.125, 0.5, 0.375, 5.0], [1.0, 0.125, 0.5, 5.0])
    two_steps(own, clock)
    record = own.read()
    assert mine[0][:3] == [1.0, 0.25, 0.25]
    assert own.slowest == (
        "host-a 1.000 s, host-b 1.125 s; slowest rank 2 on host-b: data and forward 0.875 s, median 0.562"
    )
    assert (record["step_seconds"], record["data_wait_seconds"]) == (1.125, 0.5)
    assert record["tokens_per_second"] == 1000.0 == own.mean_rate


def test_each_interval_is_measured_separately(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Meter(torch.device("cpu"), ["host-a", "host-b"], step_flops=0)
    others(monkeypatch, [1.0, 0.0, 0.25, 0.0])
    two_steps(own, clock)
    own.read()
    assert "slowest rank 0 on host-a: data and forward 0.500 s" in own.slowest
    with own.step():
        clock.now += 1.0
    assert own.seconds == 1.0
    own.read()
    assert "slowest rank 1 on host-b: data and forward 0.250 s, median 0.125" in own.slowest


@pytest.mark.parametrize("hosts", [["host-a"], ["host-a", "host-b"]])
def test_the_line_of_a_step_ends_with_the_slowest_rank(
    hosts: list[str], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With several ranks; a single one is not compared."""
    own = Meter(torch.device("cpu"), hosts, step_flops=0)
    others(monkeypatch, *[[1.0, 0.0, 0.25, 0.0]] * (len(hosts) - 1))
    two_steps(own, clock)
    record = {"loss": 1.0, "grad_norm": 1.0, "lr": 0.1, "skipped_steps": 0, **own.read()}
    line = console_line(1, 9, record, own.slowest)
    start = "step 1/9 | loss 1.0000 | grad norm 1.000 | lr 1.00e-01 | 1,000 tokens/s | 1.000 s per step (data 0.250)"
    slowest = " | host-a 1.000 s, host-b 1.000 s; slowest rank 0 on host-a: data and forward 0.500 s, median 0.375"
    assert line == start + slowest * (len(hosts) - 1)

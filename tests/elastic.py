"""Train with many processes, kill one, and continue with fewer: one loss curve at every ZeRO stage.

    python tests/elastic.py                                  # 8 processes, then 3, then 2, at the stages 0 to 3
    python tests/elastic.py --processes 4 2 1 --stages 3     # another row of numbers

For each stage, an undisturbed run of one process is the reference. Another run starts with the first number of
processes; in the middle of its steps one rank is killed with SIGKILL, and the others must end by themselves. It is
started again with the next number of processes, stops by the file STOP, and so on; the last number runs to the end. A
step has 24 samples in micro-batches of one: 8 processes accumulate 3 micro-batches, 3 processes 8, and 2 processes 12.
All losses and gradient norms are compared with the reference, and every start must continue from the newest whole
checkpoint.
"""

import argparse
import json
import re
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from conftest import MICRO_SETTINGS  # noqa: E402
from forks import import_everything  # noqa: E402
from torture import Start, fork_ranks, newest_whole, reap, train_on_cpu, wait_for_line  # noqa: E402

STEPS_PER_START = 6
"""Steps that each start is given; the first ends after about half of them, by the kill."""
END_SECONDS = 900.0
"""Most seconds of a start: eight processes may share two cores."""
TOLERANCE = 1e-5
"""Relative: float32 sums are added in another order where the number of processes differs."""


def settings(stage: int, batch: int, steps: int) -> list[str]:
    """Settings of a start."""
    return [
        *MICRO_SETTINGS,
        f"zero.stage={stage}",
        f"train.global_batch_size={batch}",
        "train.micro_batch_size=1",
        f"train.steps={steps}",
        "checkpoint.every_steps=2",
        "train.timeout_seconds=120",
    ]


def wait_for_end(start: Start) -> None:
    """Wait until all ranks have ended by themselves."""
    deadline = time.monotonic() + END_SECONDS
    while alive := reap(start.ranks):
        assert time.monotonic() < deadline, f"{alive} are still running after {END_SECONDS} s; see {start.log}"
        time.sleep(0.1)


def records(run_dir: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm of each step."""
    lines = (json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: (record["loss"], record["grad_norm"]) for record in lines}


def one_stage(folder: Path, stage: int, processes: Sequence[int], batch: int) -> float:
    """Both runs of a stage; returns the largest relative difference of a loss or gradient norm."""
    steps = STEPS_PER_START * len(processes)
    start = fork_ranks(folder / "reference", folder / "reference.log", settings(stage, batch, steps), processes=1)
    wait_for_end(start)
    run_dir = folder / "run"
    for number, count in enumerate(processes):
        log = folder / f"start_{number}_with_{count}.log"
        log.touch()
        expected = newest_whole(run_dir)
        start = fork_ranks(run_dir, log, settings(stage, batch, steps), processes=count)
        last = STEPS_PER_START * (number + 1)
        if number == 0:
            wait_for_line(start, f"step {last // 2}/")
            start.ranks[count // 2].kill()
        elif number + 1 < len(processes):
            wait_for_line(start, f"step {last - 2}/")
            (run_dir / "STOP").touch()
        wait_for_end(start)
        said = re.findall(r"resuming from .*/(step_\d+)", log.read_text(errors="replace"))
        assert (said or [None]) == [expected], f"resumed from {said}, the newest whole one is {expected}; see {log}"
    reference, run = records(folder / "reference"), records(run_dir)
    assert sorted(run) == sorted(reference) == list(range(1, steps + 1)), f"steps are missing; see {folder}"
    return max(abs(a / b - 1) for step in run for a, b in zip(run[step], reference[step], strict=True))


def main(arguments: Sequence[str]) -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[8, 3, 2], help="of each start")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3], help="of ZeRO")
    parser.add_argument("--batch", type=int, default=24, help="samples of a step")
    parser.add_argument("--output", type=Path, help="a new folder; else a temporary one")
    options = parser.parse_args(arguments)
    folder = options.output or Path(tempfile.mkdtemp(prefix="elastic-"))
    import_everything()
    failed = False
    for stage in options.stages:
        inside = folder / f"stage_{stage}"
        inside.mkdir(parents=True)
        difference = one_stage(inside, stage, options.processes, options.batch)
        failed |= difference > TOLERANCE
        row = {"stage": stage, "processes": options.processes, "largest_difference": difference}
        print(json.dumps(row), flush=True)
    print(f"{'FAILED' if failed else 'passed'}: tolerance {TOLERANCE}; logs in {folder}")
    return int(failed)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    train_on_cpu()
    sys.exit(main(sys.argv[1:]))

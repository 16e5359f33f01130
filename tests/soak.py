"""Train for hours and check that resident memory stays flat and that no step is lost; run by hand.

    python tests/soak.py --minutes 125 --output runs/soak [--config FILE] [key=value ...]

Every 2 seconds the resident memory of the trainer and its data workers is appended to OUTPUT/memory.csv: anonymous and
shared memory of all of them, where a shared page counts once, and the trainer's mapped files. At the end it prints a
table, draws OUTPUT/memory.png if matplotlib is installed, and ends with status 0 if all checks passed.

Within each step memory rises from a floor, constant to 0.2 %, to peaks a tenth above it. The floor (the 10th percentile
of a tenth of the run) must stay flat, because it shows a leak; and so must the peaks (the 90th percentile), because
they show a fragmented heap. The median is between the two and depends on how long a step stays near either, and so on
other work of the machine; it is only printed.

The allocator's heap may need longer than the default warm-up to reach its size (36 minutes with one thread). The plot
shows it; then set --warm-up-minutes.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from colt5dist.train.checkpoint import find_checkpoints
from colt5dist.train.report.monitor import read_metrics

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = (
    "train.steps=100000000",
    "train.log_every=1",
    "train.eval_every=100",
    "train.routing_every=100",
    "checkpoint.every_steps=100",
    "checkpoint.keep_last=2",
)
"""Every step is recorded; evaluations and checkpoints every 100 steps."""
SAMPLE_SECONDS = 2.0
"""Shorter than a step, in which memory rises and falls by a tenth: fewer samples make the percentiles less certain."""
WINDOWS = 10
ALLOWED_CHANGE = 0.02
KINDS = ("floor", "median", "peaks", "largest")
COMPARED = ("floor", "peaks")
COLUMNS = ("seconds", "step", "processes", "total_mib", "trainer_mib", "workers_mib")


def sample(process: psutil.Process) -> tuple[int, float, float]:
    """Measure: number of processes, MiB of the trainer, MiB of its child processes."""
    workers = process.children(recursive=True)
    mine = proportional_kib(process.pid, "Pss_Anon", "Pss_Shmem") + mapped_files_kib(process.pid)
    sizes = []
    for worker in workers:
        try:
            sizes.append(proportional_kib(worker.pid, "Pss_Anon", "Pss_Shmem"))
        except OSError:  # it has just ended
            continue
    return 1 + len(sizes), mine / 1024, sum(sizes) / 1024


def proportional_kib(pid: int, *names: str) -> int:
    """Sum some lines of smaps_rollup, in which a page is divided by the number of processes that map it."""
    lines = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return sum(int(line[1]) for line in lines if line[0].rstrip(":") in names)


def mapped_files_kib(pid: int) -> int:
    """Resident pages of mapped files; not divided, because other programs on the machine map the same libraries."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return next(int(line[1]) for line in lines if line[0] == "RssFile:")


def watch(process: subprocess.Popen[bytes], run_dir: Path, path: Path) -> int:
    """Sample until the process ends; returns its exit status."""
    begin = time.monotonic()
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        while True:
            try:
                return process.wait(SAMPLE_SECONDS)
            except subprocess.TimeoutExpired:
                pass
            try:
                count, mine, others = sample(psutil.Process(process.pid))
            except (OSError, psutil.NoSuchProcess):  # it has just ended
                continue
            writer.writerow(
                [
                    round(time.monotonic() - begin, 1),
                    last_step(run_dir),
                    count,
                    *(f"{x:.2f}" for x in (mine + others, mine, others)),
                ]
            )
            file.flush()


def last_step(run_dir: Path) -> int:
    """Read the step of the last complete line of metrics.jsonl from the file's end; 0 before the first."""
    try:
        with open(run_dir / "metrics.jsonl", "rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - 65536, 0))
            lines = file.read().split(b"\n")[:-1]
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except (OSError, ValueError):
        return 0


def windows(rows: Sequence[dict[str, float]], warm_up: float) -> list[dict[str, float]]:
    """Compute floor, median, peaks and largest memory in equal parts of the time after the warm-up."""
    rows = [row for row in rows if row["seconds"] >= warm_up]
    size = len(rows) // WINDOWS
    assert size >= 3, f"only {len(rows)} samples after the warm-up; run longer"
    parts = [rows[i * size : (i + 1) * size] for i in range(WINDOWS)]
    return [
        {
            "from_minute": part[0]["seconds"] / 60,
            "floor_mib": deciles[0],
            "median_mib": deciles[4],
            "peaks_mib": deciles[8],
            "largest_mib": max(row["total_mib"] for row in part),
            "last_step": part[-1]["step"],
        }
        for part in parts
        for deciles in [statistics.quantiles((row["total_mib"] for row in part), n=10)]
    ]


def problems_of_run(run_dir: Path, exit_status: int) -> list[str]:
    """Check the steps, the checkpoints and the end of the run; returns what is wrong."""
    found = []
    steps = [record["step"] for record in read_metrics(run_dir)]
    if not steps or steps != list(range(1, len(steps) + 1)):
        found.append(f"metrics.jsonl: {len(steps)} records are not the steps 1 to {steps[-1] if steps else '?'}")
    whole, damaged = find_checkpoints(run_dir / "checkpoints")
    names = [folder.name for folder in whole]
    if damaged or not names or names[-1] != f"step_{len(steps):08d}":
        found.append(f"checkpoints: whole {names}, damaged {[str(d) for d in damaged]}; the last step is {len(steps)}")
    status = json.loads((run_dir / "status.json").read_text())
    if exit_status != 75 or status != {"status": "stopped", "step": len(steps), "reason": "train.max_minutes"}:
        found.append(f"exit status {exit_status}, status.json {status}")
    return found


def plot(rows: Sequence[dict[str, float]], path: Path) -> str:
    """Draw memory over time; returns a line about the plot."""
    try:
        import matplotlib
    except ImportError:
        return "no plot: matplotlib is not installed"
    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4))
    minutes = [row["seconds"] / 60 for row in rows]
    for column, label in (("total_mib", "all processes"), ("trainer_mib", "trainer"), ("workers_mib", "data workers")):
        axes.plot(minutes, [row[column] for row in rows], label=label, linewidth=1)
    axes.set(xlabel="minutes", ylabel="resident memory, MiB", ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return f"plot: {path}"


def report(output: Path, exit_status: int, warm_up_minutes: float) -> int:
    """Print the table; returns 0 if memory was flat and no step was lost."""
    with open(output / "memory.csv", newline="") as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    parts = windows(rows, 60 * warm_up_minutes)
    print(f"{'from minute':>12}{'last step':>11}" + "".join(f"{f'{kind} MiB':>20}" for kind in KINDS))
    changes = {kind: [part[f"{kind}_mib"] / parts[0][f"{kind}_mib"] - 1 for part in parts] for kind in KINDS}
    for number, part in enumerate(parts):
        figures = "".join(f"{part[f'{kind}_mib']:12.1f}{changes[kind][number]:+8.2%}" for kind in KINDS)
        print(f"{part['from_minute']:12.1f}{part['last_step']:11.0f}{figures}")
    found = problems_of_run(output / "run", exit_status)
    worst = {kind: max(changes[kind], key=abs) for kind in KINDS}
    for kind in COMPARED:
        if abs(worst[kind]) > ALLOWED_CHANGE:
            found.append(f"the {kind} of memory changed by {worst[kind]:+.2%} after {warm_up_minutes:g} minutes")
    print(plot(rows, output / "memory.png"))
    for line in found:
        print(f"FAILED: {line}")
    largest = ", ".join(f"{kind} {worst[kind]:+.2%}" for kind in KINDS)
    print(f"{len(found)} problems; largest changes of memory: {largest}; {parts[-1]['last_step']:.0f} steps")
    return 1 if found else 0


def main(arguments: Sequence[str]) -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=125.0)
    parser.add_argument("--warm-up-minutes", type=float, help="not compared (default: 10, at most a quarter)")
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--config", default=str(ROOT / "configs" / "tiny.yaml"))
    parser.add_argument("settings", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args(arguments)
    options.output.mkdir(parents=True)
    command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), "--config", options.config]
    own = (f"run_dir={options.output / 'run'}", f"train.max_minutes={options.minutes}")
    with open(options.output / "log.txt", "wb") as log:
        process = subprocess.Popen([*command, *SETTINGS, *own, *options.settings], stdout=log, stderr=log)
        try:
            exit_status = watch(process, options.output / "run", options.output / "memory.csv")
        finally:
            process.kill()
    warm_up = min(10.0, options.minutes / 4) if options.warm_up_minutes is None else options.warm_up_minutes
    return report(options.output, exit_status, warm_up)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

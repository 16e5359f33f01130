"""Runs of the trainer side by side, several on each GPU, that can be stopped and continued."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from colt5dist.benchmark.step import MOST_LINES, with_children_ended
from colt5dist.errors import ConfigError
from colt5dist.files import write_whole
from colt5dist.packaged import CONFIGS, SCRIPTS
from colt5dist.train.report.monitor import read_metrics

SAVE_SECONDS = 300.0
"""Seconds that a trainer may take to write its checkpoint after it is asked to stop."""
POLL_SECONDS = 0.5
STOPPED = 75
"""Exit status of a trainer that was stopped, and of a command whose minutes are up before all runs ended."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of the trainer."""

    name: str
    """Its folder below the folder of all runs."""
    folder: Path
    settings: tuple[str, ...]
    steps: int
    alone: bool = False
    """Whether it runs on the first GPU, and nothing else there at the same time: for runs that measure times."""

    def command(self) -> list[str]:
        """Return the command that starts the run or continues it."""
        script = [str(SCRIPTS / "pretrain.py"), "--config", str(CONFIGS / "base.yaml")]
        return [sys.executable, *script, f"run_dir={self.folder}", f"train.steps={self.steps}", *self.settings]

    def is_done(self) -> bool:
        """Whether its records reach the last step."""
        return any(record["step"] >= self.steps for record in read_metrics(self.folder))


def visible_gpus() -> list[str | None]:
    """Return what CUDA_VISIBLE_DEVICES has to be for each GPU that this process may use; [None] if there is none.

    No GPU is opened.
    """
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = map(str, range(count)) if named is None else (name.strip() for name in named.split(","))
    gpus: list[str | None] = [*names][:count]
    return gpus or [None]


def check_unchanged(settings: Mapping[str, Sequence[str]], path: Path) -> None:
    """Refuse runs, also finished ones, whose text or settings changed since an earlier start; all are kept in a file.

    Args:
        settings: those of every run, by its name.
        path: the file.

    Raises:
        ConfigError: something was started with other settings.
    """
    known: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name, now in settings.items():
        if changed := sorted(set(known.setdefault(name, list(now))) ^ set(now)):
            what = ", ".join(changed)
            raise ConfigError(f"{path}: {name} was started with other settings ({what}); use another --output")
    write_whole(path, json.dumps(known, indent=1).encode())


def train(jobs: Sequence[Job], parallel: int, deadline: float, gpus: Sequence[str | None] = (None,)) -> dict[str, str]:
    """Start or continue runs, some at a time, until all ended or the time is up; then stop them with a checkpoint.

    Runs start in their order, but while those that need the first GPU alone wait or run, the other GPUs train the rest.

    Args:
        jobs: the runs; finished ones are passed over.
        parallel: how many train at once on a GPU.
        deadline: when to stop, in seconds of `time.monotonic`.
        gpus: CUDA_VISIBLE_DEVICES of each GPU; None: as it is.

    Returns:
        What went wrong, by the name of the run.
    """
    waiting = [job for job in jobs if not job.is_done()]
    running: dict[subprocess.Popen[bytes], tuple[Job, int]] = {}
    problems: dict[str, str] = {}
    try:
        while (waiting or running) and time.monotonic() < deadline:
            while started := next_start(waiting, list(running.values()), parallel, len(gpus)):
                job, gpu = started
                waiting.remove(job)
                running[_start(job, gpus[gpu])] = started
            time.sleep(POLL_SECONDS)
            for process in [process for process in running if process.poll() is not None]:
                _ended(process, running.pop(process)[0], problems)
    finally:
        for process in running:
            process.terminate()
        latest = time.monotonic() + SAVE_SECONDS
        for process, (job, _) in running.items():
            try:
                process.wait(max(0.0, latest - time.monotonic()))
                _ended(process, job, problems)
            except subprocess.TimeoutExpired:
                problems[job.name] = f"wrote no checkpoint within {SAVE_SECONDS:.0f} s of the request to stop"
            with_children_ended(process)
    return problems


def next_start(
    waiting: Sequence[Job], running: Sequence[tuple[Job, int]], parallel: int, num_gpus: int
) -> tuple[Job, int] | None:
    """Return the run to start now, and the number of its GPU; None: all have to wait.

    The first GPU takes nothing else while a run waits that needs it alone; with one GPU, nothing starts before that.

    Args:
        waiting: the runs that have not started, in their order.
        running: the runs that train now, each with the number of its GPU.
        parallel: how many may train at once on a GPU.
        num_gpus: number of GPUs.
    """
    load = Counter(gpu for _, gpu in running)
    alone = next((job for job in waiting if job.alone), None)
    if alone is not None and not load[0]:
        return alone, 0
    is_kept = alone is not None or any(job.alone for job, _ in running)
    free = [gpu for gpu in range(num_gpus) if load[gpu] < parallel and not (is_kept and gpu == 0)]
    other = next((job for job in waiting if not job.alone), None)
    return (other, min(free, key=lambda gpu: load[gpu])) if other is not None and free else None


def _start(job: Job, gpu: str | None) -> subprocess.Popen[bytes]:
    environment = os.environ if gpu is None else {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{job.folder}.log", "ab") as log:
        return subprocess.Popen(job.command(), stdout=log, stderr=log, start_new_session=True, env=environment)


def _ended(process: subprocess.Popen[bytes], job: Job, problems: dict[str, str]) -> None:
    """Print how a run ended; a signal ends one that is still starting, which has nothing to save."""
    if process.returncode in (0, STOPPED, -signal.SIGTERM):
        step = max((record["step"] for record in read_metrics(job.folder)), default=0)
        print(f"{job.name}: {'done' if step >= job.steps else 'stopped'}, step {step}", flush=True)
        return
    lines = Path(f"{job.folder}.log").read_text(encoding="utf-8", errors="replace").splitlines()[-MOST_LINES:]
    problems[job.name] = "\n    ".join([f"ended with status {process.returncode}", *lines])

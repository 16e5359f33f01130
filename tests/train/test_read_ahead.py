"""A wait for data ends when a stop is requested or the data is missing; it never hangs the run."""

import json
import random
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT, trainer_environment

from colt5dist.data.prepare.held_out_split import CorpusWriter
from colt5dist.data.tokenizer import ByteTokenizer
from colt5dist.train.checkpoint import find_checkpoints
from colt5dist.train.report.monitor import read_metrics

HANGING = """
    import os, signal, sys, time
    from pathlib import Path
    from colt5dist.data import DataConfig, training_batches
    from colt5dist.data.read.shards import open_shards
    from colt5dist.train.read_ahead import ReadAhead
    from colt5dist.train.ranks import ranks_from_environment
    from colt5dist.train.guard.stop import StopRequests

    folder, num_workers = Path(sys.argv[1]), int(sys.argv[2])
    shards = open_shards(folder)
    for path in folder.glob("*.tar"):
        path.unlink()
        os.mkfifo(path)  # opening it blocks for ever, like a file on a broken network
    stop = StopRequests(folder, watch_files=False, max_minutes=None)
    batches = training_batches(
        shards, DataConfig(input_length=96, target_length=40, num_workers=num_workers), seed=0, global_batch_size=4,
        micro_batch_size=4, rank=0, world_size=1, first_sample=0,
    )
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    begin = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, float(sys.argv[4]))
    wanted = lambda: stop.reason() is not None
    stream = ReadAhead(batches, ranks_from_environment(), wanted, first_seconds=float(sys.argv[3]))
    print(f"waited {time.monotonic() - begin:.1f} {stream.failure}", flush=True)
    stream.close()
"""


STUCK = """
    import os, psutil, signal, sys
    from pathlib import Path
    from colt5dist.data import DataConfig, training_batches
    from colt5dist.data.read.shards import open_shards
    from colt5dist.train.read_ahead import ReadAhead
    from colt5dist.train.ranks import ranks_from_environment

    batches = training_batches(
        open_shards(Path(sys.argv[1])), DataConfig(input_length=96, target_length=40, num_workers=2), seed=0,
        global_batch_size=4, micro_batch_size=4, rank=0, world_size=1, first_sample=0,
    )
    stream = ReadAhead(batches, ranks_from_environment(), lambda: False, first_seconds=3600)
    (starter,) = psutil.Process().children()
    for reader in starter.children():
        os.kill(reader.pid, signal.SIGSTOP)  # like one that waits for a disk, it reacts to SIGKILL only
    stream.close()
    assert not psutil.Process().children(recursive=True)
    print("closed", flush=True)
"""


LOST = """
    import psutil, sys
    from pathlib import Path
    from colt5dist.data import DataConfig, training_batches
    from colt5dist.data.read.loader import DataWorkerError
    from colt5dist.data.read.shards import open_shards
    from colt5dist.train.read_ahead import ReadAhead
    from colt5dist.train.ranks import ranks_from_environment

    batches = training_batches(
        open_shards(Path(sys.argv[1])), DataConfig(input_length=96, target_length=40, num_workers=3), seed=0,
        global_batch_size=4, micro_batch_size=4, rank=0, world_size=1, first_sample=0,
    )
    stream = ReadAhead(batches, ranks_from_environment(), lambda: False, first_seconds=3600)
    (starter,) = psutil.Process().children()
    starter.children()[0].kill()
    while stream.failure is None:
        stream.read(3600)
    print(type(stream.failure).__name__, flush=True)
    raise stream.failure
"""


def wait_for_data(shards: Path, num_workers: int, *, allowed: float, signal_after: float) -> tuple[float, str]:
    """Wait for data that never arrives; returns the seconds that it took, and the error."""
    arguments = [str(shards), str(num_workers), str(allowed), str(signal_after)]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(HANGING), *arguments], capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    words, waited, failure = done.stdout.strip().split(" ", 2)
    assert words == "waited"
    return float(waited), failure


@pytest.fixture
def shards(short_texts: Path, tmp_path: Path) -> Path:
    """A copy of a few documents, which a test may damage."""
    return Path(shutil.copytree(short_texts, tmp_path / "shards"))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_signal_ends_a_wait_that_would_never_end(shards: Path, num_workers: int) -> None:
    """The process ends too, although a reader is stuck in the operating system."""
    waited, failure = wait_for_data(shards, num_workers, allowed=3600, signal_after=0.5)
    assert waited > 0.4 and failure == "None"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_wait_that_would_never_end_is_a_named_error(shards: Path, num_workers: int) -> None:
    """A single rank has no other rank that could detect the hang."""
    waited, failure = wait_for_data(shards, num_workers, allowed=0.5, signal_after=0)
    assert waited > 0.4
    assert failure.startswith("no data arrived for 0.5 s; check the disk or network of the shards; ")


def test_a_stuck_reader_does_not_delay_the_end(shards: Path) -> None:
    """Also not if the trainer has its step, and the reader already reads the next ones."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(STUCK), str(shards)], capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "closed\n"


def test_a_process_ends_after_one_of_several_readers_was_killed(shards: Path) -> None:
    """The other readers react to SIGKILL only, and the exception that is being raised still refers to them."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LOST), str(shards)], capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 1 and done.stdout == "DataWorkerError\n"
    assert done.stderr.splitlines()[-1].startswith(
        "colt5dist.data.read.loader.DataWorkerError: a reader process of rank 0"
    )


@dataclass
class Started:
    """A run of one process after its first steps."""

    process: subprocess.Popen[str]
    run_dir: Path

    def workers(self) -> list[psutil.Process]:
        """Return its reader processes."""
        (starter,) = psutil.Process(self.process.pid).children()
        return starter.children()

    def end(self) -> tuple[int, str]:
        """Wait for the end; returns exit status and stderr."""
        _, printed = self.process.communicate(timeout=60)
        return self.process.returncode, printed


@pytest.fixture
def started(
    tmp_path: Path, micro_settings: tuple[str, ...], make_text: Callable[[random.Random, int], str]
) -> Iterator[Started]:
    """A run on 60 shards in tmp_path/many, with one reader process."""
    rng = random.Random(2)
    writer = CorpusWriter(tmp_path / "many", ByteTokenizer(), validation_fraction=0.1, shard_bytes=1 << 20)
    for _ in range(600):
        writer.add(make_text(rng, 1000) * 100)
    writer.close({})
    run_dir = tmp_path / "run"
    settings = [*micro_settings, f"run_dir={run_dir}", f"data.shards={tmp_path / 'many'}", "data.num_workers=1"]
    settings += ["train.steps=1000000", "train.eval_samples=2"]
    command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), *settings]
    output: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=trainer_environment(), **output)
    try:
        deadline = time.monotonic() + 120
        while len(read_metrics(run_dir)) < 2:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        yield Started(process, run_dir)
    finally:
        process.kill()


def saved_and_failed(run_dir: Path) -> str:
    """Check that the last recorded step is in a whole checkpoint; returns the reason in status.json."""
    status = json.loads((run_dir / "status.json").read_text())
    assert status["status"] == "failed" and status["step"] == read_metrics(run_dir)[-1]["step"]
    whole, damaged = find_checkpoints(run_dir / "checkpoints")
    assert whole[-1].name == f"step_{status['step']:08d}" and not damaged
    return status["reason"]


def test_a_killed_worker_ends_the_run_with_a_checkpoint(started: Started) -> None:
    (worker,) = started.workers()
    worker.kill()
    status, printed = started.end()
    assert status == 1
    assert "a reader process of rank 0 ended" in printed and "a reader process of rank 0 ended" in saved_and_failed(
        started.run_dir
    )


def test_shards_that_vanish_end_the_run_with_a_checkpoint(started: Started, tmp_path: Path) -> None:
    """The open one can still be read; the next one is missing, and is named."""
    for path in (tmp_path / "many").glob("*.tar"):
        path.unlink()
    status, printed = started.end()
    assert status == 2
    assert f"{tmp_path / 'many'}" in printed and ".tar" in saved_and_failed(started.run_dir)
    assert "Traceback" not in printed

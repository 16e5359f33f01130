"""Failures around a run: nobody reads its output, its disk is full, another run uses its folder."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import MICRO_SETTINGS, ROOT, Pretrain, trainer_environment

from colt5dist.train.checkpoint import find_checkpoints
from colt5dist.train.report.monitor import read_metrics

HOLD = "import sys; from colt5dist.files import lock_for_life; from pathlib import Path; "
HOLD += "print(lock_for_life(Path(sys.argv[1])), flush=True); sys.stdin.read()"


@pytest.mark.parametrize("output", ["closed pipe", "full disk"])
def test_nobody_reads_the_output_of_a_run(tmp_path: Path, shard_cache: Path, output: str) -> None:
    """As after Ctrl-C with `| tee`: the run does every step, and the last checkpoint is whole."""
    if output == "full disk":
        writing = os.open("/dev/full", os.O_WRONLY)
    else:
        reading, writing = os.pipe()
        os.close(reading)
    command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), f"run_dir={tmp_path}", *MICRO_SETTINGS]
    done = subprocess.run(command, env=trainer_environment(), stdout=writing, stderr=writing, timeout=200)
    os.close(writing)
    assert done.returncode == 0
    assert json.loads((tmp_path / "status.json").read_text()) == {"status": "finished", "step": 4}
    whole, others = find_checkpoints(tmp_path / "checkpoints")
    assert [folder.name for folder in whole] == ["step_00000004"] and not others


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ({}, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "30000000000"}),
        ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "7"}),
    ],
    ids=str,
)
def test_threads_that_wait_spin_for_a_moment_only(given: dict[str, str], used: dict[str, str]) -> None:
    """As OpenMP itself says. Long spinning slows a step down beside another busy process; a user may differ."""
    environment = {**trainer_environment(), "OMP_DISPLAY_ENV": "verbose"}
    for name in used:
        environment.pop(name, None)
    command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), "--print-config"]
    done = subprocess.run(command, env=environment | given, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and all(f"{name} = '{value}'" in done.stderr for name, value in used.items())


NO_LOCKS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
int flock(int file, int how) { errno = ENOSYS; return -1; }
static int other(const char *name, int file, int command, void *argument) {
    if (command == F_SETLK || command == F_SETLKW) { errno = ENOLCK; return -1; }
    return ((int (*)(int, int, void *)) dlsym(RTLD_NEXT, name))(file, command, argument);
}
#define REPLACE(name) int name(int file, int command, ...) { \\
    va_list rest; va_start(rest, command); void *argument = va_arg(rest, void *); va_end(rest); \\
    return other(#name, file, command, argument); }
REPLACE(fcntl)
REPLACE(fcntl64)
"""


@pytest.fixture(scope="module")
def without_locks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of a process that finds no file locks: neither of flock nor of fcntl."""
    folder = tmp_path_factory.mktemp("no_locks")
    (folder / "no_locks.c").write_text(NO_LOCKS)
    library = folder / "no_locks.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, folder / "no_locks.c", "-ldl"], check=True)
    return {**trainer_environment(), "LD_PRELOAD": str(library)}


def test_shards_are_made_where_there_are_no_file_locks(tmp_path: Path, without_locks: dict[str, str]) -> None:
    """By `prepare`, which says so; and by several ranks at once, which need the standard library's."""
    (tmp_path / "a.txt").write_text("some text\n" * 1000)
    command = [sys.executable, str(ROOT / "launch" / "prepare.py"), "--input", "a.txt", "--output", "shards"]
    made = subprocess.run(command, env=without_locks, cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode == 0 and (tmp_path / "shards" / "manifest.json").exists(), made.stderr
    assert f"note: --output: {tmp_path}/shards.partial has no file locks; make sure that no other" in made.stderr

    cache = tmp_path / "cache"
    environment = {**without_locks, "COLT5DIST_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    code = "from colt5dist.data import ensure_standard_library_shards as make; print(make())"
    ranks = [subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) for _ in range(2)]
    printed = {rank.communicate()[0].decode().strip() for rank in ranks}
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert {str(path) for path in cache.iterdir() if path.is_dir()} == printed and len(printed) == 1


def test_a_second_run_in_the_folder_is_refused(tmp_path: Path, run_pretrain: Pretrain) -> None:
    """As long as another process trains there; nothing of that run changes. Afterwards it is not refused."""
    run_pretrain(tmp_path, "train.steps=2")
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    command = [sys.executable, "-c", HOLD, str(tmp_path / ".lock")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "True\n"
        refused = run_pretrain(tmp_path, processes=2, check=False)
        (tmp_path / "status.json").unlink()  # as a running process does
        done_already = run_pretrain(tmp_path, "train.steps=2")
        assert "nothing to do" in done_already.stdout and not (tmp_path / "status.json").exists()
        (tmp_path / "status.json").write_bytes(before[tmp_path / "status.json"])
        other.communicate("")
    assert refused.returncode == 2
    assert refused.stderr == (
        f"error: run_dir: another process trains in {tmp_path}; wait until it ends, or choose another folder\n"
    )
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    run_pretrain(tmp_path)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4]


NEVER_READ = """
import os, sys
import colt5dist.console as console
console.WAIT_SECONDS = 0.001
console.outlive_readers()
os.set_blocking(1, False)
for number in range(2000):
    print(str(number) * 100)
assert console.status_of_report() == 1
"""


def test_nobody_reads_a_pipe_that_does_not_wait(tmp_path: Path) -> None:
    """Whoever shares the pipe may have set it so; the lines that it does not hold are lost, and counted as lost."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open(tmp_path / "errors", "w+b") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", NEVER_READ], env=environment, stdout=subprocess.PIPE, stderr=errors
        )
        assert process.wait(timeout=100) == 0
        errors.seek(0)
        assert errors.read().startswith(b"error: standard output cannot be written (no process reads it)")
    assert process.stdout is not None
    with process.stdout as pipe:
        assert pipe.read().startswith(b"0" * 100 + b"\n" + b"1" * 100)


def test_a_report_that_is_lost_is_a_failure(tmp_path: Path) -> None:
    """The resolved configuration on a full disk; who stops reading it early has what he wanted."""
    command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), "--print-config"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=trainer_environment())
    assert done.returncode == 1
    reason = "No space left on device"
    assert done.stderr == f"error: standard output cannot be written ({reason}); a part of the output is lost\n"


def test_an_end_that_cannot_be_written_down(tmp_path: Path, run_pretrain: Pretrain) -> None:
    """The run has ended as well as it has."""
    (tmp_path / "status.json.tmp").mkdir()
    done = run_pretrain(tmp_path)
    assert done.returncode == 0
    assert f"warning: {tmp_path / 'status.json'} cannot be written (Is a directory); the checkpoint of step 4" in (
        done.stderr
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs that holds three checkpoints of the micro model."""
    root = tmp_path / "disk"
    root.mkdir()
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(root)], capture_output=True)
    except OSError:
        pytest.skip("there is no mount")
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield root
    subprocess.run(["umount", str(root)], check=True)


def test_the_disk_has_become_read_only(small_disk: Path, run_pretrain: Pretrain) -> None:
    """As a file system does on which an error was met: a start is refused by one line."""
    run_pretrain(small_disk / "run", "train.steps=1")
    remount = ["mount", "-o", "remount,ro", str(small_disk)]
    subprocess.run(remount, check=True)
    refused = run_pretrain(small_disk / "run", check=False)
    assert refused.returncode == 2
    assert refused.stderr == (
        f"error: run_dir: {small_disk / 'run'} cannot be written (Read-only file system); choose another folder\n"
    )


def fill(disk: Path, when: Path) -> None:
    """Once `when` has a line, take the last byte of a disk; in vain after two minutes, for a run that writes none."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not when.exists() or not when.stat().st_size):
        time.sleep(0.01)
    filler = os.open(disk / "filler", os.O_WRONLY | os.O_CREAT)
    with suppress(OSError):
        while True:
            os.write(filler, bytes(4096))
    os.close(filler)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_disk_of_a_run_is_full(small_disk: Path, processes: int, run_pretrain: Pretrain) -> None:
    """In mid-run: one line and status 74, though status.json cannot be written either; the old checkpoint stays."""
    run_dir = small_disk / "run"
    run_pretrain(run_dir, "train.steps=1", "checkpoint.keep_last=1")
    (run_dir / "metrics.jsonl").write_bytes(b"")
    filling = threading.Thread(target=fill, args=(small_disk, run_dir / "metrics.jsonl"))
    filling.start()
    settings = ("train.steps=40", "checkpoint.keep_last=1", "checkpoint.every_steps=0")
    done = run_pretrain(run_dir, *settings, processes=processes, check=False)
    filling.join()
    assert done.returncode == 74 and "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert "checkpoint of step 40 is not written: " in done.stderr and "No space left on device" in done.stderr
    assert [folder.name for folder in find_checkpoints(run_dir / "checkpoints")[0]] == ["step_00000001"]

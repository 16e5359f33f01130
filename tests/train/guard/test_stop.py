"""Requests to stop: signals, repeated signals, files, the time limit, a launcher that has ended."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from colt5dist.train.guard.stop import StopReason, StopRequests, seconds_since_start

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


@pytest.fixture(autouse=True)
def restore_handlers() -> Iterator[None]:
    """Leave this process's signal handlers as they were."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def requests(run_dir: Path, **options: object) -> StopRequests:
    """Make the requests of a rank that watches files."""
    return StopRequests(run_dir, **{"watch_files": True, "max_minutes": None, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_request_and_repeated_ones_change_nothing(
    tmp_path: Path, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests were started with nohup
    stop = requests(tmp_path)
    assert stop.reason() is None
    for repeated in (number, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
        os.kill(os.getpid(), repeated)
        assert stop.reason() is StopReason.SIGNAL
    printed = capfd.readouterr().err
    assert printed.startswith(f"\n{number.name}: the run ends after this step and its checkpoint")
    assert printed.count("the run ends after this step") == 1
    assert ("another Ctrl-C" in printed) == (number is signal.SIGINT)


def test_files_count_once(tmp_path: Path) -> None:
    stop = requests(tmp_path)
    (tmp_path / "SAVE").touch()
    assert stop.save_requested() and stop.reason() is None
    stop.obeyed("SAVE")
    assert not stop.save_requested()
    (tmp_path / "STOP").touch()
    assert stop.reason() is StopReason.FILE
    stop.obeyed("STOP")
    assert stop.reason() is None


def test_other_ranks_ignore_files(tmp_path: Path) -> None:
    (tmp_path / "STOP").touch()
    (tmp_path / "SAVE").touch()
    stop = requests(tmp_path, watch_files=False)
    assert stop.reason() is None and not stop.save_requested()


def test_the_time_limit(tmp_path: Path) -> None:
    stop = requests(tmp_path, max_minutes=0.0001)
    time.sleep(0.01)
    assert stop.reason() is StopReason.TIME


def test_the_time_limit_counts_from_the_start_of_the_process(tmp_path: Path) -> None:
    """A job's limit includes the imports and the start."""
    age = seconds_since_start()
    assert age == pytest.approx(time.time() - psutil.Process().create_time(), abs=2.0) and age > 0
    assert requests(tmp_path, max_minutes=age / 60).reason() is StopReason.TIME
    assert requests(tmp_path, max_minutes=age / 60 + 1).reason() is None


def test_a_second_interrupt_by_hand_ends_at_once(tmp_path: Path) -> None:
    """A second interrupt within 3 s may be the launcher's; a later one comes from the user."""
    script = """
        import os, signal, sys, time
        from pathlib import Path
        import colt5dist.train.guard.stop as stop
        stop.STOP_AT_ONCE_SECONDS = 3600.0
        stop.StopRequests(Path(sys.argv[1]), watch_files=False, max_minutes=None)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        print("still here", flush=True)
        stop.STOP_AT_ONCE_SECONDS = 0.0
        os.kill(os.getpid(), signal.SIGINT)
        print("not here")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 128 + signal.SIGINT
    assert done.stdout == "still here\n"


def test_a_launcher_that_has_ended_is_a_request(tmp_path: Path) -> None:
    """A rank notices that its launcher (here a script of that name) was killed; otherwise it would keep training."""
    rank = tmp_path / "rank.py"
    rank.write_text(
        textwrap.dedent(
            """
            import sys, time
            from pathlib import Path
            from colt5dist.train.guard.stop import StopRequests
            folder = Path(sys.argv[1])
            stop = StopRequests(folder, watch_files=False, max_minutes=None)
            assert stop.reason() is None
            (folder / "ready").touch()
            for _ in range(300):
                if stop.reason():
                    (folder / "new").write_text(stop.reason().name)
                    (folder / "new").rename(folder / "reason")
                    break
                time.sleep(0.1)
            """
        )
    )
    launcher = tmp_path / "torchrun"
    launcher.write_text(f"import subprocess, sys\nsubprocess.run([sys.executable, {str(rank)!r}, {str(tmp_path)!r}])\n")
    process = subprocess.Popen([sys.executable, str(launcher)])
    wait_for(tmp_path / "ready")
    process.kill()
    process.wait()
    wait_for(tmp_path / "reason")
    assert (tmp_path / "reason").read_text() == "LAUNCHER"


def wait_for(path: Path) -> None:
    """Wait until a file exists."""
    deadline = time.monotonic() + 40
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.05)
    time.sleep(0.05)

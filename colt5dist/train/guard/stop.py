"""Requests to stop or to save: signals, files, the time limit, and a launcher that has ended.

A signal handler only sets a flag. The ranks sum their flags once per step, and between the batches of an evaluation, so
that all of them stop at the same place. Signals that the `deepspeed` launcher itself sends afterwards (a second
SIGTERM, a SIGTERM after Ctrl-C) change nothing.
"""

import os
import signal
import sys
import time
from contextlib import suppress
from enum import Enum
from pathlib import Path
from types import FrameType

import torch

from colt5dist.train.guard.launcher import launcher_is_gone
from colt5dist.train.ranks import sum_over_ranks

STOP_AT_ONCE_SECONDS = 3.0
"""A second Ctrl-C later than this ends the process at once; an earlier one may come from the launcher."""
STOP_MESSAGE = "the run ends after this step and its checkpoint"
SECOND_MESSAGE = "; another Ctrl-C ends it without them"
"""What follows it after Ctrl-C."""


class StopReason(Enum):
    """Why a run ends before its last step."""

    FILE = "file STOP"
    SIGNAL = "signal"
    TIME = "train.max_minutes"
    LAUNCHER = "launcher is gone"


class StopRequests:
    """Collects the requests that reached this rank. Creating it installs the signal handlers.

    Args:
        run_dir: folder of the run, in which a user may create the files STOP and SAVE.
        watch_files: whether this rank looks for them, and prints that it received a signal; one rank is enough.
        max_minutes: minutes from the start of this process after which to stop; None: no limit.
    """

    def __init__(self, run_dir: Path, *, watch_files: bool, max_minutes: float | None) -> None:
        self.run_dir = run_dir
        self.watch_files = watch_files
        self.deadline = None if max_minutes is None else time.monotonic() - seconds_since_start() + 60 * max_minutes
        self.signalled = False
        self._wanted: StopReason | None = None
        self._not_removed: set[str] = set()
        self._first_interrupt: float | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._handle)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # ignored: the run was started with nohup
            signal.signal(signal.SIGHUP, self._handle)

    def reason(self) -> StopReason | None:
        """Why this rank asks to stop, or None; a reason remains once there is one."""
        self._wanted = self._wanted or self._find_reason()
        return self._wanted

    def _find_reason(self) -> StopReason | None:
        if self.signalled:
            return StopReason.SIGNAL
        if self.watch_files and (self.run_dir / "STOP").is_file():
            return StopReason.FILE
        if self.deadline is not None and time.monotonic() > self.deadline:
            return StopReason.TIME
        if launcher_is_gone():
            return StopReason.LAUNCHER
        return None

    def agree(self, device: torch.device) -> StopReason | None:
        """Why any rank asks to stop, or None; collective, the same answer on all ranks."""
        mine = self.reason()
        wanted = torch.tensor([mine is reason for reason in StopReason], dtype=torch.float32, device=device)
        counts = sum_over_ranks(wanted).tolist()
        return next((reason for reason, count in zip(StopReason, counts, strict=True) if count), None)

    def save_requested(self) -> bool:
        """Whether a file SAVE asks for a checkpoint now."""
        return self.watch_files and "SAVE" not in self._not_removed and (self.run_dir / "SAVE").is_file()

    def obeyed(self, name: str) -> None:
        """Remove the file STOP or SAVE once its request is fulfilled, so that it counts once.

        Args:
            name: "STOP" or "SAVE".
        """
        if not self.watch_files:
            return
        if name == "STOP":
            self._wanted = None
        try:
            (self.run_dir / name).unlink(missing_ok=True)
        except OSError as error:
            self._not_removed.add(name)
            print(f"warning: {self.run_dir / name} cannot be removed ({error.strerror})", file=sys.stderr, flush=True)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._first_interrupt is not None and now - self._first_interrupt > STOP_AT_ONCE_SECONDS:
                os._exit(128 + number)  # a user pressed Ctrl-C twice: end at once, without a checkpoint
            self._first_interrupt = self._first_interrupt or now
        if not self.signalled and self.watch_files:
            with suppress(OSError):  # the terminal may be gone
                second = SECOND_MESSAGE if number == signal.SIGINT else ""
                line = f"\n{signal.Signals(number).name}: {STOP_MESSAGE}{second}\n"
                os.write(2, line.encode())  # not print: this handler may have interrupted a print
        self.signalled = True


def seconds_since_start() -> float:
    """Seconds since this process began, imports and all; a job's time limit counts them too.

    Source: proc(5), field 22 of /proc/self/stat, in clock ticks since the boot.
    """
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()  # a name may contain blanks
        began = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - began)
    except (OSError, ValueError, IndexError):
        return 0.0  # a system without /proc

"""Requests to stop or to save, from signals, files, the clock and the launcher's death.

A handler only sets a flag; the loop adds the flags of all ranks once a step, so that all agree on the same step.
What the `deepspeed` launcher sends itself (a second SIGTERM, a SIGTERM after Ctrl-C) is an echo and changes nothing.
"""

import os
import signal
import time
from enum import Enum
from pathlib import Path
from types import FrameType

import psutil

PROGRAMS = {"deepspeed", "torchrun"}
MODULES = ("deepspeed.launcher", "torch.distributed")
STOP_AT_ONCE_SECONDS = 3.0


class StopReason(Enum):
    """Why a run ends before its last step."""

    FILE = "file STOP"
    SIGNAL = "signal"
    TIME = "train.max_minutes"
    LAUNCHER = "launcher is gone"


class StopRequests:
    """Collects what this rank was asked to do.

    Args:
        run_dir: folder in which the files STOP and SAVE are looked for.
        watch_files: whether this rank looks for them (one rank is enough).
        max_minutes: minutes from now after which to stop.
    """

    def __init__(self, run_dir: Path, *, watch_files: bool, max_minutes: float | None) -> None:
        self.run_dir = run_dir
        self.watch_files = watch_files
        self.deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.signalled = False
        self._first_interrupt: float | None = None
        self._launchers = _launcher_processes()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._handle)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # else the run was started with nohup
            signal.signal(signal.SIGHUP, self._handle)

    def reason(self) -> StopReason | None:
        """Why this rank wants to stop, if it does."""
        if self.signalled:
            return StopReason.SIGNAL
        if self.watch_files and (self.run_dir / "STOP").exists():
            return StopReason.FILE
        if self.deadline is not None and time.monotonic() > self.deadline:
            return StopReason.TIME
        if any(not _is_alive(p) for p in self._launchers):
            return StopReason.LAUNCHER
        return None

    def save_requested(self) -> bool:
        """Whether a file SAVE asks for a checkpoint now."""
        return self.watch_files and (self.run_dir / "SAVE").exists()

    def obeyed(self, name: str) -> None:
        """Remove the file STOP or SAVE, so that it counts once."""
        if self.watch_files:
            (self.run_dir / name).unlink(missing_ok=True)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._first_interrupt is not None and now - self._first_interrupt > STOP_AT_ONCE_SECONDS:
                os._exit(128 + number)  # asked twice by hand: give up at once, without a checkpoint
            self._first_interrupt = self._first_interrupt or now
        self.signalled = True


def _launcher_processes() -> list[psutil.Process]:
    """The launcher's processes above this one; their death leaves this rank an orphan, which is a request to stop."""
    try:
        ancestors = psutil.Process().parents()[:2]
        return [p for p in ancestors if _is_launcher(p.cmdline())]
    except psutil.Error:
        return []


def _is_launcher(command: list[str]) -> bool:
    """Whether a command is `deepspeed`, `torchrun`, or one of their modules run by Python."""
    programs = {Path(part).name for part in command[:3]}
    modules = {command[i + 1] for i, part in enumerate(command[:-1]) if part == "-m"}
    return bool(programs & PROGRAMS) or any(module.startswith(MODULES) for module in modules)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

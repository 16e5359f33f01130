"""Requests to stop or to save, from signals, files, the clock and the launcher's death.

A handler only sets a flag; the ranks add their flags once a step, and between the batches of an evaluation, so that
all agree on the same place.
What the `deepspeed` launcher sends itself (a second SIGTERM, a SIGTERM after Ctrl-C) is an echo and changes nothing.
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
HEARD = b"\nsignal: the run ends after this step and its checkpoint; Ctrl-C once more gives up without them\n"


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
        watch_files: whether this rank looks for them (one rank is enough), and says that it was asked to stop.
        max_minutes: minutes from now after which to stop.
    """

    def __init__(self, run_dir: Path, *, watch_files: bool, max_minutes: float | None) -> None:
        self.run_dir = run_dir
        self.watch_files = watch_files
        self.deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.signalled = False
        self._wanted: StopReason | None = None
        self._left: set[str] = set()
        self._first_interrupt: float | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._handle)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # else the run was started with nohup
            signal.signal(signal.SIGHUP, self._handle)

    def reason(self) -> StopReason | None:
        """Why this rank wants to stop, if it does; once it does, that stays so."""
        self._wanted = self._wanted or self._look()
        return self._wanted

    def _look(self) -> StopReason | None:
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
        """Why some rank wants to stop; every rank calls this at the same time, and all get the same answer."""
        mine = self.reason()
        wanted = torch.tensor([mine is reason for reason in StopReason], dtype=torch.float32, device=device)
        counts = sum_over_ranks(wanted).tolist()
        return next((reason for reason, count in zip(StopReason, counts, strict=True) if count), None)

    def save_requested(self) -> bool:
        """Whether a file SAVE asks for a checkpoint now."""
        return self.watch_files and "SAVE" not in self._left and (self.run_dir / "SAVE").is_file()

    def obeyed(self, name: str) -> None:
        """Remove the file STOP or SAVE, so that it counts once."""
        if not self.watch_files:
            return
        if name == "STOP":
            self._wanted = None
        try:
            (self.run_dir / name).unlink(missing_ok=True)
        except OSError as error:
            self._left.add(name)
            print(f"warning: {self.run_dir / name} cannot be removed ({error.strerror})", file=sys.stderr, flush=True)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._first_interrupt is not None and now - self._first_interrupt > STOP_AT_ONCE_SECONDS:
                os._exit(128 + number)  # asked twice by hand: give up at once, without a checkpoint
            self._first_interrupt = self._first_interrupt or now
        if not self.signalled and self.watch_files:
            with suppress(OSError):  # nobody may be reading any more
                os.write(2, HEARD)  # not print, which this handler may have interrupted
        self.signalled = True

"""Keeps a run alive when its output cannot be written: a lost terminal, a `tee` ended by Ctrl-C, a full disk."""

import errno
import io
import os
import select
import sys
from collections.abc import Callable
from typing import Any

WAIT_SECONDS = 1.0
"""How long a write to a full non-blocking descriptor waits for the reader."""


class _Outlived(io.FileIO):
    """A descriptor whose write errors are not raised. When no reader is left, later output goes to /dev/null."""

    failure: OSError | None = None
    """Why output was lost although a reader may still wait for it; None if none was."""

    def write(self, data: Any, /) -> int:
        """Write the data; on an error, report it as written anyway."""
        try:
            # None where the descriptor is non-blocking, which another process that shares it may have set
            while (written := super().write(data)) is None:
                if not select.select([], [self], [], WAIT_SECONDS)[1]:
                    raise BlockingIOError(errno.EAGAIN, "no process reads it")
            return written
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):  # not for a full disk, which may have space again later
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.fileno())
                os.close(null)
            else:
                self.failure = error
            return memoryview(data).nbytes


def outlive_readers() -> None:
    """From now on, lose a line that cannot be written instead of raising an error; for the main script of a process."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__") or not isinstance(stream, io.TextIOWrapper):
            continue  # the stream was replaced to capture the output
        raw = _Outlived(stream.fileno(), "w", closefd=False)
        text = io.TextIOWrapper(
            io.BufferedWriter(raw), encoding=stream.encoding, errors=stream.errors, line_buffering=True
        )
        setattr(sys, name, text)


def as_command(main: Callable[[list[str]], int]) -> Callable[[], int]:
    """Return the function that a script of launch/ runs, and that is installed as its command.

    Args:
        main: takes the arguments and returns the exit status.

    Returns:
        A function without arguments that calls `main` with those of this process, and outlives the output's readers.
    """

    def command() -> int:
        outlive_readers()
        return main(sys.argv[1:])

    return command


def status_of_report() -> int:
    """Return the exit status of a command that only prints: 1, with a line on stderr, if a part was lost, else 0."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if not isinstance(raw, _Outlived) or raw.failure is None:
        return 0
    print(
        f"error: standard output cannot be written ({raw.failure.strerror}); a part of the output is lost",
        file=sys.stderr,
    )
    return 1

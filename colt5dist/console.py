"""Standard output and error that a run outlives: a lost terminal, `| tee` that Ctrl-C ended, a log on a full disk."""

import errno
import io
import os
import select
import sys
from typing import Any

WAIT_SECONDS = 1.0
"""For the reader of a descriptor that does not wait itself."""


class _Outlived(io.FileIO):
    """A descriptor whose errors stop nobody. Where no reader is left, what follows goes to /dev/null."""

    failure: OSError | None = None
    """Why something is lost that a reader may still wait for."""

    def write(self, data: Any, /) -> int:
        """Write, or count it as written."""
        try:
            # None where the descriptor is not to wait: whoever shares it may have set that
            while (written := super().write(data)) is None:
                if not select.select([], [self], [], WAIT_SECONDS)[1]:
                    raise BlockingIOError(errno.EAGAIN, "nobody reads it")
            return written
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):  # not on a full disk, which may have space again
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.fileno())
                os.close(null)
            else:
                self.failure = error
            return memoryview(data).nbytes


def outlive_readers() -> None:
    """From now on a line that cannot be written is lost, and its writer goes on; for a process of its own."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__") or not isinstance(stream, io.TextIOWrapper):
            continue  # somebody captures it
        raw = _Outlived(stream.fileno(), "w", closefd=False)
        text = io.TextIOWrapper(
            io.BufferedWriter(raw), encoding=stream.encoding, errors=stream.errors, line_buffering=True
        )
        setattr(sys, name, text)


def status_of_report() -> int:
    """The exit status of what only prints: 0, or 1 and one line if a part of it could not be written."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if not isinstance(raw, _Outlived) or raw.failure is None:
        return 0
    print(f"error: standard output cannot be written ({raw.failure.strerror}); a part is lost", file=sys.stderr)
    return 1

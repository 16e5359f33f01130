"""Standard output and error that a run outlives: a lost terminal, `| tee` that Ctrl-C ended, a log on a full disk."""

import errno
import io
import os
import sys
from typing import Any


class _Outlived(io.FileIO):
    """A descriptor whose errors stop nobody. Where no reader is left, what follows goes to /dev/null."""

    def write(self, data: Any, /) -> int:
        """Write, or count it as written."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):  # not on a full disk, which may have space again
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.fileno())
                os.close(null)
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

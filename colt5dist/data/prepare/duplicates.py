"""Texts that were seen before, told by a hash of all of their bytes; the memory of it survives a kill."""

import os
from pathlib import Path

DIGEST_BYTES = 16


class SeenTexts:
    """A growing set of digests, kept in a file beside it; about 100 bytes of memory a text."""

    def __init__(self, path: Path, count: int | None = None) -> None:
        """Begin with none, or go on with the first `count` digests of the file `path`."""
        self._file = open(path, "r+b" if count else "w+b")  # noqa: SIM115
        content = self._file.read((count or 0) * DIGEST_BYTES)
        self._seen = {content[start : start + DIGEST_BYTES] for start in range(0, len(content), DIGEST_BYTES)}
        self._file.truncate(len(content))

    def add(self, digest: bytes) -> bool:
        """Whether the text was not seen before; now it is."""
        if digest in self._seen:
            return False
        self._seen.add(digest)
        self._file.write(digest)
        return True

    def save(self) -> int:
        """Bring the file to the disk; returns what to go on with."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return len(self._seen)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

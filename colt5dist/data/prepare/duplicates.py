"""Finds duplicate texts by a hash of all of their bytes. The hashes are kept in a file, so they survive a kill."""

import os
from pathlib import Path

DIGEST_BYTES = 16


class SeenTexts:
    """A growing set of digests, also kept in a file; it needs about 100 bytes of memory per text.

    Args:
        path: the file.
        count: digests of the file to continue with; None starts with none.
    """

    def __init__(self, path: Path, count: int | None = None) -> None:
        self._file = open(path, "r+b" if count else "w+b")  # noqa: SIM115
        content = self._file.read((count or 0) * DIGEST_BYTES)
        self._seen = {content[start : start + DIGEST_BYTES] for start in range(0, len(content), DIGEST_BYTES)}
        self._file.truncate(len(content))

    def add(self, digest: bytes) -> bool:
        """Add the digest of a text; return whether it is new."""
        if digest in self._seen:
            return False
        self._seen.add(digest)
        self._file.write(digest)
        return True

    def save(self) -> int:
        """Flush the file to disk; return the `count` to continue with."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return len(self._seen)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

"""Compressed input files as streams: gzip and zstandard. A truncated file is an error in both."""

import gzip
import io
import lzma
import zipfile
import zlib
from typing import BinaryIO

import zstandard

DAMAGE = (EOFError, NotImplementedError, lzma.LZMAError, zlib.error, zstandard.ZstdError, zipfile.BadZipFile)
"""Exceptions that reading a damaged stream raises, besides OSError; NotImplementedError is that of zipfile, for ways of
packing that it does not know."""

READ_BYTES = 1 << 17
MAX_WINDOW = 1 << 31  # the largest that `zstd --long` makes; the package's default refuses more than 128 MiB


def open_compressed(raw: BinaryIO, suffix: str) -> BinaryIO:
    """Return the decompressed content of an open file as a stream; reading it raises OSError or one of DAMAGE.

    Args:
        raw: the compressed file.
        suffix: ".gz" or ".zst".
    """
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    assert suffix == ".zst", suffix
    return io.BufferedReader(_ZstdStream(raw), READ_BYTES)  # type: ignore[type-var]


class _ZstdStream(io.RawIOBase):
    """Decompresses the zstandard frames of a file. The package's own reader accepts a truncated file as complete."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).decompressobj()
        self._begun = False  # whether a frame has begun and not ended
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        while not self._content:
            block = self._raw.read(READ_BYTES)
            if not block:
                if self._begun:
                    raise EOFError("the file ends within a frame")
                return 0
            self._content = memoryview(self._decompress(block))
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count

    def _decompress(self, block: bytes) -> bytes:
        parts = []
        while block:
            parts.append(self._frame.decompress(block))
            self._begun = not self._frame.eof
            if self._begun:
                break
            block = self._frame.unused_data
            self._frame = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).decompressobj()
        return b"".join(parts)

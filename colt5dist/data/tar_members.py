"""How records lie in the tar shards: a member's name, its content's field, and the bytes of its header."""

import io
import tarfile
from functools import cache

import webdataset

MEMBER_TOKENS = 1 << 17  # a quarter to half a megabyte: large enough to read fast, small enough to cache many
FIELD = "tokens"


def member_key(member: int) -> str:
    """Name of a member without its extension: unique in the set, and without a dot, which webdataset would split at."""
    return f"{member:010d}"


def tar_member(key: str, content: bytes) -> bytes:
    """One member as webdataset writes it, header and padding included, without the end of the file."""
    buffer = io.BytesIO()
    with webdataset.TarWriter(buffer, encoder=False, mtime=0, user="", group="", compress=False) as tar:
        tar.write({"__key__": key, FIELD: content})
    blocks = 1 + -(-len(content) // tarfile.BLOCKSIZE)
    return buffer.getvalue()[: blocks * tarfile.BLOCKSIZE]


def tar_header(member: int, size: int) -> bytes:
    """The header of tar_member's member number `member` with a content of `size` bytes."""
    header = bytearray(_empty_header())
    key = member_key(member).encode()
    header[: len(key)] = key
    header[124:135] = b"%011o" % size
    header[148:156] = b" " * 8  # the checksum is taken over blanks in its own place
    header[148:155] = b"%06o\0" % sum(header)
    return bytes(header)


@cache
def _empty_header() -> bytes:
    return tar_member(member_key(0), b"")[: tarfile.BLOCKSIZE]

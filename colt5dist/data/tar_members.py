"""The form of a member of the tar shards: its name, the field of its content, and the bytes of its header."""

import io
import tarfile
from functools import cache

import webdataset

MEMBER_TOKENS = 1 << 17
"""Largest number of tokens in a member, 256 or 512 KiB: large enough to read fast, small enough to cache many."""
FIELD = "tokens"
"""File name extension of a member, which webdataset uses as the name of the field."""


def member_key(member: int) -> str:
    """Return the name of a member without its extension.

    It is unique in the set and has no dot, since webdataset would split it there.
    """
    return f"{member:010d}"


def tar_member(key: str, content: bytes) -> bytes:
    """Return a member as webdataset writes it, header and padding included, without the end of the tar file.

    Args:
        key: the member's name without extension.
        content: the member's content.
    """
    buffer = io.BytesIO()
    with webdataset.TarWriter(buffer, encoder=False, mtime=0, user="", group="", compress=False) as tar:
        tar.write({"__key__": key, FIELD: content})
    blocks = 1 + -(-len(content) // tarfile.BLOCKSIZE)
    return buffer.getvalue()[: blocks * tarfile.BLOCKSIZE]


def tar_header(member: int, size: int) -> bytes:
    """Return the header that `tar_member` writes for member number `member` with a content of `size` bytes."""
    header = bytearray(_empty_header())
    key = member_key(member).encode()
    header[: len(key)] = key
    header[124:135] = b"%011o" % size
    header[148:156] = b" " * 8  # the checksum is computed with spaces in its own field
    header[148:155] = b"%06o\0" % sum(header)
    return bytes(header)


@cache
def _empty_header() -> bytes:
    return tar_member(member_key(0), b"")[: tarfile.BLOCKSIZE]

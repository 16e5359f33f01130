"""The binary index of a shard set: where every member and document is, with a checksum for every record.

All tokens of a set are numbered on one axis, in the order in which they were written, without separators. A position
below is a number on this axis. Three files with little-endian arrays describe it:

- members.bin: for each tar member, the position after its tokens, the number of records up to its end, and its offset,
  size and shard (MEMBER_DTYPE);
- documents.bin: for each document, the position after its tokens (int64);
- checksums.bin: for each record, the CRC32 of its stored bytes (uint32). A record is the part of a document that is in
  one member: usually the whole document, since only long documents are split.
"""

import mmap
import os
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from colt5dist.data.manifest import IndexEntry, Manifest
from colt5dist.errors import ConfigError

MEMBER_DTYPE = np.dtype(
    [("tokens_end", "<i8"), ("records_end", "<i8"), ("offset", "<i8"), ("size", "<i4"), ("shard", "<i4")]
)
INDEX_DTYPES = {
    "index/members.bin": MEMBER_DTYPE,
    "index/documents.bin": np.dtype("<i8"),
    "index/checksums.bin": np.dtype("<u4"),
}


class Index:
    """The memory-mapped index of one shard set.

    Args:
        folder: folder of the set.
        manifest: manifest of the set.

    Raises:
        ConfigError: a file is missing, damaged, or belongs to another set.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        arrays = {}
        entries = {entry.file: entry for entry in manifest.index}
        for name, dtype in INDEX_DTYPES.items():
            arrays[name] = _map(folder / name, entries[name], dtype)
        self.members, self.document_ends, self.checksums = arrays.values()
        counts = (
            len(self.members) == sum(shard.members for shard in manifest.shards),
            len(self.document_ends) == manifest.documents,
            int(self.members["tokens_end"][-1]) == int(self.document_ends[-1]) == manifest.tokens,
            int(self.members["records_end"][-1]) == len(self.checksums),
        )
        if not all(counts):
            raise ConfigError(
                f"{folder / 'index'}: does not belong to {folder / 'manifest.json'}; prepare the shards again"
            )

        # a contiguous copy: searching the strided column would copy it at every call
        self.member_ends = np.ascontiguousarray(self.members["tokens_end"])

    def member_at(self, position: int) -> int:
        """Return the number of the member that holds the token at `position`."""
        return int(self.member_ends.searchsorted(position, side="right"))

    def member_start(self, member: int) -> int:
        """Return the position of the first token of a member."""
        return int(self.member_ends[member - 1]) if member else 0

    def record_lengths(self, member: int) -> NDArray[np.int64]:
        """Return the number of tokens of each record of a member, (records,)."""
        start, end = self.member_start(member), int(self.member_ends[member])
        first, last = np.searchsorted(self.document_ends, [start, end], side="right")
        lengths = np.diff(np.concatenate(([start], self.document_ends[first:last], [end])))
        return lengths[lengths > 0]

    def record_checksums(self, member: int) -> NDArray[np.uint32]:
        """Return the CRC32 of each record of a member, (records,)."""
        first = int(self.members["records_end"][member - 1]) if member else 0
        return self.checksums[first : int(self.members["records_end"][member])]


def _map(path: Path, entry: IndexEntry, dtype: np.dtype) -> NDArray[Any]:
    """Map an index file into memory, after comparing its size and checksum with the manifest."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            if size != entry.bytes or size == 0 or size % dtype.itemsize:
                raise ConfigError(
                    f"{path}: has {size} bytes, the manifest says {entry.bytes}; copy or prepare the shards again"
                )
            if checksum(file) != entry.crc32:
                raise ConfigError(f"{path}: is damaged, its checksum differs; copy or prepare the shards again")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); copy or prepare the shards again") from None
    return np.frombuffer(mapped, dtype=dtype)


def checksum(file: BinaryIO) -> int:
    """Return the CRC32 of the whole content of an open file."""
    file.seek(0)
    value = 0
    while block := file.read(1 << 20):
        value = zlib.crc32(block, value)
    return value


class IndexWriter:
    """Appends to the three files of an index; can be cut back to an earlier state.

    Args:
        folder: folder of the set; the files are in its folder index/.
        counts: entries of the three files to continue after; None starts a new index.
    """

    def __init__(self, folder: Path, counts: tuple[int, ...] | None = None) -> None:
        (folder / "index").mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._files: dict[str, BinaryIO] = {}
        for name, dtype, count in zip(INDEX_DTYPES, INDEX_DTYPES.values(), counts or (0, 0, 0), strict=True):
            file = open(folder / name, "r+b" if counts else "w+b")  # noqa: SIM115
            file.truncate(count * dtype.itemsize)
            file.seek(0, 2)
            self._files[name] = file
        self.num_members, self.num_documents, self.num_records = counts or (0, 0, 0)

    @property
    def counts(self) -> tuple[int, int, int]:
        """Entries of the three files: the state that a new writer continues from."""
        return self.num_members, self.num_documents, self.num_records

    def add_member(self, *, tokens_end: int, offset: int, size: int, shard: int, checksums: list[int]) -> None:
        """Add a tar member that was written.

        Args:
            tokens_end: position after its tokens.
            offset: bytes of the shard before it.
            size: its bytes, header and padding included.
            shard: number of its shard.
            checksums: CRC32 of each of its records.
        """
        self.num_members += 1
        self.num_records += len(checksums)
        row = np.array([(tokens_end, self.num_records, offset, size, shard)], dtype=MEMBER_DTYPE)
        self._files["index/members.bin"].write(row.tobytes())
        self._files["index/checksums.bin"].write(np.array(checksums, dtype="<u4").tobytes())

    def add_document(self, end: int) -> None:
        """Add a document by the position after its tokens."""
        self.num_documents += 1
        self._files["index/documents.bin"].write(end.to_bytes(8, "little"))

    def flush(self) -> None:
        """Flush everything that was added to disk."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> tuple[IndexEntry, ...]:
        """Close the files and return their entries of the manifest."""
        entries = []
        for name, file in self._files.items():
            size = file.seek(0, 2)
            entries.append(IndexEntry(file=name, bytes=size, crc32=checksum(file)))
            file.close()
        return tuple(entries)

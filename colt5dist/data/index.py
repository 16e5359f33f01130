"""The binary index of a shard set: where every member and document lies, with a checksum for every record.

All tokens of a set stand on one axis, in the order in which they were written, without separators. Three
little-endian arrays describe it:

- members.bin: per tar member the end of its tokens on the axis, the end of its records, and where it lies
  (MEMBER_DTYPE);
- documents.bin: per document the end of its tokens on the axis (int64);
- checksums.bin: per record the CRC32 of its stored bytes (uint32). A record is the part of a document that lies in
  one member: mostly all of it; long documents are cut.
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
    """The memory-mapped index of one shard set."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Map the files; ConfigError if one is missing, damaged, or of another set."""
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

        # a column of its own: searching the strided one would copy it at every call
        self.member_ends = np.ascontiguousarray(self.members["tokens_end"])

    def member_at(self, position: int) -> int:
        """Number of the member that holds the token at `position`."""
        return int(self.member_ends.searchsorted(position, side="right"))

    def member_start(self, member: int) -> int:
        """Position of the first token of a member."""
        return int(self.member_ends[member - 1]) if member else 0

    def record_lengths(self, member: int) -> NDArray[np.int64]:
        """Tokens of each record of a member."""
        start, end = self.member_start(member), int(self.member_ends[member])
        first, last = np.searchsorted(self.document_ends, [start, end], side="right")
        lengths = np.diff(np.concatenate(([start], self.document_ends[first:last], [end])))
        return lengths[lengths > 0]

    def record_checksums(self, member: int) -> NDArray[np.uint32]:
        """CRC32 of each record of a member."""
        first = int(self.members["records_end"][member - 1]) if member else 0
        return self.checksums[first : int(self.members["records_end"][member])]


def _map(path: Path, entry: IndexEntry, dtype: np.dtype) -> NDArray[Any]:
    """Map an index file after its size and checksum are found right."""
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
    """CRC32 of an open file, from its start."""
    file.seek(0)
    value = 0
    while block := file.read(1 << 20):
        value = zlib.crc32(block, value)
    return value


class IndexWriter:
    """Appends to the three files of an index; can be cut back to an earlier state."""

    def __init__(self, folder: Path, counts: tuple[int, ...] | None = None) -> None:
        """Begin an index in `folder`, or go on after the first `counts` entries of its files."""
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
        """Entries of the three files, which is all that is needed to go on."""
        return self.num_members, self.num_documents, self.num_records

    def add_member(self, *, tokens_end: int, offset: int, size: int, shard: int, checksums: list[int]) -> None:
        """Add a written tar member and the CRC32 of its records."""
        self.num_members += 1
        self.num_records += len(checksums)
        row = np.array([(tokens_end, self.num_records, offset, size, shard)], dtype=MEMBER_DTYPE)
        self._files["index/members.bin"].write(row.tobytes())
        self._files["index/checksums.bin"].write(np.array(checksums, dtype="<u4").tobytes())

    def add_document(self, end: int) -> None:
        """Add a document by the end of its tokens on the axis."""
        self.num_documents += 1
        self._files["index/documents.bin"].write(end.to_bytes(8, "little"))

    def flush(self) -> None:
        """Bring what was added to the disk."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> tuple[IndexEntry, ...]:
        """Close the files and describe them."""
        entries = []
        for name, file in self._files.items():
            size = file.seek(0, 2)
            entries.append(IndexEntry(file=name, bytes=size, crc32=checksum(file)))
            file.close()
        return tuple(entries)

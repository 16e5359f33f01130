"""Token files of Megatron-LM: a .bin file with the ids of all documents, and an .idx file that says where each is.

The .idx file is: the magic, the version, the type of the ids, the numbers of sequences and of bounds of documents; then
the length of each sequence in ids, where each begins in the .bin file in bytes, and the first sequence of each
document, with the number of sequences at the end (`_IndexWriter` in megatron/core/datasets/indexed_dataset.py of
Megatron-LM).
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from colt5dist.data.inputs.records import DamagedError, one_line

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
VERSION = 1
TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Number of a type in the header -> the type; 6 and 7 are floating point."""


@dataclass(frozen=True)
class TokenIds:
    """A document that is ids already."""

    ids: NDArray[np.integer]
    """(tokens,) the ids as they are in the file."""
    place: str
    """Where they are, as `file:document`."""

    def __len__(self) -> int:
        return len(self.ids)


def index_of(path: Path) -> Path:
    """The .idx file that belongs to a .bin file."""
    return path.with_suffix(".idx")


def is_token_file(path: Path) -> bool:
    """Whether a path is a .bin file whose .idx file is beside it; only the magic is read."""
    if path.suffix != ".bin":
        return False
    try:
        with open(index_of(path), "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def token_file_problem(path: Path) -> str:
    """What makes a token file one that cannot be read; empty if nothing.

    Args:
        path: the .bin file.
    """
    try:
        with open(index_of(path), "rb") as file:
            header = file.read(HEADER.size)
    except OSError as error:
        return one_line(error)
    if len(header) < HEADER.size:
        return f"{index_of(path).name} is cut off in its header"
    _, version, kind, _, _ = HEADER.unpack(header)
    if version != VERSION:
        return f"{index_of(path).name} has version {version}, and only version {VERSION} can be read"
    if kind not in TYPES:
        return f"{index_of(path).name} gives the ids the type number {kind}, which is no type of ids"
    return ""


def read_tokens(path: Path, first: int) -> Iterator[tuple[TokenIds, int]]:
    """Yield the documents, and how many bytes of the .bin file were read before the end of each.

    Args:
        path: the .bin file.
        first: documents to leave out.

    Raises:
        DamagedError: the rest cannot be read.
    """
    lost = 1
    try:
        index = index_of(path)
        with open(index, "rb") as file:
            magic, version, kind, num_sequences, num_bounds = HEADER.unpack(file.read(HEADER.size).ljust(HEADER.size))
        if magic != MAGIC or version != VERSION or kind not in TYPES:
            raise DamagedError(token_file_problem(path) or f"{index.name} is no index of tokens")
        lost = num_bounds - 1 - first
        if index.stat().st_size < HEADER.size + 12 * num_sequences + 8 * num_bounds:
            raise DamagedError(f"{index.name} is cut off", lost)
        if not num_bounds or not num_sequences:
            return
        lengths = np.memmap(index, "<i4", "r", HEADER.size, (num_sequences,))
        starts = np.memmap(index, "<i8", "r", HEADER.size + lengths.nbytes, (num_sequences,))
        bounds = np.memmap(index, "<i8", "r", HEADER.size + lengths.nbytes + starts.nbytes, (num_bounds,))
        if bounds[0] != 0 or bounds[-1] != num_sequences:
            raise DamagedError(f"the documents of {index.name} are not all of its sequences", lost)
        dtype = np.dtype(TYPES[kind])
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            for document in range(first, num_bounds - 1):
                begin, end = int(bounds[document]), int(bounds[document + 1])
                if not 0 <= begin <= end <= num_sequences:
                    raise DamagedError(f"the documents of {index.name} are not in order", lost)
                parts, position = [np.empty(0, dtype)], 0
                for sequence in range(begin, end):
                    start, count = int(starts[sequence]), int(lengths[sequence])
                    position = start + count * dtype.itemsize
                    if start < 0 or count < 0 or position > size:
                        raise DamagedError("the file ends within it, or its place is wrong", lost)
                    parts.append(np.frombuffer(os.pread(file.fileno(), position - start, start), dtype))
                lost -= 1
                yield TokenIds(np.concatenate(parts), f"{path}:{document + 1}"), position
            if (left := size - int(starts[-1]) - int(lengths[-1]) * dtype.itemsize) > 0:
                raise DamagedError(f"{left} bytes follow its last document")
    except (OSError, ValueError) as error:
        raise DamagedError(one_line(error), lost) from None

"""Shards of MosaicML Streaming in its format MDS, which are read without its package.

A shard is: the number n of its samples; n + 1 offsets, where the samples begin and end in the file; the description of
the columns, as JSON; the samples. A sample is the sizes of its columns that have no fixed size, then the values of all
columns. Numbers are uint32, little-endian. The whole may be compressed
(https://docs.mosaicml.com/projects/streaming/en/stable/fundamentals/dataset_format.html).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from colt5dist.data.inputs.compressed import DAMAGE, open_compressed
from colt5dist.data.inputs.records import DamagedError, NoTextError, one_line

MDS_SUFFIXES = {".mds": "", ".mds.gz": ".gz", ".mds.zstd": ".zst", ".mds.zst": ".zst"}
"""Ending of a shard -> how it is compressed."""
TEXT_ENCODINGS = ("str", "bytes", "json")
"""Encodings of the columns that may hold text."""
MOST_DESCRIPTION = 1 << 24  # bytes
BLOCK = 1 << 20


def read_mds(path: Path, column: str, first: int) -> Iterator[tuple[Any, int]]:
    """Yield the values of a column, and how many bytes of the file were read before each.

    Args:
        path: the shard.
        column: name of the column.
        first: samples to leave out.

    Yields:
        (value, bytes): the value of a column `str` or `bytes` as bytes, of a column `json` as Python has it.

    Raises:
        DamagedError: the rest cannot be read.
        NoTextError: there is no such column, or it holds no text.
    """
    compression = next(MDS_SUFFIXES[end] for end in MDS_SUFFIXES if path.name.lower().endswith(end))
    lost = 1
    try:
        with open(path, "rb") as raw:
            stream = open_compressed(raw, compression) if compression else raw
            number = int.from_bytes(_exactly(stream, 4), "little")
            offsets = np.frombuffer(_exactly(stream, 4 * (number + 1)), "<u4").astype(np.int64)
            description = _description(stream, int(offsets[0]) - 4 * (number + 2))
            if (np.diff(offsets) < 0).any():
                raise DamagedError("its offsets are not in order", number)
            lost = number - first
            if not number:
                return
            place, encoding = _find(description, column, number)
            if compression:
                for size in np.diff(offsets[: first + 1]).tolist():
                    _exactly(stream, size)  # read as before: where damage shows depends on how much is read at a time
            else:
                stream.seek(int(offsets[min(first, number)]))
            for begin, end in zip(offsets[first:-1].tolist(), offsets[first + 1 :].tolist(), strict=True):
                value = _value(_exactly(stream, end - begin), description["column_sizes"], place)
                lost -= 1
                yield _json(value) if encoding == "json" else value, raw.tell()
            if stream.read(1):
                raise DamagedError("more bytes follow its last sample")
    except DamagedError as error:
        raise DamagedError(str(error), lost) from None
    except (OSError, *DAMAGE) as error:
        raise DamagedError(one_line(error), lost) from None


def _exactly(stream: BinaryIO, size: int) -> bytes:
    """The next bytes; in blocks, since a damaged size may be of gigabytes."""
    parts, left = [], size
    while left:
        block = stream.read(min(left, BLOCK))
        if not block:
            raise DamagedError("the file ends within it")
        parts.append(block)
        left -= len(block)
    return b"".join(parts)


def _description(stream: BinaryIO, size: int) -> dict[str, Any]:
    """The description of the columns, checked."""
    if not 0 < size <= MOST_DESCRIPTION:
        raise DamagedError("is no MDS shard: its first offset leaves no place for the columns")
    try:
        found = json.loads(_exactly(stream, size))
        names, sizes = found["column_names"], found["column_sizes"]
        whole = found["format"] == "mds" and len(names) == len(found["column_encodings"]) == len(sizes)
        whole = whole and all(entry is None or (isinstance(entry, int) and entry >= 0) for entry in sizes)
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise DamagedError("is no MDS shard: the description of its columns cannot be read")
    return found


def _find(description: dict[str, Any], column: str, documents: int) -> tuple[int, str]:
    """Place and encoding of a column."""
    names = description["column_names"]
    if column not in names:
        raise NoTextError(f"its columns are {', '.join(map(str, names))}", documents)
    encoding = str(description["column_encodings"][names.index(column)])
    if encoding not in TEXT_ENCODINGS:
        raise NoTextError(f"the column has the encoding {encoding}, which is no text", documents)
    return names.index(column), encoding


def _value(sample: bytes, sizes: list[int | None], place: int) -> bytes:
    """The value of one column of a sample."""
    varying = [number for number, size in enumerate(sizes) if size is None]
    if len(sample) < 4 * len(varying):
        raise DamagedError("the sizes of its columns do not add up")
    given: NDArray[np.int64] = np.array([size or 0 for size in sizes], dtype=np.int64)
    given[varying] = np.frombuffer(sample, "<u4", count=len(varying))
    ends = 4 * len(varying) + np.cumsum(given)
    if ends[-1] != len(sample):
        raise DamagedError("the sizes of its columns do not add up")
    return sample[int(ends[place] - given[place]) : int(ends[place])]


def _json(value: bytes) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None

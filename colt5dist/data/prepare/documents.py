"""Reads documents from text, jsonl and parquet files, plain or compressed, and counts unreadable ones by kind."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from colt5dist.data.prepare.compressed import DAMAGE, open_compressed
from colt5dist.data.prepare.inputs import InputFile

EXAMPLES = 5
ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Item:
    """The next thing read from a file: a document, a problem, or (neither) a blank line."""

    text: str | None
    """Text of the document, or None."""
    problem: str
    """Kind of the problem, or empty."""
    line: int
    """Line of a jsonl file or row of a parquet file, from 1; 0 in a text file."""
    offset: int
    """Bytes of the (decompressed) file that were read, from where reading can continue; 0 in a parquet file."""
    ends_file: bool
    """Whether nothing more can be read from the file: a text file is one item, and damage ends any file."""
    file_position: int
    """Approximate number of bytes of the file on disk that were read, for the progress bar."""


@dataclass
class Problems:
    """Documents that were left out, by kind."""

    counts: dict[str, int] = field(default_factory=dict)
    """Kind of problem -> number of documents."""
    unwanted: dict[str, int] = field(default_factory=dict)
    """Kind -> number of readable documents that the settings leave out."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Kind of problem -> `file:line` of the first few."""

    def add(self, kind: str, file: InputFile, line: int) -> None:
        """Count a document with a problem, at a line (0: the whole file)."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        places = self.examples.setdefault(kind, [])
        if len(places) < EXAMPLES:
            places.append(f"{file.path}:{line}" if line else str(file.path))

    def leave_out(self, kind: str) -> None:
        """Count a readable document that the settings leave out."""
        self.unwanted[kind] = self.unwanted.get(kind, 0) + 1

    def lines(self) -> list[str]:
        """Return one line per kind, for the terminal."""
        lines = []
        for kind, count in self.counts.items():
            places = self.examples.get(kind, [])
            more = ", ..." if count > len(places) else ""
            line = f"left out, {kind}: {count}" + (f" ({', '.join(places)}{more})" if places else "")
            lines.append(line.encode(errors="backslashreplace").decode())  # a file name may not be valid UTF-8
        lines += [f"left out, {kind}: {count:,}" for kind, count in self.unwanted.items()]
        return lines


def read_items(file: InputFile, *, text_key: str, offset: int = 0, line: int = 0) -> Iterator[Item]:
    """Yield the documents and problems of a file; what cannot be read is a problem, never an exception.

    Args:
        file: the file.
        text_key: key of the text in a jsonl line, column of the text in a parquet file.
        offset: bytes of the (decompressed) file to leave out.
        line: lines or rows before them.
    """
    if file.is_parquet:
        yield from _read_rows(file, text_key, line)
        return
    position = 0
    try:
        with open(file.path, "rb") as raw:
            stream: Any = open_compressed(raw, file.compression) if file.compression else raw
            if file.compression:
                # not seek: the place where reading a damaged file fails depends on how it is read
                for _ in range(line):
                    stream.readline()
            else:
                stream.seek(offset)
            for text, problem, size in _parts(file, stream, text_key):
                offset, line, position = offset + size, line + file.is_jsonl, raw.tell()
                yield Item(text, problem, line, offset, not file.is_jsonl, position)
    except (OSError, *DAMAGE):
        yield Item(None, "unreadable", line + file.is_jsonl, offset, True, position)


def _read_rows(file: InputFile, text_key: str, first: int) -> Iterator[Item]:
    """The rows of a parquet file from number `first` (from 0) on; row groups that end before it are not read."""
    import pyarrow  # imported here: an optional package, needed for these files only
    from pyarrow import parquet

    row = first
    try:
        table = parquet.ParquetFile(file.path)
        num_rows = table.metadata.num_rows
        if text_key not in table.schema_arrow.names:
            yield Item(None, f"no text under {text_key!r}", 0, 0, True, file.bytes)
            return
        group, skipped = 0, 0
        while group < table.num_row_groups and skipped + table.metadata.row_group(group).num_rows <= first:
            skipped += table.metadata.row_group(group).num_rows
            group += 1
        groups = list(range(group, table.num_row_groups))
        for batch in table.iter_batches(batch_size=ROWS_AT_ONCE, columns=[text_key], row_groups=groups):
            for value in batch.column(0):
                if skipped < first:
                    skipped += 1
                    continue
                text, problem = _check_text(value.as_py(), text_key)
                row += 1
                yield Item(text, problem, row, 0, row == num_rows, row * file.bytes // num_rows)
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError):
        yield Item(None, "unreadable", row + 1, 0, True, file.bytes)


def _parts(file: InputFile, stream: BinaryIO, text_key: str) -> Iterator[tuple[str | None, str, int]]:
    """(text, problem, bytes read) of every document; a blank line has neither text nor problem."""
    if not file.is_jsonl:
        content = stream.read()
        yield *_decode(content), len(content)
        return
    for content in stream:
        yield *_decode_line(content, text_key), len(content)


def _decode(content: bytes) -> tuple[str | None, str]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None, "not UTF-8"
    if "\0" in text:
        return None, "binary"
    return (text, "") if text.strip() else (None, "empty")


def _decode_line(content: bytes, text_key: str) -> tuple[str | None, str]:
    if not content.strip():
        return None, ""
    try:
        entry = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return None, "not UTF-8"
    except (ValueError, RecursionError):
        return None, "not JSON"
    return _check_text(entry.get(text_key) if isinstance(entry, dict) else None, text_key)


def _check_text(text: Any, text_key: str) -> tuple[str | None, str]:
    """(text, problem) of a value that should be the text of a document."""
    if not isinstance(text, str):
        return None, f"no text under {text_key!r}"
    try:
        text.encode()
    except UnicodeEncodeError:  # "\\ud800" alone is valid JSON, but not valid text
        return None, "not UTF-8"
    return (text, "") if text.strip() else (None, "empty")

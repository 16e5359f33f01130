"""Reads documents from files of all kinds, and counts unreadable ones by kind."""

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from colt5dist.data.inputs.archives import open_member
from colt5dist.data.inputs.arrow import read_arrow
from colt5dist.data.inputs.compressed import DAMAGE, open_compressed
from colt5dist.data.inputs.files import InputFile
from colt5dist.data.inputs.mds import read_mds
from colt5dist.data.inputs.megatron import TokenIds, read_tokens
from colt5dist.data.inputs.pairs import Pair, PairKeys, pair_of
from colt5dist.data.inputs.records import DamagedError, NoTextError, one_line
from colt5dist.data.long_texts import LONG_BYTES, WINDOW_BYTES

EXAMPLES = 5
ROWS_AT_ONCE = 256
JSON_BYTES = 1 << 20  # of a json file, read at once
MARKED_UP = ("<!doctype html", "<html", "<?xml")
TextKey = str | PairKeys
"""Where the text of a document is in an object or a row; or the two texts of a pair, which is one document."""


@dataclass(frozen=True)
class Item:
    """The next thing read from a file: a document, a problem, or (neither) a blank line."""

    text: str | bytes | TokenIds | Pair | None
    """Text of the document, or None. A text of more than LONG_BYTES is bytes, in UTF-8; a pair is two strings. Token
    files have ids."""
    problem: str
    """Kind of the problem, or empty."""
    line: int
    """Line of a jsonl file, object of an array, or row or record of a table, from 1; 0 in a text file."""
    offset: int
    """Bytes of the (decompressed) file that were read, from where reading can continue; 0 in a table."""
    ends_file: bool
    """Whether nothing more can be read from the file: a text file is one item, and damage ends any file."""
    file_position: int
    """Approximate number of bytes of the file on disk that were read, for the progress bar."""
    reason: str = ""
    """What a library says of the problem, or empty."""
    documents: int = 1
    """Documents that have the problem."""


@dataclass
class Problems:
    """Documents that were left out, by kind."""

    counts: dict[str, int] = field(default_factory=dict)
    """Kind of problem -> number of documents."""
    unwanted: dict[str, int] = field(default_factory=dict)
    """Kind -> number of readable documents that the settings leave out."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Kind of problem -> `file:line` of the first few, with the library's reason."""
    unread_bytes: int = 0
    """Bytes of damaged files, as they are on disk, after the damage."""
    unknown: list[str] = field(default_factory=list)
    """The first few parts of the text that the tokenizer's vocabulary lacks."""

    def add(self, kind: str, file: InputFile, item: Item) -> None:
        """Count a document with a problem, or several of one item."""
        self.counts[kind] = self.counts.get(kind, 0) + item.documents
        places = self.examples.setdefault(kind, [])
        if len(places) < EXAMPLES:
            places.append(describe_place(file, item))

    def leave_out(self, kind: str) -> None:
        """Count a readable document that the settings leave out."""
        self.unwanted[kind] = self.unwanted.get(kind, 0) + 1

    def lines(self) -> list[str]:
        """Return one line per kind, for the terminal."""
        lines = []
        for kind, count in self.counts.items():
            places = self.examples.get(kind, [])
            more = ", ..." if len(places) == EXAMPLES and count > len(places) else ""
            line = f"left out, {kind}: {count:,}" + (f" ({', '.join(places)}{more})" if places else "")
            lines.append(line.encode(errors="backslashreplace").decode())  # a file name may not be valid UTF-8
        lines += [f"left out, {kind}: {count:,}" for kind, count in self.unwanted.items()]
        return lines


def describe_place(file: InputFile, item: Item) -> str:
    """Return where an item is, as `file:line`, and what a library says of its problem."""
    return f"{file.place}{f':{item.line}' if item.line else ''}{f': {item.reason}' if item.reason else ''}"


def read_items(file: InputFile, *, text_key: TextKey, offset: int = 0, line: int = 0) -> Iterator[Item]:
    """Yield the documents and problems of a file; what cannot be read is a problem, never an exception.

    Args:
        file: the file.
        text_key: key of the text in a JSON object, column of the text in a table, unless the file has its own; or
            the keys of a pair.
        offset: bytes of the (decompressed) file to leave out.
        line: lines, objects or rows before them.
    """
    text_key = file.text_key or text_key
    if file.is_parquet:
        yield from _read_rows(file, text_key, line)
        return
    if file.is_arrow or file.is_mds or file.is_tokens:
        assert isinstance(text_key, str), "these hold no pairs"
        yield from _read_records(file, text_key, line)
        return
    position, counted = 0, file.is_jsonl or file.is_json
    try:
        with open(file.path, "rb") as raw:
            stream: Any = _decompressed(file, raw)
            begin = raw.tell() if file.member else 0
            if file.is_json and not _is_lines(stream):
                raw.seek(0)
                for item in _read_values(file, raw, text_key):
                    position = item.file_position
                    if item.line > line:
                        line = item.line
                        yield item
                return
            if file.is_json:
                raw.seek(0)
                stream = _decompressed(file, raw)
            if file.compression or file.member:
                # not seek: the place where reading a damaged file fails depends on how it is read
                for _ in range(line):
                    stream.readline()
            else:
                stream.seek(offset)
            for text, problem, reason, size in _parts(stream, text_key, lines=counted):
                offset, line, position = offset + size, line + counted, raw.tell() - begin
                yield Item(text, problem, line, offset, not counted, position, reason)
    except (OSError, *DAMAGE) as error:
        yield Item(None, "unreadable", line + counted, offset, True, position, one_line(error))


def _decompressed(file: InputFile, raw: BinaryIO) -> BinaryIO:
    if file.member:
        return open_member(raw, file.member)
    return open_compressed(raw, file.compression) if file.compression else raw


def _read_rows(file: InputFile, text_key: TextKey, first: int) -> Iterator[Item]:
    """The rows of a parquet file from number `first` (from 0) on; row groups that end before it are not read."""
    import pyarrow  # imported here: an optional package, needed for these files only
    from pyarrow import parquet

    row, num_rows = first, 0
    columns = [text_key] if isinstance(text_key, str) else [text_key.input_key, text_key.target_key]
    try:
        table = parquet.ParquetFile(file.path)
        num_rows = table.metadata.num_rows
        if missing := [column for column in columns if column not in table.schema_arrow.names]:
            if num_rows:
                there = f"its columns are {', '.join(table.schema_arrow.names)}"
                yield Item(None, f"no text under {missing[0]!r}", 0, 0, True, file.bytes, there, num_rows)
            return
        group, skipped = 0, 0
        while group < table.num_row_groups and skipped + table.metadata.row_group(group).num_rows <= first:
            skipped += table.metadata.row_group(group).num_rows
            group += 1
        groups = list(range(group, table.num_row_groups))
        for batch in table.iter_batches(batch_size=ROWS_AT_ONCE, columns=columns, row_groups=groups):
            for entry in range(batch.num_rows):
                if skipped < first:
                    skipped += 1
                    continue
                value = {name: batch.column(name)[entry].as_py() for name in columns}
                text, problem = _text_of(value, text_key)
                row += 1
                yield Item(text, problem, row, 0, row == num_rows, row * file.bytes // num_rows)
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        position = row * file.bytes // num_rows if num_rows else 0
        yield Item(None, "unreadable", row + 1, 0, True, position, one_line(error), max(num_rows - row, 1))


def _read_records(file: InputFile, text_key: str, first: int) -> Iterator[Item]:
    """The records of an Arrow file, an MDS shard or a token file from number `first` (from 0) on."""
    number, position = first, 0
    try:
        for value, position in _records(file, text_key, first):
            number += 1
            text, problem = _check_value(value, text_key)
            yield Item(text, problem, number, 0, False, position)
    except NoTextError as error:
        yield Item(None, f"no text under {text_key!r}", 0, 0, True, file.bytes, str(error), error.documents)
    except DamagedError as error:
        yield Item(None, "unreadable", number + 1, 0, True, position, str(error), error.documents)


def _records(file: InputFile, text_key: str, first: int) -> Iterator[tuple[Any, int]]:
    if file.is_arrow:
        return read_arrow(file.path, text_key, first)
    return read_mds(file.path, text_key, first) if file.is_mds else read_tokens(file.path, first)


def _check_value(value: Any, text_key: str) -> tuple[str | bytes | TokenIds | None, str]:
    """(text, problem) of a value of a record, which may be bytes in UTF-8 or ids."""
    if isinstance(value, TokenIds):
        return (value, "") if len(value) else (None, "empty")
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            return None, "not UTF-8"
    return _check_text(value, text_key)


def _is_lines(stream: BinaryIO) -> bool:
    """Whether a json file has an object on each line; if not, it is an array, or objects of several lines."""
    head = stream.read(JSON_BYTES).decode("utf-8-sig", errors="replace").lstrip()
    first, *more = head.split("\n", maxsplit=1)
    if head.startswith("["):
        return False
    if not more:
        return True
    try:
        json.loads(first)
    except RecursionError:
        return True
    except ValueError:
        try:
            json.JSONDecoder().raw_decode(head)
        except RecursionError:
            return True
        except json.JSONDecodeError as error:
            return not _may_continue(error, head)
        return False
    return True


def _may_continue(error: json.JSONDecodeError, text: str) -> bool:
    """Whether JSON may be wrong only because more of it follows."""
    return error.msg.startswith("Unterminated string") or error.pos >= len(text) - len("\\ud83d\\ude00")


def _read_values(file: InputFile, raw: BinaryIO, text_key: TextKey) -> Iterator[Item]:
    """The objects of a JSON array, or objects that follow each other; only a part of the file is in memory."""
    stream, number = _decompressed(file, raw), 0
    try:
        for value in _json_values(stream):
            number += 1
            text, problem = _text_of(value, text_key)
            yield Item(text, problem, number, 0, False, raw.tell())
    except (ValueError, RecursionError) as error:
        yield Item(None, "not JSON", number + 1, 0, True, raw.tell(), f"{one_line(error)}; the rest is not read")


def _json_values(stream: BinaryIO) -> Iterator[Any]:
    """The values of a JSON array, or values that follow each other; ValueError where it is neither."""
    decoder, utf_8 = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
    text, position, ended, in_array, wanted = "", 0, False, None, False
    while True:
        position = _BETWEEN.match(text, position).end()  # type: ignore[union-attr]
        if (position == len(text) or wanted) and not ended:
            # twice as much each time, so that a long value is not parsed from its beginning too often
            block = stream.read(max(JSON_BYTES, len(text) - position))
            text, position, ended, wanted = text[position:] + utf_8.decode(block, not block), 0, not block, False
            continue
        if in_array is None and text[position : position + 1] == "[":
            in_array, position = True, position + 1
            continue
        in_array = bool(in_array)
        if position == len(text):
            if in_array:
                raise ValueError("the file ends within the array")
            return
        if in_array and text[position] == "]":
            in_array, position = False, position + 1
            continue
        try:
            value, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            if ended or not _may_continue(error, text):
                raise
            wanted = True
            continue
        if end == len(text) and not ended:  # a number may go on
            wanted = True
            continue
        position = end
        yield value


_BETWEEN = re.compile(r"[\s,]*")


def _parts(
    stream: BinaryIO, text_key: TextKey, *, lines: bool
) -> Iterator[tuple[str | bytes | Pair | None, str, str, int]]:
    """(text, problem, reason, bytes read) of every document; a blank line has neither text nor problem."""
    if not lines:
        assert isinstance(text_key, str), "a file that is one text holds no pair"
        content = stream.read()
        yield *_decode(content, text_key), "", len(content)
        return
    for content in stream:
        yield *_decode_line(content, text_key), "", len(content)


def _decode(content: bytes, text_key: str) -> tuple[str | bytes | None, str]:
    """(text, problem) of a whole file."""
    if len(content) > LONG_BYTES:
        return _check_long(content.removeprefix(codecs.BOM_UTF8), text_key)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None, "not UTF-8"
    if problem := _not_text(text, text_key):
        return None, problem
    return (text, "") if text and not text.isspace() else (None, "empty")


def _check_long(content: bytes, text_key: str) -> tuple[bytes | None, str]:
    """The same for a long file, which is never a string as a whole."""
    utf_8, blank = codecs.getincrementaldecoder("utf-8")(), True
    try:
        for begin in range(0, len(content), WINDOW_BYTES):
            text = utf_8.decode(content[begin : begin + WINDOW_BYTES], final=begin + WINDOW_BYTES >= len(content))
            blank = blank and (not text or text.isspace())
            problem = _not_text(text, text_key if begin == 0 else None)
            if problem:
                return None, problem
    except UnicodeDecodeError:
        return None, "not UTF-8"
    return (None, "empty") if blank else (content, "")


def _not_text(text: str, text_key: str | None) -> str:
    """What a text is instead of plain text, or an empty string; without `text_key` its beginning is not looked at."""
    if "\0" in text:
        return "binary"
    if text_key is None:
        return ""
    if text[:4096].lstrip().lower().startswith(MARKED_UP):
        return "HTML or XML, which is not plain text"
    if _holds_json(text, text_key):
        return "JSON in a file whose name does not end in .jsonl or .json"
    return ""


def _holds_json(text: str, text_key: str) -> bool:
    """Whether a text begins with an object of JSON, alone or in an array, that holds the text of a document."""
    begin = re.match(r"\s*\[?\s*(?=\{)", text)
    try:
        value = json.JSONDecoder().raw_decode(text, begin.end())[0] if begin else None
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and isinstance(value.get(text_key), str)


def _decode_line(content: bytes, text_key: TextKey) -> tuple[str | bytes | Pair | None, str]:
    if content.isspace():
        return None, ""
    try:
        entry = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return None, "not UTF-8"
    except (ValueError, RecursionError):
        return None, "not JSON"
    return _text_of(entry, text_key)


def _text_of(entry: Any, text_key: TextKey) -> tuple[str | bytes | Pair | None, str]:
    """(text, problem) of a value that should be an object with the text of a document, or with a pair."""
    record = entry if isinstance(entry, dict) else {}
    if isinstance(text_key, PairKeys):
        return pair_of(record, text_key)
    return _check_text(record.get(text_key), text_key)


def _check_text(text: Any, text_key: str) -> tuple[str | bytes | None, str]:
    """(text, problem) of a value that should be the text of a document."""
    if not isinstance(text, str):
        return None, f"no text under {text_key!r}"
    try:
        content = text.encode()
    except UnicodeEncodeError:  # "\\ud800" alone is valid JSON, but not valid text
        return None, "not UTF-8"
    if not text or text.isspace():
        return None, "empty"
    return (content if len(content) > LONG_BYTES else text), ""

"""Documents out of text and jsonl files, plain or gzipped, with what is wrong counted by kind."""

import glob
import gzip
import hashlib
import json
import os
import stat
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from colt5dist.data.manifest import holds_shards
from colt5dist.errors import ConfigError

JSONL_SUFFIXES = (".jsonl", ".ndjson")
FOREIGN_SUFFIXES = (".parquet", ".zst", ".tar", ".tgz", ".zip", ".xz", ".bz2", ".pdf")
HASHED_BYTES = 1 << 16
EXAMPLES = 5


@dataclass(frozen=True)
class InputFile:
    """One file to read."""

    path: Path
    """Where it lies."""
    name: str
    """Path below the folder that all inputs share: the same on every machine."""
    bytes: int
    """Size of the file."""

    @property
    def content_key(self) -> str:
        """Hash of name, size, and the first and last 64 KiB: the same on every machine."""
        digest = hashlib.sha256(os.fsencode(self.name) + b"\0%d\0" % self.bytes)
        with open(self.path, "rb") as file:
            digest.update(file.read(HASHED_BYTES))
            file.seek(max(self.bytes - HASHED_BYTES, 0))
            digest.update(file.read(HASHED_BYTES))
        return digest.hexdigest()

    @property
    def is_gzip(self) -> bool:
        """Whether it is compressed."""
        return self.path.suffix == ".gz"

    @property
    def is_jsonl(self) -> bool:
        """Whether each line is a JSON object with one document; otherwise the whole file is one document."""
        return self.path.name.removesuffix(".gz").endswith(JSONL_SUFFIXES)


@dataclass(frozen=True)
class Item:
    """What was read next from a file: a document's text, or a problem."""

    text: str | None
    """The document, or None."""
    problem: str
    """Kind of the problem, or empty."""
    line: int
    """Line of a jsonl file, from 1; of a text file 0."""
    offset: int
    """Bytes of the (decompressed) file up to here: where to go on."""
    ends_file: bool
    """Whether nothing of the file is left to read: a text file is one item, and damage ends any file."""
    file_position: int
    """Bytes of the file on the disk up to about here, for the progress."""


@dataclass
class Problems:
    """Documents that were left out, by kind."""

    counts: dict[str, int] = field(default_factory=dict)
    """Number by kind."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """`file:line` of the first few, by kind."""

    def add(self, kind: str, file: InputFile, line: int) -> None:
        """Count one."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        places = self.examples.setdefault(kind, [])
        if len(places) < EXAMPLES:
            places.append(f"{file.path}:{line}" if line else str(file.path))

    def lines(self) -> list[str]:
        """One line a kind, for the terminal."""
        lines = []
        for kind, count in self.counts.items():
            places = self.examples.get(kind, [])
            more = ", ..." if count > len(places) else ""
            line = f"left out, {kind}: {count}" + (f" ({', '.join(places)}{more})" if places else "")
            lines.append(line.encode(errors="backslashreplace").decode())  # a file's name need not be UTF-8
        return lines


def find_inputs(patterns: Iterable[str], made: Iterable[Path] = ()) -> list[InputFile]:
    """The files of all glob patterns, each once, in an order that is the same on every machine.

    Folders of shards, and those of `made`, are no input: they may lie among the texts that they are made from.

    Raises:
        ConfigError: a pattern matches no file, or a file cannot be reached or is of a kind that is not read.
    """
    made_folders = {Path(os.path.realpath(folder)) for folder in made}

    @cache
    def is_made(folder: Path) -> bool:
        folder = Path(os.path.realpath(folder))
        return folder in made_folders or holds_shards(folder) or (folder != folder.parent and is_made(folder.parent))

    found: dict[tuple[int, int], tuple[Path, int]] = {}
    for pattern in patterns:
        matches = {Path(match).absolute(): _status(match) for match in glob.glob(pattern, recursive=True)}
        files = {path: status for path, status in matches.items() if status and stat.S_ISREG(status.st_mode)}
        texts = {path: status for path, status in files.items() if not is_made(path.parent)}
        if not texts:
            raise ConfigError(f"--input: {pattern!r} {_why_no_text(pattern, matches, files)}")
        # of the names of one file the shortest way counts
        for path in sorted(texts, key=lambda path: (len(path.parts), path)):
            status = texts[path]
            found.setdefault((status.st_dev, status.st_ino), (path, status.st_size))
    for path, _ in sorted(found.values()):
        kind = Path(path.name.lower().removesuffix(".gz")).suffix
        if kind in FOREIGN_SUFFIXES:
            raise ConfigError(f"--input: {path} is a {kind} file; give text or jsonl files, plain or .gz")
    common = os.path.commonpath([path.parent for path, _ in found.values()])
    inputs = [InputFile(path, path.relative_to(common).as_posix(), size) for path, size in found.values()]
    return sorted(inputs, key=lambda file: file.name)


Statuses = Mapping[Path, os.stat_result | None]


def _status(path: str) -> os.stat_result | None:
    """What a path is; None for a link that leads nowhere, or a file that was just removed."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"--input: {path} cannot be read ({error.strerror}); mend its rights") from None


def _why_no_text(pattern: str, matches: Statuses, files: Statuses) -> str:
    """What is wrong with a pattern that gives no text, and the mend."""
    if not pattern:
        return "is an empty pattern; name text or jsonl files"
    if files:
        return "matches only shards; name the text that they were made from"
    kinds = {path: status.st_mode for path, status in matches.items() if status}
    if pipes := [path for path, mode in kinds.items() if not stat.S_ISDIR(mode)]:
        return f"matches no file, {pipes[0]} is a pipe or device; write what it gives to a file and name that"
    mend = f"give its files, as {os.path.join(pattern, '**', '*.txt')}" if kinds else "name text or jsonl files"
    return f"matches no file; {mend}"


def read_items(file: InputFile, *, text_key: str, offset: int = 0, line: int = 0) -> Iterator[Item]:
    """Read a file from `offset` on, after `line` lines; what cannot be read is a problem, never an exception."""
    position = 0
    try:
        with open(file.path, "rb") as raw:
            stream: Any = gzip.GzipFile(fileobj=raw) if file.is_gzip else raw
            if file.is_gzip and line:
                # not seek: where a damaged file breaks off depends on how it is read
                for _ in range(line):
                    stream.readline()
            else:
                stream.seek(offset)
            for text, problem, size in _parts(file, stream, text_key):
                offset, line, position = offset + size, line + file.is_jsonl, raw.tell()
                yield Item(text, problem, line, offset, not file.is_jsonl, position)
    except (OSError, EOFError, zlib.error):
        yield Item(None, "unreadable", line + file.is_jsonl, offset, True, position)


def _parts(file: InputFile, stream: BinaryIO, text_key: str) -> Iterator[tuple[str | None, str, int]]:
    """(text, problem, bytes read) of every document; blank lines between documents are neither."""
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
    text = entry.get(text_key) if isinstance(entry, dict) else None
    if not isinstance(text, str):
        return None, f"no text under {text_key!r}"
    try:
        text.encode()
    except UnicodeEncodeError:  # "\\ud800" alone is JSON, but no text
        return None, "not UTF-8"
    return (text, "") if text.strip() else (None, "empty")

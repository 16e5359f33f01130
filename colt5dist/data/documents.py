"""Documents out of text and jsonl files, plain or gzipped, with what is wrong counted by kind."""

import glob
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from colt5dist.data.manifest import FORMAT, MANIFEST_NAME
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
        ConfigError: a pattern matches no file, or a file is of a kind that is not read.
    """
    found: dict[tuple[int, int], Path] = {}
    made_folders: dict[Path, bool] = {folder.absolute(): True for folder in made}
    for pattern in patterns:
        matches = [Path(match).absolute() for match in glob.glob(pattern, recursive=True)]
        matches.sort(key=lambda path: (len(path.parts), path))  # of the names of one file the shortest way counts
        try:
            files = [path for path in matches if path.is_file()]
            texts = [path for path in files if not any(_is_made(parent, made_folders) for parent in path.parents)]
            for path in texts:
                status = path.stat()
                found.setdefault((status.st_dev, status.st_ino), path)
        except OSError as error:
            raise ConfigError(f"--input: {error.filename} cannot be read ({error.strerror}); mend its rights") from None
        if not texts:
            mend = "name text or jsonl files"
            if matches and all(path.is_dir() for path in matches):
                mend = f"give its files, as {os.path.join(pattern, '**', '*.txt')}"
            raise ConfigError(f"--input: {pattern!r} matches no file; {mend}")
    paths = sorted(found.values())
    for path in paths:
        if Path(path.name.removesuffix(".gz")).suffix in FOREIGN_SUFFIXES:
            raise ConfigError(f"--input: {path} is a {path.suffix} file; give text or jsonl files, plain or .gz")
    common = os.path.commonpath([path.parent for path in paths])
    inputs = [InputFile(path, path.relative_to(common).as_posix(), path.stat().st_size) for path in paths]
    return sorted(inputs, key=lambda file: file.name)


def _is_made(folder: Path, known: dict[Path, bool]) -> bool:
    """Whether a folder holds shards; `known` keeps the answers."""
    if folder not in known:
        manifest = folder / MANIFEST_NAME
        known[folder] = manifest.is_file() and f'"{FORMAT}"'.encode() in manifest.read_bytes()
    return known[folder]


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

"""Finds the files that prepare reads, from globs and folders: each once, in the same order on every machine."""

import glob
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from colt5dist.data.manifest import holds_shards
from colt5dist.errors import ConfigError

JSONL_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIX = ".parquet"
COMPRESSED_SUFFIXES = (".gz", ".zst")
TEXT_SUFFIXES = (".txt", ".text", ".md")
FOREIGN_SUFFIXES = (".tar", ".tgz", ".zip", ".xz", ".bz2", ".pdf")
HASHED_BYTES = 1 << 16


@dataclass(frozen=True)
class InputFile:
    """One file to read."""

    path: Path
    """Absolute path."""
    name: str
    """Path relative to the common folder of all inputs: the same on every machine."""
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
    def compression(self) -> str:
        """Suffix of the compression, ".gz" or ".zst", or empty."""
        return self.path.suffix.lower() if self.path.suffix.lower() in COMPRESSED_SUFFIXES else ""

    @property
    def is_jsonl(self) -> bool:
        """Whether each line is a JSON object that holds one document."""
        return _bare_name(self.path).endswith(JSONL_SUFFIXES)

    @property
    def is_parquet(self) -> bool:
        """Whether each row is one document. A file that is neither jsonl nor parquet is one document."""
        return _bare_name(self.path).endswith(PARQUET_SUFFIX)


def _bare_name(path: Path) -> str:
    """Name of a file in lower case, without the suffix of the compression."""
    name = path.name.lower()
    for suffix in COMPRESSED_SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def find_inputs(patterns: Iterable[str], made: Iterable[Path] = ()) -> list[InputFile]:
    """Return the files of all glob patterns, each once, in the same order on every machine.

    The name of a folder means all files below it with the suffix of a supported kind. Folders of shards are never
    inputs, so they may be among the texts that they are made from.

    Args:
        patterns: glob patterns and names of folders.
        made: more folders whose files are not inputs.

    Raises:
        ConfigError: a pattern matches no file, or a file cannot be accessed or is of a kind that is not supported.
    """
    made_folders = {Path(os.path.realpath(folder)) for folder in made}

    @cache
    def is_made(folder: Path) -> bool:
        folder = Path(os.path.realpath(folder))
        return folder in made_folders or holds_shards(folder) or (folder != folder.parent and is_made(folder.parent))

    found: dict[tuple[int, int], tuple[Path, int]] = {}
    for pattern in patterns:
        matches = {Path(match).absolute(): _status(match) for match in _matches(pattern)}
        files = {path: status for path, status in matches.items() if status and stat.S_ISREG(status.st_mode)}
        texts = {path: status for path, status in files.items() if not is_made(path.parent)}
        if not texts:
            raise ConfigError(f"--input: {pattern!r} {_why_no_text(pattern, matches, files)}")
        # of several paths to one file, the shortest counts
        for path in sorted(texts, key=lambda path: (len(path.parts), path)):
            status = texts[path]
            found.setdefault((status.st_dev, status.st_ino), (path, status.st_size))
    for path, _ in sorted(found.values()):
        kind = Path(_bare_name(path)).suffix
        if kind in FOREIGN_SUFFIXES:
            raise ConfigError(
                f"--input: {path} is a {kind} file; give text, jsonl or parquet files (text and jsonl also as .gz or "
                ".zst)"
            )
        if kind == PARQUET_SUFFIX and _bare_name(path) != path.name.lower():
            raise ConfigError(f"--input: {path} is a compressed parquet file, which is not supported; decompress it")
        if kind == PARQUET_SUFFIX and find_spec("pyarrow") is None:
            raise ConfigError(f"--input: {path} needs pyarrow; pip install 'colt5dist[parquet]'")
    common = os.path.commonpath([path.parent for path, _ in found.values()])
    inputs = [InputFile(path, path.relative_to(common).as_posix(), size) for path, size in found.values()]
    return sorted(inputs, key=lambda file: file.name)


Statuses = Mapping[Path, os.stat_result | None]


def _matches(pattern: str) -> Iterator[str]:
    """The files that a glob matches, or the texts below the folder that the pattern names."""
    if not os.path.isdir(pattern):
        yield from glob.glob(pattern, recursive=True)
        return
    for folder, inner, names in os.walk(pattern):
        inner[:] = [name for name in inner if not name.startswith(".")]
        for name in names:
            suffixes = (*TEXT_SUFFIXES, *JSONL_SUFFIXES, PARQUET_SUFFIX)
            if _bare_name(Path(name)).endswith(suffixes) and not name.startswith("."):
                yield os.path.join(folder, name)


def _status(path: str) -> os.stat_result | None:
    """Status of a path; None for a broken link or a file that was just removed."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"--input: {path} cannot be read ({error.strerror}); fix its permissions") from None


def _why_no_text(pattern: str, matches: Statuses, files: Statuses) -> str:
    """What is wrong with a pattern that matches no text, and how to fix it."""
    if not pattern:
        return "is an empty pattern; give text or jsonl files"
    if files:
        return "matches only shards; give the text that they were made from"
    kinds = {path: status.st_mode for path, status in matches.items() if status}
    if pipes := [path for path, mode in kinds.items() if not stat.S_ISDIR(mode)]:
        return f"matches no file, {pipes[0]} is a pipe or device; write its output to a file and give that file"
    if os.path.isdir(pattern):
        kinds_read = ", ".join((*TEXT_SUFFIXES, *JSONL_SUFFIXES, PARQUET_SUFFIX))
        other_kinds = os.path.join(pattern, "**", "*.ext")
        return f"holds no file of a supported kind ({kinds_read}); give text files with another suffix as {other_kinds}"
    if kinds:
        return f"matches no file; give its files, for instance as {os.path.join(pattern, '**', '*.txt')}"
    return "matches no file; give text or jsonl files"

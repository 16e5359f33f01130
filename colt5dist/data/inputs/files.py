"""Finds the files that prepare reads, from globs and folders: each once, in the same order on every machine."""

import glob
import hashlib
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from colt5dist.data.inputs.archives import HELD_OUT_MEMBERS, TEST_MEMBER, ZIP_SUFFIX, is_held_out, list_members
from colt5dist.data.inputs.dataset_folders import DESCRIPTION, DatasetFolders, cards, lists_nothing, splits_note
from colt5dist.data.inputs.mds import MDS_SUFFIXES
from colt5dist.data.inputs.megatron import index_of, is_token_file, token_file_problem
from colt5dist.data.manifest import holds_shards
from colt5dist.errors import ConfigError

JSONL_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines", ".ldjson", ".jl")
JSON_SUFFIX = ".json"
PARQUET_SUFFIX = ".parquet"
ARROW_SUFFIX = ".arrow"
COMPRESSED_SUFFIXES = (".gz", ".zst")
TEXT_SUFFIXES = (".txt", ".text", ".md")
READ_SUFFIXES = (*TEXT_SUFFIXES, *JSONL_SUFFIXES, JSON_SUFFIX, PARQUET_SUFFIX, ARROW_SUFFIX, ".mds")
READ_KINDS = (*READ_SUFFIXES, *list(MDS_SUFFIXES)[1:], ".bin with its .idx")
"""How all kinds of files that are read are named in messages."""
PAIR_SUFFIXES = (*JSONL_SUFFIXES, JSON_SUFFIX, PARQUET_SUFFIX, ZIP_SUFFIX)
"""Files that can hold pairs of an input and a target."""
FOREIGN_SUFFIXES = frozenset(
    ".tar .tgz .zip .7z .rar .xz .lzma .bz2 .lz4 .br .zstd "
    ".csv .tsv .html .htm .xhtml .xml .svg .rss .atom .rtf .epub .pdf .ps .djvu "
    ".doc .docx .odt .xls .xlsx .ods .ppt .pptx .odp "
    ".feather .orc .avro .msgpack .npy .npz .pkl .pickle .pt .pth .bin .idx .safetensors .h5 .hdf5 .mdb "
    ".sqlite .sqlite3 .db .warc .wet .wat .tfrecord .png .jpg .jpeg .gif .webp .mp3 .mp4".split()
)
"""Files that are no plain text, or hold much besides their text: they are refused, never read as one document."""
HINTS = {
    ".bin": "; a token file of Megatron-LM needs its .idx file beside it",
    ".idx": "; a token file of Megatron-LM needs its .bin file beside it",
}
HASHED_BYTES = 1 << 16


@dataclass(frozen=True)
class InputFile:
    """One file to read."""

    path: Path
    """Absolute path."""
    name: str
    """Path relative to the common folder of all inputs: the same on every machine."""
    bytes: int
    """Size of the file; of a member of an archive, as it is stored there."""
    text_key: str = ""
    """Key or column of the text in this file; empty: the same as in all others."""
    member: str = ""
    """Name of the member, where the file is an archive."""
    checksum: int = 0
    """CRC32 of the member."""
    held_out: bool | None = None
    """Whether all of it is held out, or nothing of it; None: it does not say."""

    @property
    def place(self) -> str:
        """How the file is named in messages."""
        return f"{self.path}: {self.member}" if self.member else str(self.path)

    @property
    def content_key(self) -> str:
        """Hash of name, size, and the first and last 64 KiB, also of an index: the same on every machine."""
        digest = hashlib.sha256(os.fsencode(self.name) + b"\0%d\0" % self.bytes)
        if self.member:
            digest.update(b"%d" % self.checksum)
            return digest.hexdigest()
        for path in (self.path, index_of(self.path)) if self.is_tokens else (self.path,):
            with open(path, "rb") as file:
                digest.update(file.read(HASHED_BYTES))
                file.seek(max(os.fstat(file.fileno()).st_size - HASHED_BYTES, 0))
                digest.update(file.read(HASHED_BYTES))
        return digest.hexdigest()

    @property
    def compression(self) -> str:
        """Suffix of the compression, ".gz" or ".zst", or empty."""
        return self.path.suffix.lower() if self.path.suffix.lower() in COMPRESSED_SUFFIXES else ""

    @property
    def is_jsonl(self) -> bool:
        """Whether each line is a JSON object that holds one document."""
        return bool(self.member) or _bare_name(self.path).endswith(JSONL_SUFFIXES)

    @property
    def is_json(self) -> bool:
        """Whether it holds JSON objects, each with one document: one a line, or in an array."""
        return _bare_name(self.path).endswith(JSON_SUFFIX)

    @property
    def is_parquet(self) -> bool:
        """Whether it is a parquet file, in which each row is one document."""
        return _bare_name(self.path).endswith(PARQUET_SUFFIX)

    @property
    def is_arrow(self) -> bool:
        """Whether it is an Arrow file, in which each row is one document."""
        return _bare_name(self.path).endswith(ARROW_SUFFIX)

    @property
    def is_mds(self) -> bool:
        """Whether it is a shard of MosaicML Streaming. A file of any other kind is one document."""
        return _is_mds(self.path)

    @property
    def is_tokens(self) -> bool:
        """Whether it is a token file of Megatron-LM, which needs the tokenizer that made the ids."""
        return is_token_file(self.path)


def _is_mds(path: Path) -> bool:
    return path.name.lower().endswith(tuple(MDS_SUFFIXES))


def _bare_name(path: Path) -> str:
    """Name of a file in lower case, without the suffix of the compression."""
    name = path.name.lower()
    for suffix in COMPRESSED_SUFFIXES:
        name = name.removesuffix(suffix)
    return name


@dataclass(frozen=True)
class Inputs:
    """What patterns and folders name."""

    files: list[InputFile]
    """The files to read, each once, in the same order on every machine."""
    not_read: dict[str, int]
    """What is not read -> how many. Endings begin with a dot, other kinds do not."""
    notes: tuple[str, ...] = ()
    """What is read otherwise than may be meant, one sentence each."""

    @property
    def other_endings(self) -> int:
        """Files in the given folders that are not read because of their ending."""
        return sum(number for kind, number in self.not_read.items() if kind.startswith(".") or kind == NO_ENDING)

    def lines(self) -> list[str]:
        """Return one line per kind of what is not read, for the terminal."""
        kinds = sorted(self.not_read.items(), key=lambda kind: (-kind[1], kind[0]))
        lines = [f"not read, {f'files ending in {kind}' if kind[0] == '.' else kind}: {n:,}" for kind, n in kinds]
        return [line.encode(errors="backslashreplace").decode() for line in lines]


NO_ENDING = "files without an ending"
HIDDEN = "hidden files and folders"
NO_FILE = "pipes, devices, and links that lead nowhere"
NOT_ENTERED = "folders that a pattern matches (name the folder itself to read it)"
TESTS = "test.jsonl, which has no targets"
OTHER_MEMBERS = "other files in zip archives"


def find_inputs(patterns: Iterable[str], made: Iterable[Path] = (), *, pairs: bool = False) -> Inputs:
    """Return the files of all glob patterns and folders.

    The name of a folder means all files below it with the suffix of a supported kind, also in linked folders. A path
    that exists is that path, whatever characters it has. Folders of shards are never inputs, so they may be among the
    texts that they are made from.

    Args:
        patterns: glob patterns and names of folders.
        made: more folders whose files are not inputs.
        pairs: whether only files are read that can hold pairs; of a zip archive, the members that hold some.

    Raises:
        ConfigError: a pattern matches no file; a file cannot be accessed, is of a kind that is not supported, or is
            damaged by what the index of its data set says; or such an index is damaged.
    """
    is_wanted = _can_hold_pairs if pairs else _is_read
    made_folders = {Path(os.path.realpath(folder)) for folder in made}

    @cache
    def is_made(folder: Path) -> bool:
        folder = Path(os.path.realpath(folder))
        return folder in made_folders or holds_shards(folder) or (folder != folder.parent and is_made(folder.parent))

    found: dict[tuple[int, int], tuple[Path, int]] = {}
    not_read: Counter[str] = Counter()
    datasets = DatasetFolders()
    notes: list[str] = []
    for pattern in dict.fromkeys(patterns):
        if os.path.isdir(pattern):
            names = list(_below(pattern, is_made, is_wanted, not_read, datasets, notes))
        else:
            matched = glob.glob(_escape_existing(pattern), recursive=True)
            if pattern and not matched and os.path.isfile(f"{pattern}.bin"):
                matched = [f"{pattern}.bin"]  # how Megatron-LM names a .bin file with its .idx file
            names = _without_descriptions(matched, not_read, datasets)
        left_out = cards(map(Path, names))
        not_read[DESCRIPTION] += len(left_out)
        names = [name for name in names if Path(name) not in left_out]
        matches = {Path(name).absolute(): _status(name) for name in names}
        files = {path: status for path, status in matches.items() if status and stat.S_ISREG(status.st_mode)}
        folders = [path for path, status in matches.items() if status and stat.S_ISDIR(status.st_mode)]
        texts = {path: status for path, status in files.items() if not is_made(path.parent)}
        if not texts:
            why = _why_no_text(pattern, matches, files, PAIR_SUFFIXES if pairs else READ_KINDS)
            raise ConfigError(f"--input: {pattern!r} {why}")
        not_read[NO_FILE] += len(matches) - len(files) - len(folders)
        not_read[NOT_ENTERED] += len(folders) if "**" not in pattern else 0
        # of several paths to one file, the shortest counts, and before it one that says what the file is
        for path in sorted(texts, key=lambda path: (not _is_read(path), len(path.parts), path)):
            status = texts[path]
            found.setdefault((status.st_dev, status.st_ino), (path, status.st_size))
    paths = sorted(path for path, _ in found.values())
    _check_kinds(paths, pairs=pairs)
    common = os.path.commonpath([path.parent for path in paths])
    inputs = [InputFile(path, path.relative_to(common).as_posix(), size) for path, size in found.values()]
    if pairs:
        inputs = [part for file in _by_splits(inputs, not_read) for part in _opened(file, not_read)]
    kinds = {kind: number for kind, number in not_read.items() if number}
    return Inputs(sorted(inputs, key=lambda file: file.name), kinds, tuple(dict.fromkeys(notes)))


def _without_descriptions(names: list[str], not_read: Counter[str], datasets: DatasetFolders) -> list[str]:
    """The paths that a pattern matches, without what only describes others of them; an .idx file means its .bin."""
    read: dict[str, None] = {}
    for name in names:
        if name.endswith(".idx") and is_token_file(Path(name).with_suffix(".bin")):
            name = f"{name[: -len('.idx')]}.bin"
        if reason := datasets.why_not_read(Path(name)):
            not_read[reason] += 1
        else:
            read[name] = None
    return list(read)


def _by_splits(inputs: list[InputFile], not_read: Counter[str]) -> list[InputFile]:
    """The files of pairs; of a folder that has both train.jsonl and validation.jsonl, the second is held out."""
    splits = {file: _bare_name(file.path) for file in inputs}
    held_out = {(file.path.parent, split) for file, split in splits.items() if split in HELD_OUT_MEMBERS}
    found = []
    for file, split in splits.items():
        if not all((file.path.parent, name) in held_out for name in HELD_OUT_MEMBERS):
            found.append(file)
        elif split == TEST_MEMBER:
            not_read[TESTS] += 1
        else:
            found.append(replace(file, held_out=HELD_OUT_MEMBERS.get(split)))
    return found


def _opened(file: InputFile, not_read: Counter[str]) -> list[InputFile]:
    """The members of a zip archive that hold pairs; any other file as it is."""
    if file.path.suffix.lower() != ZIP_SUFFIX:
        return [file]
    members, tests, others = list_members(file.path)
    not_read.update({TESTS: tests, OTHER_MEMBERS: others})
    says_both = len({is_held_out(member.filename) for member in members}) == 2
    return [
        InputFile(
            file.path,
            f"{file.name}/{member.filename}",
            member.compress_size,
            member=member.filename,
            checksum=member.CRC,
            held_out=is_held_out(member.filename) if says_both else None,
        )
        for member in members
    ]


def _check_kinds(paths: list[Path], *, pairs: bool) -> None:
    """Raise ConfigError for the first file of a kind that is not supported."""
    tokens = {path for path in paths if is_token_file(path)}
    known = {path for path in paths if path in tokens or _is_mds(path)}
    foreign = [path for path in paths if Path(_bare_name(path)).suffix in FOREIGN_SUFFIXES and path not in known]
    if pairs:
        foreign = [path for path in foreign if path.suffix.lower() != ZIP_SUFFIX]
        if others := [path for path in paths if not _can_hold_pairs(path) and path not in foreign]:
            raise ConfigError(
                f"--input: {others[0]} can hold no pairs; with --pairs give .jsonl, .json or .parquet files, or the "
                "zip archives of SCROLLS"
            )
    if foreign:
        more = f" (and {len(foreign) - 1:,} more files are of such kinds)" if len(foreign) > 1 else ""
        suffix = Path(_bare_name(foreign[0])).suffix
        raise ConfigError(
            f"--input: {foreign[0]} is a {suffix} file{more}; give text, jsonl or parquet files (text and jsonl also "
            "as .gz or .zst; .arrow, .mds, .mds.zstd and .bin with its .idx are read, too), for instance each row or "
            f"page as one line of a .jsonl file{HINTS.get(suffix, '')}"
        )
    for path in paths:
        if path in tokens and (problem := token_file_problem(path)):
            raise ConfigError(f"--input: {path} cannot be read: {problem}")
        suffix = Path(_bare_name(path)).suffix
        if suffix not in (PARQUET_SUFFIX, ARROW_SUFFIX):
            continue
        if _bare_name(path) != path.name.lower():
            kind = suffix[1:]
            raise ConfigError(f"--input: {path} is a compressed {kind} file, which is not supported; decompress it")
        if find_spec("pyarrow") is None:
            raise ConfigError(f"--input: {path} needs pyarrow; pip install 'colt5dist[parquet]'")


Statuses = Mapping[Path, os.stat_result | None]


def _escape_existing(pattern: str) -> str:
    """A pattern in which the part that exists stands for itself, also where its name has the signs of patterns."""
    parts = pattern.split("/")
    for number in range(len(parts), 0, -1):
        begin = "/".join(parts[:number])
        if begin and os.path.lexists(begin):
            return "/".join([glob.escape(begin), *parts[number:]])
    return pattern


def _below(
    folder: str,
    is_made: Callable[[Path], bool],
    is_wanted: Callable[[Path], bool],
    not_read: Counter[str],
    datasets: DatasetFolders,
    notes: list[str],
) -> Iterator[str]:
    """The wanted files below a folder; each folder once, by its shortest path.

    What is not read is added to `not_read`.
    """
    entered: set[tuple[int, int]] = set()
    level = [folder]
    while level:
        deeper: list[str] = []
        for path in sorted(level):
            status = _status(path)
            if status is None or (status.st_dev, status.st_ino) in entered or is_made(Path(path)):
                continue
            entered.add((status.st_dev, status.st_ino))
            try:
                entries = list(os.scandir(path))
            except OSError as error:
                raise _unreadable(path, error) from None
            datasets.check(Path(path))
            if note := splits_note(Path(path)):
                notes.append(note)
            for entry in entries:
                if entry.name.startswith("."):
                    not_read[HIDDEN] += 1
                elif entry.is_dir():
                    deeper.append(entry.path)
                elif reason := datasets.why_not_read(Path(entry.path)):
                    not_read[reason] += 1
                elif is_wanted(Path(entry.path)):
                    yield entry.path
                elif entry.name.endswith(".idx") and is_token_file(Path(entry.path).with_suffix(".bin")):
                    continue  # it is read with its .bin file
                else:
                    not_read[_ending(entry.name)] += 1
        level = deeper


def _can_hold_pairs(path: Path) -> bool:
    """Whether a file may hold pairs, by its ending."""
    return _bare_name(path).endswith(PAIR_SUFFIXES)


def _is_read(path: Path) -> bool:
    """Whether a file in a folder is read, by its ending or, of a .bin file, by its index."""
    return _bare_name(path).endswith(READ_SUFFIXES) or _is_mds(path) or is_token_file(path)


def _ending(name: str) -> str:
    """Ending of a file's name in lower case, with that of its compression."""
    bare = _bare_name(Path(name))
    ending = Path(bare).suffix + name.lower()[len(bare) :]
    return ending or NO_ENDING


def _status(path: str) -> os.stat_result | None:
    """Status of a path; None for a broken link or a file that was just removed."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: str, error: OSError) -> ConfigError:
    return ConfigError(f"--input: {path} cannot be read ({error.strerror}); fix its permissions")


def _why_no_text(pattern: str, matches: Statuses, files: Statuses, kinds_read: tuple[str, ...]) -> str:
    """What is wrong with a pattern that matches no text, and how to fix it."""
    if not pattern:
        return "is an empty pattern; give text or jsonl files"
    if files:
        return "matches only shards; give the text that they were made from"
    kinds = {path: status.st_mode for path, status in matches.items() if status}
    if pipes := [path for path, mode in kinds.items() if not stat.S_ISDIR(mode)]:
        return f"matches no file, {pipes[0]} is a pipe or device; write its output to a file and give that file"
    if os.path.isdir(pattern):
        if lists_nothing(Path(pattern)):
            return "is a data set without records: its index lists no file; give one that has some"
        other_kinds = os.path.join(pattern, "**", "*.ext")
        supported = ", ".join(kinds_read)
        return f"holds no file of a supported kind ({supported}); give text files with another suffix as {other_kinds}"
    if kinds:
        return f"matches no file; give its files, for instance as {os.path.join(pattern, '**', '*.txt')}"
    return "matches no file; give text or jsonl files"

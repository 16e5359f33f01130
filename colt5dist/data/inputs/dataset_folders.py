"""Folders that a library has written as a data set: which of their files hold records, by the index file among them.

- `save_to_disk` of Hugging Face `datasets`: `state.json` lists the .arrow files, `dataset_info.json` describes them. A
  `DatasetDict` has a `dataset_dict.json`, and such a folder for each split.
- MosaicML Streaming: `index.json` lists the shards. A shard may be there as it is, compressed, or both.
- A snapshot from the Hugging Face Hub: parquet files, and a `README.md` that begins with settings: the card.

What an index says is checked before anything is read: that it is whole, that its files are there, and their sizes.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from colt5dist.data.inputs.arrow import is_whole
from colt5dist.data.inputs.mds import MDS_SUFFIXES
from colt5dist.data.inputs.records import one_line
from colt5dist.errors import ConfigError

DESCRIPTION = "files that describe a data set"
UNLISTED = "files that their data set does not list"
CARD = "README.md"
CARD_BEGIN = b"---"
TABLES = (".parquet", ".arrow", ".jsonl")
"""Endings of the files that a card describes."""
STATE = "state.json"
SPLITS = "dataset_dict.json"
INDEX = "index.json"
INDEXES = (STATE, SPLITS, INDEX)
"""Descriptions that say which files, or folders, belong to a data set."""
DESCRIPTIONS = (*INDEXES, "dataset_info.json", "dataset_infos.json")


@dataclass(frozen=True)
class _Listed:
    """A file that an index lists."""

    names: list[str]
    """Its names: as it is, and compressed."""
    bytes: list[object]
    """What the index gives as the size of each; None if it gives none."""
    samples: object = None
    """What the index gives as the number of its records."""


@dataclass(frozen=True)
class _Folder:
    """What the index of a folder says of its files."""

    names: frozenset[str] | None
    """The files that it lists and that are read; None: there is no index, or none that can be read."""
    missing: str
    """What is wrong with the folder as a whole, or empty."""
    damaged: dict[str, str]
    """Name of a listed file -> what is wrong with it."""


class DatasetFolders:
    """Knows which files of data set folders are read; an index is parsed once."""

    def __init__(self) -> None:
        self._found: dict[Path, _Folder] = {}

    def why_not_read(self, path: Path) -> str:
        """Why a file is not read although its ending is one that is read; empty if it is read.

        Raises:
            ConfigError: it is a damaged index, or damaged by what its index says.
        """
        if path.name in DESCRIPTIONS:
            _raise(_index_problem(path))
            if describes_dataset(path):
                return DESCRIPTION
        name = path.name.lower()
        if not name.endswith((".arrow", *MDS_SUFFIXES)):
            return ""
        bare = path.with_name(path.name[: name.rindex(".mds") + len(".mds")]) if ".mds" in name else path
        folder = self._look(path.parent)
        unlisted = folder.names is not None and path.name not in folder.names
        if unlisted or (bare != path and bare.exists()):
            return UNLISTED
        _raise(folder.damaged.get(path.name, ""))
        return ""

    def check(self, folder: Path) -> None:
        """Check that the index of a folder, if it has one, is whole, and that all it lists is there and whole.

        Raises:
            ConfigError: it is not, or a file is compressed in a way that cannot be read.
        """
        for name in INDEXES:
            _raise(_index_problem(folder / name))
        _raise(_split_problem(folder))
        found = self._look(folder)
        _raise(found.missing or next(iter(found.damaged.values()), ""))

    def _look(self, folder: Path) -> _Folder:
        """What the index of a folder says."""
        if folder not in self._found:
            names, problems, damaged = set(), [], {}
            files = _listed_files(folder)
            for file in files or ():
                name, problem = _choose(folder, file)
                names.add(name)
                if problem:
                    problems.append(problem)
                elif damage := _damage(folder / name, file.bytes[file.names.index(name)], file.samples):
                    damaged[name] = damage
            listed = None if files is None else frozenset(names)
            self._found[folder] = _Folder(listed, problems[0] if problems else "", damaged)
        return self._found[folder]


def describes_dataset(path: Path) -> bool:
    """Whether a file describes a data set, by its name and content."""
    content = _object(path)
    if path.name == STATE:
        return _saved_files(content) is not None
    if path.name == SPLITS:
        return _split_names(content) is not None
    if path.name == "dataset_info.json":
        return "features" in content
    if path.name == "dataset_infos.json":
        return any(isinstance(entry, dict) and "features" in entry for entry in content.values())
    return path.name == INDEX and _mds_entries(content) is not None


def lists_nothing(folder: Path) -> bool:
    """Whether a folder is a data set without any record, by its index: no file is listed."""
    files = _listed_files(folder)
    splits = _split_names(_object(folder / SPLITS))
    return files == [] if splits is None else all(_listed_files(folder / split) == [] for split in splits)


def splits_note(folder: Path) -> str:
    """A sentence on the splits of a `DatasetDict`, if a folder is one, else empty."""
    splits = _split_names(_object(folder / SPLITS)) or []
    if len(splits) < 2:
        return ""
    names = ", ".join(splits)
    return f"--input: {folder} has the splits {names}, and all are read; give {folder / splits[0]} for one of them"


def cards(paths: Iterable[Path]) -> set[Path]:
    """The cards among the files of a folder: each README.md with settings that has tables in or below its folder."""
    paths = list(paths)
    tables = {parent for path in paths if path.suffix in TABLES for parent in path.parents}
    return {path for path in paths if path.name == CARD and path.parent in tables and _begins(path, CARD_BEGIN)}


def _raise(problem: str) -> None:
    """Raise ConfigError if there is a problem."""
    if problem:
        raise ConfigError(f"--input: {problem}")


def _index_problem(path: Path) -> str:
    """What makes a file that should be an index of files, or of folders, beside it none; empty if nothing.

    A file of such a name in any other folder is an ordinary one.
    """
    if path.name not in INDEXES or not (path.is_file() or path.is_symlink()):
        return ""
    if _mds_entries(_object(path)) if path.name == INDEX else describes_dataset(path):
        return ""
    folder = path.parent
    if path.name == STATE:
        belongs, files = _holds(folder, (".arrow",)), f"its files as '{folder}/*.arrow'"
    elif path.name == SPLITS:
        belongs, files = any((part / STATE).is_file() for part in _folders(folder)), "the folders of its splits"
    else:
        parts = [folder, *(part for part in _folders(folder) if not (part / INDEX).is_file())]
        belongs = any(_holds(part, tuple(MDS_SUFFIXES)) for part in parts)
        files = f"its files as '{folder}/**/*.mds*'"
    if not belongs:
        return ""
    return f"{path} is damaged: it does not list what belongs to its data set; restore it, or give {files}"


def _split_problem(folder: Path) -> str:
    """What is wrong with the splits that a `dataset_dict.json` lists; empty if nothing, or if there is none."""
    for split in _split_names(_object(folder / SPLITS)) or ():
        if _is_outside(split):
            return f"{folder} lists a split outside it: {split}; do not use this data set"
        if not (folder / split / STATE).is_file():
            missing = f"and {split}/{STATE}" if (folder / split).is_dir() else "which"
            return (
                f"{folder} lists the split {split}, {missing} is not there; copy the whole data set again, or give the "
                "folders of single splits"
            )
    return ""


def _listed_files(folder: Path) -> list[_Listed] | None:
    """The files that the index of a folder lists; None if there is no index."""
    if (saved := _saved_files(_object(folder / STATE))) is not None:
        return [_Listed([name], [None]) for name in saved]
    shards = _mds_entries(_object(folder / INDEX))
    if shards is None or (not shards and _holds(folder, tuple(MDS_SUFFIXES))):
        return None
    listed = []
    for entry in shards:
        parts = [part for part in (entry["raw_data"], entry.get("zip_data")) if part]
        names, sizes = [part["basename"] for part in parts], [part.get("bytes") for part in parts]
        listed.append(_Listed(names, sizes, entry.get("samples")))
    return listed


def _choose(folder: Path, file: _Listed) -> tuple[str, str]:
    """(the first of several names of a file that is there, what is wrong with it)."""
    for name in file.names:
        if _is_outside(name):
            return "", f"{folder} lists a file outside it: {name}; do not use this data set"
        if (folder / name).is_file():
            is_read = name.lower().endswith((".arrow", *MDS_SUFFIXES))
            return name, "" if is_read else f"{folder / name} cannot be read; compress with zstd or gz"
    return (
        "",
        f"{folder} lists {file.names[0]}, which is not there; copy the whole data set again, or name single files",
    )


def _damage(path: Path, expected: object, samples: object) -> str:
    """What shows, without reading all of it, that a listed file is not whole; empty if nothing.

    Args:
        path: the file.
        expected: its size by the index, if that is a number.
        samples: the number of its records by the index, if that is a number.
    """
    records = f", with {samples:,} samples" if isinstance(samples, int) else ""
    try:
        size = path.stat().st_size
        if isinstance(expected, int) and size != expected:
            problem = f"has {size:,} bytes, and its index gives it {expected:,}{records}"
        elif not size:
            problem = f"is empty, and its index lists it{records}"
        elif path.suffix.lower() == ".arrow" and not _is_whole_arrow(path):
            problem = f"ends without the mark of its end ({size:,} bytes are there), and its index lists it"
        else:
            return ""
    except OSError as error:
        problem = f"cannot be read ({one_line(error)}), and its index lists it"
    return f"{path} {problem}; copy it again, or name the other files"


def _is_whole_arrow(path: Path) -> bool:
    with open(path, "rb") as file:
        return is_whole(file)


def _is_outside(name: str) -> bool:
    return PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts


def _saved_files(content: dict[str, Any]) -> list[str] | None:
    """The files that a state.json lists; None if it is not one of `save_to_disk`."""
    entries = content.get("_data_files")
    if not isinstance(entries, list):
        return None
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries]
    return names if all(isinstance(name, str) for name in names) else None  # type: ignore[return-value]


def _split_names(content: dict[str, Any]) -> list[str] | None:
    """The splits that a dataset_dict.json lists; None if it is not one of `save_to_disk`."""
    splits = content.get("splits")
    return splits if isinstance(splits, list) and all(isinstance(split, str) for split in splits) else None


def _mds_entries(content: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The shards that an index.json lists; None if it is not one of MDS shards."""
    shards = content.get("shards")
    if not isinstance(shards, list) or not all(isinstance(entry, dict) for entry in shards):
        return None
    if not shards:  # as MDSWriter ends without any sample
        return shards if content.keys() == {"shards", "version"} else None
    parts = [part for entry in shards for part in (entry.get("raw_data"), entry.get("zip_data") or {"basename": ""})]
    named = all(isinstance(part, dict) and isinstance(part.get("basename"), str) for part in parts)
    return shards if named and all(entry.get("format") == "mds" for entry in shards) else None


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder; none if it cannot be read, which is said where its files are looked for."""
    try:
        return [Path(entry.path) for entry in os.scandir(folder) if entry.is_dir()]
    except OSError:
        return []


def _holds(folder: Path, endings: tuple[str, ...]) -> bool:
    """Whether a folder has a file with one of these endings."""
    try:
        return any(entry.name.lower().endswith(endings) for entry in os.scandir(folder))
    except OSError:
        return False


def _object(path: Path) -> dict[str, Any]:
    """The object of a JSON file; an empty one if it is not JSON, or holds something else."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _begins(path: Path, begin: bytes) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(begin)) == begin
    except OSError:
        return False

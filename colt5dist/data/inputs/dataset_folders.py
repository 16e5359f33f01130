"""Folders that a library has written as a data set: which of their files hold records, by the index file among them.

- `save_to_disk` of Hugging Face `datasets`: `state.json` lists the .arrow files, `dataset_info.json` describes them. A
  `DatasetDict` has a `dataset_dict.json`, and such a folder for each split.
- MosaicML Streaming: `index.json` lists the shards. A shard may be there as it is, compressed, or both.
- A snapshot from the Hugging Face Hub: parquet files, and a `README.md` that begins with settings: the card.
"""

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from colt5dist.data.inputs.mds import MDS_SUFFIXES
from colt5dist.errors import ConfigError

DESCRIPTION = "files that describe a data set"
UNLISTED = "files that their data set does not list"
CARD = "README.md"
CARD_BEGIN = b"---"
TABLES = (".parquet", ".arrow", ".jsonl")
"""Endings of the files that a card describes."""
DESCRIPTIONS = ("state.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "index.json")


class DatasetFolders:
    """Knows which files of data set folders are read; an index is parsed once."""

    def __init__(self) -> None:
        self._found: dict[Path, tuple[frozenset[str] | None, str]] = {}

    def why_not_read(self, path: Path) -> str:
        """Why a file is not read although its ending is one that is read; empty if it is read."""
        if path.name in DESCRIPTIONS and describes_dataset(path):
            return DESCRIPTION
        name = path.name.lower()
        if not name.endswith((".arrow", *MDS_SUFFIXES)):
            return ""
        bare = path.with_name(path.name[: name.rindex(".mds") + len(".mds")]) if ".mds" in name else path
        listed, _ = self._look(path.parent)
        unlisted = listed is not None and path.name not in listed
        return UNLISTED if unlisted or (bare != path and bare.exists()) else ""

    def check(self, folder: Path) -> None:
        """Check that all files that the index of a folder lists are there, if it has one.

        Raises:
            ConfigError: one is not there, or is compressed in a way that cannot be read.
        """
        if problem := self._look(folder)[1]:
            raise ConfigError(f"--input: {problem}")

    def _look(self, folder: Path) -> tuple[frozenset[str] | None, str]:
        """The files of a folder that its index lists and that are read (None: it has no index); what is wrong."""
        if folder not in self._found:
            names, problems = set(), []
            files = _listed_files(folder)
            for file in files or ():
                name, problem = _choose(folder, file)
                names.add(name)
                problems += [problem] if problem else []
            self._found[folder] = None if files is None else frozenset(names), problems[0] if problems else ""
        return self._found[folder]


def describes_dataset(path: Path) -> bool:
    """Whether a file describes a data set, by its name and content."""
    content = _object(path)
    if path.name == "state.json":
        return isinstance(content.get("_data_files"), list)
    if path.name == "dataset_dict.json":
        return isinstance(content.get("splits"), list)
    if path.name == "dataset_info.json":
        return "features" in content
    if path.name == "dataset_infos.json":
        return any(isinstance(entry, dict) and "features" in entry for entry in content.values())
    return path.name == "index.json" and _mds_entries(content) is not None


def splits_note(folder: Path) -> str:
    """A sentence on the splits of a `DatasetDict`, if a folder is one, else empty."""
    path = folder / "dataset_dict.json"
    splits = _object(path).get("splits") if path.is_file() else None
    if not isinstance(splits, list) or len(splits) < 2:
        return ""
    names = ", ".join(map(str, splits))
    return f"--input: {folder} has the splits {names}, and all are read; give {folder / str(splits[0])} for one of them"


def cards(paths: Iterable[Path]) -> set[Path]:
    """The cards among the files of a folder: each README.md with settings that has tables in or below its folder."""
    paths = list(paths)
    tables = {parent for path in paths if path.suffix in TABLES for parent in path.parents}
    return {path for path in paths if path.name == CARD and path.parent in tables and _begins(path, CARD_BEGIN)}


def _listed_files(folder: Path) -> list[list[str]] | None:
    """The names that the index of a folder has for each file: as it is, and compressed; None if there is no index."""
    if (state := folder / "state.json").is_file() and describes_dataset(state):
        entries = _object(state)["_data_files"]
        return [[str(entry["filename"])] for entry in entries if isinstance(entry, dict) and "filename" in entry]
    index = folder / "index.json"
    shards = _mds_entries(_object(index)) if index.is_file() else None
    if shards is None:
        return None
    return [[part["basename"] for part in (entry["raw_data"], entry.get("zip_data")) if part] for entry in shards]


def _choose(folder: Path, names: list[str]) -> tuple[str, str]:
    """(the first of several names of a file that is there, what is wrong with it)."""
    for name in names:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            return "", f"{folder} lists a file outside it: {name}; do not use this data set"
        if (folder / name).is_file():
            is_read = name.lower().endswith((".arrow", *MDS_SUFFIXES))
            return name, "" if is_read else f"{folder / name} cannot be read; compress with zstd or gz"
    return "", f"{folder} lists {names[0]}, which is not there; copy the whole data set again, or name single files"


def _mds_entries(content: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The shards that an index.json lists; None if it is not one of MDS shards."""
    shards = content.get("shards")
    if not isinstance(shards, list) or not all(isinstance(entry, dict) for entry in shards):
        return None
    parts = [part for entry in shards for part in (entry.get("raw_data"), entry.get("zip_data") or {"basename": ""})]
    named = all(isinstance(part, dict) and isinstance(part.get("basename"), str) for part in parts)
    return shards if shards and named and all(entry.get("format") == "mds" for entry in shards) else None


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

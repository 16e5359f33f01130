"""manifest.json: what a folder of shards holds, so that damaged or mixed-up files are found before training."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

from colt5dist.errors import ConfigError
from colt5dist.files import write_whole
from colt5dist.wording import looked_for

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
VALIDATION_FOLDER = "validation"
FORMAT = "colt5dist shards"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One tar file."""

    file: str
    """Name in the folder."""
    bytes: int
    """Size of the file."""
    sha256: str
    """Hash of the file."""
    members: int
    """Tar members."""
    documents: int
    """Documents that end in it."""
    tokens: int
    """Tokens in it."""


@dataclass(frozen=True, kw_only=True)
class IndexEntry:
    """One file of the index."""

    file: str
    """Path in the folder."""
    bytes: int
    """Size of the file."""
    crc32: int
    """Checksum of the file."""


@dataclass(frozen=True, kw_only=True)
class TokenizerEntry:
    """The tokenizer that made the ids."""

    kind: str
    """"bytes" or "tokenizer.json" (a copy is in the folder)."""
    fingerprint: str
    """Hash of what decides the ids."""
    vocab_size: int
    """Ids are 0..vocab_size-1."""
    pad_id: int
    """Id of the pad token."""
    eos_id: int
    """Id of the end token."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of manifest.json, without format, version and checksum."""

    tokenizer: TokenizerEntry
    """The tokenizer that made the ids."""
    dtype: str
    """Type of the stored ids: uint16 or uint32, little-endian."""
    documents: int
    """Documents of the set."""
    tokens: int
    """Tokens of the set."""
    shards: tuple[ShardEntry, ...]
    """The tar files, in order."""
    index: tuple[IndexEntry, ...]
    """The files of the index."""
    validation: str | None
    """Checksum of the manifest of the held-out documents, which are in validation/; None in that set itself."""
    source: dict[str, Any]
    """What the shards were made from: inputs, settings, documents left out."""

    @property
    def checksum(self) -> str:
        """Hash of everything in the manifest: the fingerprint of the data."""
        return hashlib.sha256(json.dumps(self._content(), sort_keys=True).encode()).hexdigest()

    @property
    def holds_pairs(self) -> bool:
        """Whether each document is a pair: the ids of an input, an end token, and the ids of a target."""
        return "pairs" in self.source

    def _content(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    def write(self, folder: Path) -> None:
        """Write manifest.json to `folder`."""
        content = {**self._content(), "checksum": self.checksum}
        write_whole(folder / MANIFEST_NAME, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def holds_shards(folder: Path) -> bool:
    """Whether `folder` has a manifest.json of colt5dist, valid or not; only its beginning is read."""
    try:
        with open(folder / MANIFEST_NAME, "rb") as file:
            return f'"format": {json.dumps(FORMAT)}'.encode() in file.read(100)
    except OSError:
        return False


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of `folder`.

    Raises:
        ConfigError: it is missing, damaged, of another version, or not written by launch/prepare.py.
    """
    path = folder / MANIFEST_NAME
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{path}: is missing; give a folder written by launch/prepare.py{looked_for(path)}") from None
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); give a folder written by launch/prepare.py"
        ) from None
    except ValueError:
        raise ConfigError(f"{path}: is damaged (not JSON); prepare the shards again") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ConfigError(f"{path}: was not written by launch/prepare.py; prepare the shards from the text")
    if content.get("version") != VERSION:
        raise ConfigError(
            f"{path}: has format version {content.get('version')}, this is version {VERSION}; prepare the shards again"
        )
    try:
        manifest = Manifest(
            tokenizer=TokenizerEntry(**content["tokenizer"]),
            shards=tuple(ShardEntry(**entry) for entry in content["shards"]),
            index=tuple(IndexEntry(**entry) for entry in content["index"]),
            **{field.name: content[field.name] for field in fields(Manifest) if field.name not in _NESTED},
        )
        whole = manifest.checksum == content["checksum"]
        files = [*(entry.file for entry in manifest.shards), *(entry.file for entry in manifest.index)]
        outside = [name for name in files if not _is_inside(name)]
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise ConfigError(f"{path}: is damaged or was edited, its checksum differs; prepare the shards again")
    if outside:
        raise ConfigError(f"{path}: names a file outside the folder: {outside[0]}; do not use these shards")
    return manifest


def _is_inside(name: str) -> bool:
    """Whether a relative path stays inside its folder, here and where it is downloaded to."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


_NESTED = ("tokenizer", "shards", "index")

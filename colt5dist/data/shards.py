"""A folder of shards, opened for reading: its manifest checked, its index mapped, its tokenizer at hand."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from colt5dist.data.corpus import TOKENIZER_NAME, VALIDATION_FOLDER
from colt5dist.data.index import Index
from colt5dist.data.manifest import Manifest, read_manifest
from colt5dist.data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer
from colt5dist.errors import ConfigError


@dataclass(frozen=True)
class ShardSet:
    """Tokenized documents on disk, and the held-out ones beside them."""

    folder: Path
    """Where they lie."""
    manifest: Manifest
    """What they are."""
    index: Index
    """Where each document is."""
    tokenizer: Tokenizer
    """What made the ids."""
    held_out: "ShardSet | None"
    """The held-out documents; None in that set itself."""

    @property
    def fingerprint(self) -> str:
        """Hash of the manifest: two sets with the same one hold the same documents in the same order."""
        return self.manifest.checksum

    @property
    def num_documents(self) -> int:
        """Documents of the set."""
        return self.manifest.documents

    @property
    def num_tokens(self) -> int:
        """Tokens of the set."""
        return self.manifest.tokens

    @property
    def dtype(self) -> np.dtype:
        """Type of the stored ids."""
        return self.tokenizer.dtype

    @property
    def validation(self) -> "ShardSet":
        """The held-out documents."""
        assert self.held_out is not None, "a held-out set has none itself"
        return self.held_out


def open_shards(path: str | Path) -> ShardSet:
    """Open a folder written by launch/prepare.py.

    Sizes of all files and the checksums of the manifest and the index are compared; the tokens themselves are checked
    when they are read.

    Raises:
        ConfigError: something is missing, truncated, damaged, or belongs to another set.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    if manifest.validation is None:
        raise ConfigError(f"{folder}: is a set of held-out documents; give the folder above it")
    held_out_folder = folder / VALIDATION_FOLDER
    held_out = read_manifest(held_out_folder)
    if held_out.checksum != manifest.validation:
        raise ConfigError(f"{held_out_folder}: belongs to other shards than {folder}; copy or prepare the shards again")
    return _open(folder, manifest, _open(held_out_folder, held_out, None))


def _open(folder: Path, manifest: Manifest, held_out: ShardSet | None) -> ShardSet:
    for entry in manifest.shards:
        path = folder / entry.file
        try:
            size = path.stat().st_size
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror}); copy or prepare the shards again") from None
        if size != entry.bytes:
            raise ConfigError(
                f"{path}: has {size} bytes, the manifest says {entry.bytes}; copy or prepare the shards again"
            )
    return ShardSet(folder, manifest, Index(folder, manifest), _open_tokenizer(folder, manifest), held_out)


def _open_tokenizer(folder: Path, manifest: Manifest) -> Tokenizer:
    entry = manifest.tokenizer
    tokenizer: Tokenizer = ByteTokenizer()
    if entry.kind == JsonTokenizer.kind:
        tokenizer = JsonTokenizer(folder / TOKENIZER_NAME)
    found = (tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.pad_id, tokenizer.eos_id, tokenizer.dtype.name)
    said = (entry.fingerprint, entry.vocab_size, entry.pad_id, entry.eos_id, manifest.dtype)
    if found != said:
        raise ConfigError(
            f"{folder}: its tokenizer is not the one that made the shards; copy or prepare the shards again"
        )
    return tokenizer

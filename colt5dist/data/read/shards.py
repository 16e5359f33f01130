"""Opens a folder of shards for reading: checks its manifest, maps its index, and loads its tokenizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from colt5dist.data.index import Index
from colt5dist.data.manifest import TOKENIZER_NAME, VALIDATION_FOLDER, Manifest, read_manifest
from colt5dist.data.read.remote import CACHE_BYTES, RemoteShards, is_remote
from colt5dist.data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer
from colt5dist.errors import ConfigError


@dataclass(frozen=True)
class ShardSet:
    """Tokenized documents on disk, with the held-out documents that belong to them."""

    folder: Path
    """The folder of the set."""
    manifest: Manifest
    """What the set holds."""
    index: Index
    """Where each document is."""
    tokenizer: Tokenizer
    """The tokenizer that made the ids."""
    held_out: "ShardSet | None"
    """The held-out documents; None in the held-out set itself."""
    remote: RemoteShards | None = None
    """The address of the shards, if they have one; `folder` then holds only manifest, index and tokenizer."""

    @property
    def fingerprint(self) -> str:
        """Hash of the manifest: two sets with the same one hold the same documents in the same order."""
        return self.manifest.checksum

    def shard_name(self, shard: int) -> str:
        """Return the path or address of a shard, for messages."""
        file = self.manifest.shards[shard].file
        return self.remote.address(file) if self.remote else str(self.folder / file)

    def open_shard(self, shard: int) -> BinaryIO:
        """Open the file of a shard for reading.

        Raises:
            OSError: it cannot be read.
        """
        entry = self.manifest.shards[shard]
        return self.remote.open(entry) if self.remote else open(self.folder / entry.file, "rb")

    @property
    def num_documents(self) -> int:
        """Number of documents in the set."""
        return self.manifest.documents

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the set."""
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


def open_shards(path: str | Path, *, cache_bytes: int = CACHE_BYTES) -> ShardSet:
    """Open a folder written by launch/prepare.py, on this machine or at an address.

    The sizes of all files and the checksums of manifest and index are compared; the tokens are checked when they are
    read.

    Args:
        path: the folder, or an address that begins with http(s)://, s3:// or gs://.
        cache_bytes: disk space for shards that are downloaded from an address; of a larger set, single members are
            downloaded as they are needed.

    Raises:
        ConfigError: a file is missing, truncated, damaged, or belongs to another set.
    """
    remote = RemoteShards(str(path), cache_bytes=cache_bytes) if is_remote(str(path)) else None
    folder = remote.fetch_description() if remote else Path(path)
    manifest = read_manifest(folder)
    if manifest.validation is None:
        raise ConfigError(f"{folder}: is a set of held-out documents; give its parent folder")
    held_out_folder = folder / VALIDATION_FOLDER
    held_out = read_manifest(held_out_folder)
    if held_out.checksum != manifest.validation:
        raise ConfigError(f"{held_out_folder}: belongs to other shards than {folder}; copy or prepare the shards again")
    held_out_remote = remote.below(VALIDATION_FOLDER) if remote else None
    return _open(folder, manifest, _open(held_out_folder, held_out, None, held_out_remote), remote)


def _open(folder: Path, manifest: Manifest, held_out: ShardSet | None, remote: RemoteShards | None) -> ShardSet:
    if remote:
        remote.check_sizes(manifest.shards)
    else:
        _check_sizes(folder, manifest)
    return ShardSet(folder, manifest, Index(folder, manifest), open_tokenizer(folder, manifest), held_out, remote)


def _check_sizes(folder: Path, manifest: Manifest) -> None:
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


def open_tokenizer(folder: Path, manifest: Manifest) -> Tokenizer:
    """Load the tokenizer that made the ids of a set.

    Args:
        folder: folder of the set.
        manifest: manifest of the set.

    Raises:
        ConfigError: the folder holds another tokenizer, or none.
    """
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

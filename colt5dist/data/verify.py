"""Checks a folder of shards against its manifest: every size, hash, count and checksum, several shards in parallel."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from colt5dist.data.index import Index
from colt5dist.data.manifest import MANIFEST_NAME, TOKENIZER_NAME, VALIDATION_FOLDER, Manifest, read_manifest
from colt5dist.data.read.shards import ShardSet, open_tokenizer
from colt5dist.data.read.token_reader import TokenReader
from colt5dist.errors import ConfigError

HASHED_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Verified:
    """The result of `verify`."""

    damage: list[str]
    """One line for each part that is not as it was written; empty if there is no damage."""
    notes: list[str]
    """Files that do not belong to the set, which is harmless."""
    num_files: int
    """Files that were read."""
    num_bytes: int
    """Bytes of the shards."""


def verify(folder: Path, *, workers: int) -> Verified:
    """Read everything in a folder of shards, held-out documents included, and compare it with the manifest.

    Args:
        folder: the folder.
        workers: number of processes.

    Raises:
        ConfigError: there are no shards in the folder.
    """
    if not (folder / MANIFEST_NAME).exists():
        raise ConfigError(f"{folder / MANIFEST_NAME}: is missing; give a folder written by launch/prepare.py")
    damage: list[str] = []
    manifests = {}
    for part in (folder, folder / VALIDATION_FOLDER):
        try:
            manifests[part] = read_manifest(part)
        except ConfigError as error:
            damage.append(str(error))
    whole, held_out = manifests.get(folder), manifests.get(folder / VALIDATION_FOLDER)
    if whole and held_out and whole.validation != held_out.checksum:
        damage.append(f"{folder / VALIDATION_FOLDER}: belongs to other shards than {folder}")
    tasks = [(part, number) for part, manifest in manifests.items() for number in range(len(manifest.shards))]
    for part, manifest in manifests.items():
        damage += _check_index(part, manifest)
    with ProcessPoolExecutor(max(1, workers), mp_context=get_context("fork")) as executor:
        for found in executor.map(_check_shard, tasks):
            damage += found
    return Verified(
        damage,
        [note for part, manifest in manifests.items() for note in _foreign_files(part, manifest)],
        sum(len(manifest.shards) + len(manifest.index) + 1 for manifest in manifests.values()),
        sum(entry.bytes for manifest in manifests.values() for entry in manifest.shards),
    )


def _check_index(folder: Path, manifest: Manifest) -> list[str]:
    """Damage of the tokenizer and the index, and counts per shard that differ between manifest and index."""
    damage = []
    try:
        open_tokenizer(folder, manifest)
    except ConfigError as error:
        damage.append(str(error))
    try:
        index = Index(folder, manifest)
    except ConfigError as error:
        return [*damage, str(error)]
    shards = index.members["shard"]
    ends = np.searchsorted(shards, np.arange(len(manifest.shards)), side="right")
    begin, begin_tokens, begin_documents = 0, 0, 0
    for number, (entry, end) in enumerate(zip(manifest.shards, ends.tolist(), strict=True)):
        end_tokens = int(index.member_ends[end - 1]) if end else 0
        end_documents = int(np.searchsorted(index.document_ends, end_tokens, side="right"))
        found = (end - begin, end_documents - begin_documents, end_tokens - begin_tokens)
        if found != (entry.members, entry.documents, entry.tokens):
            damage.append(f"{folder / MANIFEST_NAME}: its counts for shard {number} differ from those of the index")
        begin, begin_tokens, begin_documents = end, end_tokens, end_documents
    return damage


@lru_cache(maxsize=2)
def _open(folder: Path) -> tuple[Manifest, ShardSet | None]:
    """A manifest and its set, None where the set cannot be opened; `_check_index` reports why."""
    manifest = read_manifest(folder)
    try:
        return manifest, ShardSet(folder, manifest, Index(folder, manifest), open_tokenizer(folder, manifest), None)
    except ConfigError:
        return manifest, None


def _check_shard(task: tuple[Path, int]) -> list[str]:
    """Damage of one shard: its size, its hash, and the members that differ from what was written."""
    folder, number = task
    manifest, shards = _open(folder)
    entry = manifest.shards[number]
    path = folder / entry.file
    try:
        size = path.stat().st_size
        digest = _hash_file(path)
    except OSError as error:
        return [f"{path}: cannot be read ({error.strerror})"]
    same = digest == entry.sha256
    damage = [] if size == entry.bytes else [f"{path}: has {size} bytes, the manifest says {entry.bytes}"]
    if shards is None:  # without an index, only the hash can be compared
        return damage or ([] if same else [f"{path}: is damaged, its hash differs"])
    members = list(_damaged_members(shards, number))
    if not same and not members and not damage:
        damage = [f"{path}: differs outside of the documents (its hash is wrong); training does not read that part"]
    return damage + members


def _damaged_members(shards: ShardSet, number: int) -> Iterator[str]:
    reader = TokenReader(shards, cache_bytes=1)
    for member in np.flatnonzero(shards.index.members["shard"] == number).tolist():
        yield from reader.damage_of(member)


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(HASHED_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()


def _foreign_files(folder: Path, manifest: Manifest) -> Iterator[str]:
    """One line for every file that the manifest does not name."""
    known = {MANIFEST_NAME, TOKENIZER_NAME, *(shard.file for shard in manifest.shards)}
    known |= {entry.file for entry in manifest.index}
    for parent, inner, names in os.walk(folder):
        if Path(parent) == folder and VALIDATION_FOLDER in inner:
            inner.remove(VALIDATION_FOLDER)
        for name in names:
            if Path(parent, name).relative_to(folder).as_posix() not in known:
                yield f"{Path(parent, name)}: does not belong to the shards"

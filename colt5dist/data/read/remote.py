"""Shards behind an address, read through fsspec: whole shards into a bounded cache that any number of processes share.

A shard lies in the cache under its hash, so that what is there is right, and the same shard of two addresses is there
once. A process that lacks one takes a lock, makes room by removing those unused for the longest time, fetches it under
another name, compares size and hash, and renames it. A removed shard stays readable for who has it open.

A set that the cache cannot hold is not cached: the order of the samples comes back to every shard again and again, and
each time it would be fetched anew. Its members are read one by one, each by a request for its bytes, which the
checksums of its records prove; so an epoch fetches every byte about once.

No address is given to a shell, and nothing that is fetched is unpickled: only the schemes below are opened, and no
chain of them (`a::b`).
"""

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from colt5dist.data.manifest import MANIFEST_NAME, Manifest, ShardEntry, read_manifest
from colt5dist.errors import ConfigError
from colt5dist.files import cache_folder, locked

SCHEMES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs"}
"""The package that fsspec needs for each."""

CACHE_BYTES = 100 << 30
ATTEMPTS = 6
FIRST_WAIT = 0.5  # seconds; doubled after every attempt
FETCHED_AT_ONCE = 1 << 22
ASKED_AT_ONCE = 16

T = TypeVar("T")


class NoRangesError(OSError):
    """A server answers a request for a part of a file with all of it."""


def is_remote(path: str) -> bool:
    """Whether a path is an address; ConfigError if it is one that is not read."""
    scheme, separator, _ = path.partition("://")
    if "::" not in path and not separator and not path.startswith("pipe:"):
        return False
    if scheme not in SCHEMES or "::" in path:
        raise ConfigError(
            f"data.shards: {path} is no address that is read; give a folder, or one of {', '.join(SCHEMES)}://..."
        )
    for package in ("fsspec", SCHEMES[scheme]):
        if find_spec(package) is None:
            raise ConfigError(f"data.shards: {path} needs the package {package}; pip install {package}")
    return True


class RemoteShards:
    """A set of shards behind an address."""

    def __init__(self, address: str, *, cache_bytes: int) -> None:
        """Read from `address`, keeping at most `cache_bytes` of shards on the disk."""
        self._address = address.rstrip("/")
        self._cache = cache_folder() / "shards"
        self._cache_bytes = cache_bytes
        self.reads_members = False
        """Whether members are to be read one by one, by `read`; else shards are to be opened."""

    def address(self, file: str) -> str:
        """Address of one of its files."""
        return f"{self._address}/{file}"

    def below(self, folder: str) -> "RemoteShards":
        """The set in a folder of it."""
        return RemoteShards(self.address(folder), cache_bytes=self._cache_bytes)

    def fetch_description(self) -> Path:
        """A folder with its manifest, its index and its tokenizer, and those of the set in validation/.

        Raises:
            ConfigError: something cannot be fetched.
        """
        folder = self._cache / "sets" / hashlib.sha256(self._address.encode()).hexdigest()[:16]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder / "lock", wait=True):
                manifest = self._fetch_set(folder)
                if manifest.validation is not None:
                    self.below("validation")._fetch_set(folder / "validation")
        except OSError as error:
            raise ConfigError(f"data.shards: {self._address} cannot be fetched ({error}); mend it") from None
        return folder

    def _fetch_set(self, folder: Path) -> Manifest:
        """Bring a folder up to date; the small files are compared by size here and by checksum when they are opened."""
        (folder / "index").mkdir(parents=True, exist_ok=True)
        old = (folder / MANIFEST_NAME).read_bytes() if (folder / MANIFEST_NAME).exists() else None
        self._fetch(MANIFEST_NAME, folder / MANIFEST_NAME)
        manifest = read_manifest(folder)
        changed = old != (folder / MANIFEST_NAME).read_bytes()
        files = {entry.file: entry.bytes for entry in manifest.index}
        if manifest.tokenizer.kind == "tokenizer.json":
            files["tokenizer.json"] = -1
        for file, size in files.items():
            path = folder / file
            if changed or not path.exists() or path.stat().st_size != size:
                self._fetch(file, path)
        return manifest

    def check_sizes(self, shards: Sequence[ShardEntry]) -> None:
        """See that all shards are there and have their sizes, and choose how they are read.

        Raises:
            ConfigError: one is missing or truncated.
        """
        self.reads_members = sum(entry.bytes for entry in shards) > self._cache_bytes

        def size(entry: ShardEntry) -> int | None:
            return self._retry(entry.file, lambda fs, path: fs.info(path)["size"])

        try:
            with ThreadPoolExecutor(ASKED_AT_ONCE) as executor:
                sizes = list(executor.map(size, shards))
        except OSError as error:
            raise ConfigError(f"data.shards: {error}; copy or prepare the shards again") from None
        for entry, found in zip(shards, sizes, strict=True):
            if found is not None and found != entry.bytes:  # some servers do not say
                raise ConfigError(
                    f"{self.address(entry.file)}: has {found} bytes, the manifest says {entry.bytes}; copy or prepare "
                    "the shards again"
                )

    def open(self, entry: ShardEntry) -> BinaryIO:
        """A shard from the cache, fetched first if it is not there; raises OSError."""
        path = self._cache / f"{entry.sha256}.tar"
        self._cache.mkdir(parents=True, exist_ok=True)
        try:
            return self._open_cached(path)
        except FileNotFoundError:
            pass
        with locked(self._cache / f"{entry.sha256}.lock", wait=True):
            for _ in range(ATTEMPTS):
                if not path.exists():
                    self._make_room(entry.bytes)
                    self._fetch(entry.file, path, sha256=entry.sha256)
                with suppress(FileNotFoundError):  # another process may have made room for one of its own
                    return self._open_cached(path)
            raise OSError(f"{path} was removed from the cache {ATTEMPTS} times; raise data.cache_gb")

    def read(self, entry: ShardEntry, offset: int, size: int) -> bytes:
        """A part of a shard from its address; raises OSError."""

        def fetch(fs: Any, address: str) -> bytes:
            content = fs.cat_file(address, start=offset, end=offset + size)
            if len(content) == size:
                return content
            if len(content) == entry.bytes:
                raise NoRangesError("its server sends whole files only; raise data.cache_gb to hold all shards")
            raise OSError(f"{len(content)} bytes came instead of {size}")

        return self._retry(entry.file, fetch)

    def _open_cached(self, path: Path) -> BinaryIO:
        file = open(path, "rb")  # noqa: SIM115
        os.utime(file.fileno())  # the time of its last use
        return file

    def _make_room(self, needed: int) -> None:
        """Remove the shards that were unused for the longest time until one of `needed` bytes fits."""
        with locked(self._cache / "room.lock", wait=True):
            files = sorted(
                ((path.stat().st_mtime_ns, path.stat().st_size, path) for path in self._cache.glob("*.tar")),
                key=lambda entry: entry[0],
            )
            total = sum(size for _, size, _ in files)
            for _, size, path in files:
                if total + needed <= self._cache_bytes:
                    break
                path.unlink(missing_ok=True)
                total -= size

    def _fetch(self, file: str, path: Path, *, sha256: str | None = None) -> None:
        """Copy a file of the set to `path`, which is whole as soon as it is there."""
        partial = path.with_name(path.name + ".partial")

        def copy(fs: Any, address: str) -> None:
            source = fs.open(address, "rb", block_size=FETCHED_AT_ONCE, cache_type="readahead")
            with source, open(partial, "wb") as target:
                shutil.copyfileobj(source, target, FETCHED_AT_ONCE)
                target.flush()
                os.fsync(target.fileno())
            if sha256 is not None:
                with open(partial, "rb") as content:
                    found = hashlib.file_digest(content, "sha256").hexdigest()
                if found != sha256:
                    raise OSError("its hash is not the one in the manifest")

        self._retry(file, copy)
        os.rename(partial, path)

    def _retry(self, file: str, action: Callable[[Any, str], T]) -> T:
        """Do something with a file of the set, again after a while if it fails; OSError that names it in the end."""
        import fsspec  # late: wanted for addresses only

        for attempt in range(ATTEMPTS):
            try:
                # anew in every process: a forked one must not use its parent's connections
                fs, path = fsspec.url_to_fs(self.address(file))
                return action(fs, path)
            except (FileNotFoundError, PermissionError, NoRangesError) as error:
                raise OSError(f"{self.address(file)} cannot be fetched ({error})") from None
            except Exception as error:  # every file system has its own kinds
                if attempt == ATTEMPTS - 1:
                    reason = str(error) or type(error).__name__
                    raise OSError(f"{self.address(file)} cannot be fetched ({reason})") from None
                time.sleep(FIRST_WAIT * 2**attempt)
        raise AssertionError

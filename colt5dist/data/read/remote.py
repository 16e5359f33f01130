"""Shards at an address, read through fsspec: whole shards go to a cache of limited size that all processes share.

The file name of a shard in the cache is its hash. So its content is known to be right, and a shard that is at two
addresses is cached once. A process that needs a missing shard takes a lock, makes room by removing those that were
unused for the longest time, downloads the shard under a temporary name, compares its hash, and renames it. A process
that has a removed shard open can still read it.

A set that is larger than the cache is not cached: the order of the samples returns to every shard again and again, and
each time the shard would be downloaded again. Instead, its members are downloaded one by one, each with a request for
its byte range, and verified by the checksums of their records; so an epoch downloads every byte about once.

No address is passed to a shell, and nothing that is downloaded is unpickled: only the schemes below are opened, and no
chains of them (`a::b`).
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
from colt5dist.files import cache_folder, locked, name_of_this_process

SCHEMES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs"}
"""The schemes that are supported, and the package that fsspec needs for each."""

CACHE_BYTES = 100 << 30
ATTEMPTS = 6
FIRST_WAIT = 0.5  # seconds after the first attempt; doubled after every further one
FETCHED_AT_ONCE = 1 << 22
ASKED_AT_ONCE = 16
ABANDONED_SECONDS = 24 * 3600  # since the last write to a file that is being downloaded

T = TypeVar("T")


class NoRangesError(OSError):
    """A server answers a request for a part of a file with the whole file."""


def is_remote(path: str) -> bool:
    """Return whether a path is an address.

    Raises:
        ConfigError: it is an address that is not supported, or a package for it is missing.
    """
    scheme, separator, _ = path.partition("://")
    if "::" not in path and not separator and not path.startswith("pipe:"):
        return False
    if scheme not in SCHEMES or "::" in path:
        raise ConfigError(
            f"data.shards: {path} is not a supported address; give a folder, or one of {', '.join(SCHEMES)}://..."
        )
    for package in ("fsspec", SCHEMES[scheme]):
        if find_spec(package) is None:
            raise ConfigError(f"data.shards: {path} needs the package {package}; pip install {package}")
    return True


class RemoteShards:
    """A set of shards at an address.

    Args:
        address: address of the folder.
        cache_bytes: most bytes of shards that are kept on disk.
    """

    def __init__(self, address: str, *, cache_bytes: int) -> None:
        self._address = address.rstrip("/")
        self._cache = cache_folder() / "shards"
        self._cache_bytes = cache_bytes
        self.reads_members = False
        """Whether members are read one by one with `read`, instead of whole shards with `open`."""

    def address(self, file: str) -> str:
        """Return the address of one of its files."""
        return f"{self._address}/{file}"

    def below(self, folder: str) -> "RemoteShards":
        """Return the set in a subfolder."""
        return RemoteShards(self.address(folder), cache_bytes=self._cache_bytes)

    def fetch_description(self) -> Path:
        """Download manifest, index and tokenizer, and those of the set in validation/.

        Returns:
            The local folder that holds them.

        Raises:
            ConfigError: something cannot be downloaded.
        """
        folder = self._cache / "sets" / hashlib.sha256(self._address.encode()).hexdigest()[:16]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder / "lock", wait=True):
                manifest = self._fetch_set(folder)
                if manifest.validation is not None:
                    self.below("validation")._fetch_set(folder / "validation")
        except OSError as error:
            raise ConfigError(
                f"data.shards: {self._address} cannot be fetched ({error}); check the address and the access to it"
            ) from None
        return folder

    def _fetch_set(self, folder: Path) -> Manifest:
        """Update a local folder; files are compared by size here, and by checksum when they are opened."""
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
        """Check that all shards exist and have the right sizes, and decide how they are read.

        Args:
            shards: entries of the manifest.

        Raises:
            ConfigError: a shard is missing or has another size.
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
            if found is not None and found != entry.bytes:  # some servers do not report the size
                raise ConfigError(
                    f"{self.address(entry.file)}: has {found} bytes, the manifest says {entry.bytes}; copy or prepare "
                    "the shards again"
                )

    def open(self, entry: ShardEntry) -> BinaryIO:
        """Open a shard of the cache for reading; download it first if it is not there.

        Raises:
            OSError: it cannot be downloaded or read.
        """
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
                with suppress(FileNotFoundError):  # another process may have removed it to make room
                    return self._open_cached(path)
            raise OSError(f"{path} was removed from the cache {ATTEMPTS} times; raise data.cache_gb")

    def read(self, entry: ShardEntry, offset: int, size: int) -> bytes:
        """Download `size` bytes of a shard from `offset` on.

        Raises:
            OSError: they cannot be downloaded.
        """

        def fetch(fs: Any, address: str) -> bytes:
            content = fs.cat_file(address, start=offset, end=offset + size)
            if len(content) == size:
                return content
            if len(content) == entry.bytes:
                raise NoRangesError("its server sends whole files only; raise data.cache_gb to hold all shards")
            raise OSError(f"received {len(content)} bytes instead of {size}")

        return self._retry(entry.file, fetch)

    def _open_cached(self, path: Path) -> BinaryIO:
        file = open(path, "rb")  # noqa: SIM115
        os.utime(file.fileno())  # the time of its last use
        return file

    def _make_room(self, needed: int) -> None:
        """Remove the shards that were unused for the longest time, until a shard of `needed` bytes fits."""
        with locked(self._cache / "room.lock", wait=True):
            for partial in self._cache.glob("*.partial"):  # of a process that was killed
                with suppress(FileNotFoundError):
                    if time.time() - partial.stat().st_mtime > ABANDONED_SECONDS:
                        partial.unlink()
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
        """Download a file of the set to `path`, which never holds an incomplete file."""
        partial = path.with_name(f"{path.name}.{name_of_this_process()}.partial")

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

        try:
            self._retry(file, copy)
            os.rename(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def _retry(self, file: str, action: Callable[[Any, str], T]) -> T:
        """Call `action` with a file of the set; retry after a while if it fails, and in the end raise OSError."""
        import fsspec  # imported here: an optional package, needed for addresses only

        for attempt in range(ATTEMPTS):
            try:
                # a new file system object in every process: a forked one must not use its parent's connections
                fs, path = fsspec.url_to_fs(self.address(file))
                return action(fs, path)
            except (FileNotFoundError, PermissionError, NoRangesError) as error:
                raise OSError(f"{self.address(file)} cannot be fetched ({error})") from None
            except Exception as error:  # every file system has its own exceptions
                if attempt == ATTEMPTS - 1:
                    reason = str(error) or type(error).__name__
                    raise OSError(f"{self.address(file)} cannot be fetched ({reason})") from None
                time.sleep(FIRST_WAIT * 2**attempt)
        raise AssertionError

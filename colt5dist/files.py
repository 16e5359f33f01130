"""Whole files only: temporary name, fsync, rename; a lock between processes; and where the cache lies."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """Where colt5dist keeps what it can make again."""
    if cache := os.environ.get("COLT5DIST_CACHE"):
        return Path(cache).absolute()
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache).absolute() / "colt5dist"
    return Path.home() / ".cache" / "colt5dist"


def fsync_path(path: Path) -> None:
    """Bring a file's bytes, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Bring all files and folders below `folder` to the disk."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            fsync_path(Path(parent, name))
        fsync_path(Path(parent))


def write_whole(path: Path, content: bytes, *, writer: str = "") -> None:
    """Write a file so that its name never stands for a part of the content.

    Args:
        path: of the file; what lies there is replaced.
        content: of the file.
        writer: name of the process, where several may write the file at the same time.
    """
    temporary = path.with_name(f"{path.name}{writer and f'.{writer}'}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)
    fsync_path(path.parent)


def lock_for_life(path: Path) -> bool:
    """Lock the file `path` until this process ends, on all hosts that share it; its children do not inherit the lock.

    Returns:
        Whether it is locked; False where the file system has no locks.

    Raises:
        BlockingIOError: another process holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)  # never closed: that would end the lock
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise BlockingIOError(error.errno, error.strerror) from None
        return False
    return True


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`, which is made where it is missing and stays.

    Raises:
        BlockingIOError: another process holds it and `wait` is False, or has just removed the file.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        if not _is_file_of(path, descriptor):
            raise BlockingIOError(f"{path} was removed")
        yield
    finally:
        os.close(descriptor)


def _is_file_of(path: Path, descriptor: int) -> bool:
    """Whether a name still is that of an open file."""
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False

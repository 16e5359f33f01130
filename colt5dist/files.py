"""Files that are complete or absent (temporary name, fsync, rename), locks between processes, and the cache folder."""

import errno
import fcntl
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from colt5dist.errors import ConfigError


def cache_folder() -> Path:
    """Return the folder where colt5dist keeps files that it can make again.

    It is $COLT5DIST_CACHE, else $XDG_CACHE_HOME/colt5dist, else ~/.cache/colt5dist; where the user has no home folder
    that can be written, a folder of this user beside other temporary files.

    Raises:
        ConfigError: the last of them is needed, and cannot be used.
    """
    if cache := os.environ.get("COLT5DIST_CACHE"):
        return Path(cache).expanduser().absolute()
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache).absolute() / "colt5dist"
    with suppress(OSError, RuntimeError):  # RuntimeError: the user has neither $HOME nor an entry among the users
        folder = Path.home() / ".cache" / "colt5dist"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    folder = Path(tempfile.gettempdir(), f"colt5dist-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        reason = None if folder.lstat().st_uid == os.getuid() else "belongs to another user"
    except OSError as error:
        reason = f"cannot be made ({error.strerror})"
    if reason:
        raise ConfigError(f"COLT5DIST_CACHE: {folder} {reason}; set this variable to a folder for the cache")
    return folder


def fsync_path(path: Path) -> None:
    """Flush a file's bytes, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Flush `folder` and all files and folders below it to disk."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            fsync_path(Path(parent, name))
        fsync_path(Path(parent))


def write_whole(path: Path, content: bytes, *, writer: str = "", keep_existing: bool = False) -> None:
    """Write a file so that its name never refers to a part of the content.

    Args:
        path: path of the file; an existing file is replaced.
        content: content of the file.
        writer: name of the process, where several may write the file at the same time.
        keep_existing: an existing file stays as it is, also one that appears meanwhile.
    """
    temporary = path.with_name(f"{path.name}{writer and f'.{writer}'}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if keep_existing:
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links, where looking first has to do
            if not path.exists():
                os.rename(temporary, path)
        temporary.unlink(missing_ok=True)
    else:
        os.rename(temporary, path)
    fsync_path(path.parent)


def lock_for_life(path: Path) -> bool:
    """Lock a file until this process ends, on all hosts that share the file; its children do not inherit the lock.

    Args:
        path: path of the file, which is created where it is missing.

    Returns:
        Whether it is locked; False where the file system has no locks.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)  # never closed: closing would release the lock
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise BlockingIOError(error.errno, error.strerror) from None
        return False
    return True


def is_locked_for_life(path: Path) -> bool:
    """Whether another process holds the lock of `lock_for_life` on a file; changes nothing."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EAGAIN)
    finally:
        os.close(descriptor)
    return False


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold an exclusive lock on a file while the block runs.

    On a file system without locks the block runs without one. So what it writes has to be right also if another
    process does the same: under names of its own (`name_of_this_process`), renamed when it is complete.

    Args:
        path: path of the file. It is created where it is missing and is not removed.
        wait: wait for a process that holds the lock, instead of raising.

    Yields:
        Whether the lock is held; False where the file system has no locks.

    Raises:
        BlockingIOError: another process holds the lock and `wait` is False, or has just removed the file.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        is_held = _lock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        if not _is_file_of(path, descriptor):
            raise BlockingIOError(f"{path} was removed")
        yield is_held
    finally:
        os.close(descriptor)


def name_of_this_process() -> str:
    """Return a name that no other process has at the same time, on any host, for temporary files."""
    return f"{socket.gethostname()}-{os.getpid()}"


def _lock(descriptor: int, how: int) -> bool:
    """Lock an open file by whichever kind of lock its file system has; returns False if it has none.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    for lock in (fcntl.flock, fcntl.lockf):
        try:
            lock(descriptor, how)
            return True
        except OSError as error:  # ENOSYS, ENOLCK, EOPNOTSUPP: there is no such lock
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise BlockingIOError(error.errno, error.strerror) from None
    return False


def _is_file_of(path: Path, descriptor: int) -> bool:
    """Whether `path` is still the name of the open file."""
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False

"""Zip archives in which the SCROLLS benchmark comes: `<task>/train.jsonl`, `validation.jsonl` and `test.jsonl`."""

import zipfile
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from colt5dist.errors import ConfigError

ZIP_SUFFIX = ".zip"
HELD_OUT_MEMBERS = {"train.jsonl": False, "validation.jsonl": True}
"""Name of a member that is read -> whether it is held out."""
TEST_MEMBER = "test.jsonl"
ENCRYPTED = 1  # of a member's flags


def list_members(path: Path) -> tuple[list[zipfile.ZipInfo], int, int]:
    """List what is read of an archive.

    Args:
        path: the archive.

    Returns:
        The members that are read, in the order of their names; the number of `test.jsonl`, which have no targets; and
        the number of other files.

    Raises:
        ConfigError: it is no zip archive, or holds none of these members, or one that cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            files = [member for member in archive.infolist() if not member.is_dir()]
    except (zipfile.BadZipFile, NotImplementedError, OSError) as error:
        raise ConfigError(f"--input: {path} cannot be read as a zip archive ({error}); download it again") from None
    files = [member for member in files if not _is_hidden(member)]
    read = [member for member in files if _name(member) in HELD_OUT_MEMBERS]
    if not read:
        raise ConfigError(
            f"--input: {path} holds no {' or '.join(HELD_OUT_MEMBERS)}; unpack it, and give its files of pairs"
        )
    known = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    for member in read:
        if member.flag_bits & ENCRYPTED or member.compress_type not in known:
            raise ConfigError(
                f"--input: {path}: {member.filename} is encrypted, or compressed in a way that is not known; unpack "
                "the archive, and give its files"
            )
    names = [member.filename for member in read]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"--input: {path} holds {twice[0]} twice; unpack it, and give its files of pairs")
    tests = sum(_name(member) == TEST_MEMBER for member in files)
    return sorted(read, key=lambda member: member.filename), tests, len(files) - len(read) - tests


def is_held_out(member: str) -> bool:
    """Whether a member that is read is held out."""
    return HELD_OUT_MEMBERS[PurePosixPath(member).name]


def open_member(raw: BinaryIO, member: str) -> BinaryIO:
    """Return the content of a member of an open archive as a stream; reading it may raise zipfile.BadZipFile."""
    return zipfile.ZipFile(raw).open(member)  # type: ignore[return-value]


def _name(member: zipfile.ZipInfo) -> str:
    return PurePosixPath(member.filename).name


def _is_hidden(member: zipfile.ZipInfo) -> bool:
    """Whether it is one of the files that file managers add."""
    return any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(member.filename).parts)

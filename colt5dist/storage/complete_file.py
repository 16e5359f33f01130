"""COMPLETE, the last file of a checkpoint: its run, its step, and the size and hashes of every other file.

A file is hashed in pieces of `PIECE_BYTES` (SHA-256 of each piece), so that several threads can hash one file while
they write it, and several ranks can share the work of checking it.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from colt5dist.files import write_whole

COMPLETE = "COMPLETE"
INDEX = "index.json"
STATE = "trainer.json"
FORMAT_VERSION = 2
PIECE_BYTES = 1 << 26
"""Size of the pieces that are hashed."""
HASH_THREADS = 4
"""Threads per rank that compare hashes when a run starts."""
FILE_NAME = re.compile(r"index\.json|trainer\.json|rank_\d{5,}\.safetensors")
FOLDER_NAME = re.compile(r"step_(\d{8,})")
SHA256 = re.compile(r"[0-9a-f]{64}")


def folder_name(step: int) -> str:
    """Name of the checkpoint folder of a step; `FOLDER_NAME` matches it."""
    return f"step_{step:08d}"


def rank_file_name(rank: int) -> str:
    """Name of the file that a rank writes; `FILE_NAME` matches it."""
    return f"rank_{rank:05d}.safetensors"


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file of a checkpoint."""

    name: str
    """File name inside the checkpoint folder."""
    bytes: int
    """Size of the file."""
    sha256: tuple[str, ...]
    """Hash of each piece, in order."""


@dataclass(frozen=True)
class Damage:
    """Why a checkpoint cannot be used although its files have the right sizes."""

    description: str
    """The reason in a few words."""
    may_be_temporary: bool
    """Whether the data could not be read, which may work another time."""

    def __str__(self) -> str:
        return self.description


@dataclass(frozen=True, kw_only=True)
class CompleteFile:
    """The content of COMPLETE."""

    run_id: str
    """The run that wrote the checkpoint."""
    step: int
    """The step of the checkpoint."""
    files: tuple[FileEntry, ...]
    """All files except COMPLETE itself."""
    piece_bytes: int = PIECE_BYTES
    """Size of the pieces that are hashed."""

    def write(self, folder: Path) -> None:
        """Write COMPLETE into the folder; the other files must already be flushed to disk."""
        content = {"format_version": FORMAT_VERSION, **asdict(self)}
        write_whole(folder / COMPLETE, json.dumps(content, indent=1).encode())

    def pieces(self) -> Iterator[tuple[str, int, str]]:
        """Iterate over all pieces: file name, offset of the first byte, expected hash."""
        for entry in self.files:
            for number, sha256 in enumerate(entry.sha256):
                yield entry.name, number * self.piece_bytes, sha256

    @property
    def num_bytes(self) -> int:
        """Size of all files together."""
        return sum(entry.bytes for entry in self.files)


def read_complete(folder: Path) -> CompleteFile:
    """Read COMPLETE.

    Args:
        folder: folder of a checkpoint.

    Returns:
        Its content.

    Raises:
        ValueError: it is missing or damaged; the message has a few words and does not name the folder.
    """
    try:
        content = json.loads((folder / COMPLETE).read_bytes())
        if (written := content.get("format_version", 1)) != FORMAT_VERSION:
            raise ValueError(f"it has format {written}, this version reads {FORMAT_VERSION}")
        files = tuple(
            FileEntry(name=entry["name"], bytes=int(entry["bytes"]), sha256=tuple(entry["sha256"]))
            for entry in content["files"]
        )
        complete = CompleteFile(
            run_id=str(content["run_id"]),
            step=int(content["step"]),
            piece_bytes=int(content["piece_bytes"]),
            files=files,
        )
        valid = complete.piece_bytes > 0 and all(
            FILE_NAME.fullmatch(entry.name)
            and len(entry.sha256) == -(-entry.bytes // complete.piece_bytes)
            and all(SHA256.fullmatch(sha256) for sha256 in entry.sha256)
            for entry in files
        )
    except FileNotFoundError:
        raise ValueError(f"{COMPLETE} is missing") from None
    except OSError as error:
        raise ValueError(f"{COMPLETE} cannot be read ({error.strerror})") from None
    except (
        KeyError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
        json.JSONDecodeError,
        UnicodeError,
    ):
        valid = False
    if not valid or not {INDEX, STATE} <= {entry.name for entry in files}:
        raise ValueError(f"{COMPLETE} is damaged")
    return complete


def size_problem(folder: Path, run_id: str | None = None) -> str | None:
    """Check a checkpoint by its COMPLETE and the sizes of its files, without reading them.

    Args:
        folder: folder of a checkpoint, for instance `step_00001000`.
        run_id: the run that must have written it; None: any run.

    Returns:
        What is wrong, in a few words; None if the checkpoint is whole as far as sizes show.
    """
    try:
        complete = read_complete(folder)
        for entry in complete.files:
            size = (folder / entry.name).stat().st_size
            if size != entry.bytes:
                return f"{entry.name} has {size} bytes, {COMPLETE} says {entry.bytes}"
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"{Path(str(error.filename)).name} cannot be read ({error.strerror})"
    if FOLDER_NAME.fullmatch(folder.name) and folder.name != folder_name(complete.step):
        return f"{COMPLETE} is of step {complete.step}"
    if run_id is not None and complete.run_id != run_id:
        return f"it is of run {complete.run_id}, this is run {run_id}; init_from would take its weights"
    return None


def json_problem(folder: Path) -> str | None:
    """Compare only index.json and trainer.json with their hashes; returns what is wrong, or None."""
    damage = find_difference(folder, lambda number, name: name in (INDEX, STATE))
    return None if damage is None else damage.description


def find_difference(folder: Path, selected: Callable[[int, str], bool]) -> Damage | None:
    """Compare pieces of a checkpoint with their hashes, on several threads.

    Args:
        folder: a checkpoint without `size_problem`.
        selected: decides from a piece's number and file name whether to compare it; ranks share the pieces.

    Returns:
        What is wrong with the first bad piece; None if all are as they were written.

    Raises:
        ValueError: COMPLETE is damaged.
    """
    complete = read_complete(folder)

    def check(piece: tuple[str, int, str]) -> Damage | None:
        name, first, sha256 = piece
        try:
            with open(folder / name, "rb", buffering=0) as file:
                file.seek(first)
                found = hashlib.sha256(file.read(complete.piece_bytes)).hexdigest()
        except OSError as error:
            return Damage(f"{name} cannot be read ({error.strerror})", may_be_temporary=True)
        changed = f"{name} was changed after it was written (near byte {first})"
        return None if found == sha256 else Damage(changed, may_be_temporary=False)

    pieces = [piece for number, piece in enumerate(complete.pieces()) if selected(number, piece[0])]
    with ThreadPoolExecutor(HASH_THREADS) as threads:
        return next((problem for problem in threads.map(check, pieces) if problem), None)


def describe_file(path: Path) -> FileEntry:
    """Size and hashes of a small file."""
    content = path.read_bytes()
    hashes = [
        hashlib.sha256(content[first : first + PIECE_BYTES]).hexdigest()
        for first in range(0, len(content), PIECE_BYTES)
    ]
    return FileEntry(name=path.name, bytes=len(content), sha256=tuple(hashes))

"""COMPLETE, the last file of a checkpoint: whose it is, of which step, and size and hashes of every other file.

A file is hashed in pieces of `PIECE_BYTES` (SHA-256 of each), so that several threads hash one file while they write
it, and several ranks share the work of comparing it.
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
HASH_THREADS = 4
"""Threads of a rank that compare hashes at the start."""
FILE_NAME = re.compile(r"index\.json|trainer\.json|rank_\d{5,}\.safetensors")
FOLDER_NAME = re.compile(r"step_(\d{8,})")
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file of a checkpoint."""

    name: str
    """In the folder."""
    bytes: int
    """Size."""
    sha256: tuple[str, ...]
    """Hash of each piece, in order."""


@dataclass(frozen=True)
class Damage:
    """What keeps a checkpoint with the right sizes from being used."""

    what: str
    """In a few words."""
    may_pass: bool
    """Whether only reading failed, which another time may not."""

    def __str__(self) -> str:
        return self.what


@dataclass(frozen=True, kw_only=True)
class Marker:
    """The content of COMPLETE."""

    run_id: str
    """Of the run that wrote it."""
    step: int
    """Of the checkpoint."""
    files: tuple[FileEntry, ...]
    """All files but COMPLETE itself."""
    piece_bytes: int = PIECE_BYTES
    """Size of the pieces that are hashed."""

    def write(self, folder: Path) -> None:
        """Write COMPLETE; the other files must be durable before."""
        content = {"format_version": FORMAT_VERSION, **asdict(self)}
        write_whole(folder / COMPLETE, json.dumps(content, indent=1).encode())

    def pieces(self) -> Iterator[tuple[str, int, str]]:
        """File, first byte and hash of every piece."""
        for entry in self.files:
            for number, sha256 in enumerate(entry.sha256):
                yield entry.name, number * self.piece_bytes, sha256

    @property
    def num_bytes(self) -> int:
        """Size of all files together."""
        return sum(entry.bytes for entry in self.files)


def read_marker(folder: Path) -> Marker:
    """Read COMPLETE.

    Raises:
        ValueError: it is missing or says something impossible; in a few words, without the folder's name.
    """
    try:
        content = json.loads((folder / COMPLETE).read_bytes())
        if (written := content.get("format_version", 1)) != FORMAT_VERSION:
            raise ValueError(f"it has format {written}, this version reads {FORMAT_VERSION}")
        files = tuple(
            FileEntry(name=entry["name"], bytes=int(entry["bytes"]), sha256=tuple(entry["sha256"]))
            for entry in content["files"]
        )
        marker = Marker(
            run_id=str(content["run_id"]),
            step=int(content["step"]),
            piece_bytes=int(content["piece_bytes"]),
            files=files,
        )
        sound = marker.piece_bytes > 0 and all(
            FILE_NAME.fullmatch(entry.name)
            and len(entry.sha256) == -(-entry.bytes // marker.piece_bytes)
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
        sound = False
    if not sound or not {INDEX, STATE} <= {entry.name for entry in files}:
        raise ValueError(f"{COMPLETE} is damaged")
    return marker


def size_problem(folder: Path, run_id: str | None = None) -> str | None:
    """Why a folder is no whole checkpoint of this run, as far as sizes show, in a few words; None if it is.

    Args:
        folder: `step_00001000`, say.
        run_id: of the run; None: any.
    """
    try:
        marker = read_marker(folder)
        for entry in marker.files:
            size = (folder / entry.name).stat().st_size
            if size != entry.bytes:
                return f"{entry.name} has {size} bytes, {COMPLETE} says {entry.bytes}"
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"{Path(str(error.filename)).name} cannot be read ({error.strerror})"
    if FOLDER_NAME.fullmatch(folder.name) and folder.name != f"step_{marker.step:08d}":
        return f"{COMPLETE} is of step {marker.step}"
    if run_id is not None and marker.run_id != run_id:
        return f"it is of run {marker.run_id}, this is run {run_id}; init_from would take its weights"
    return None


def json_problem(folder: Path) -> str | None:
    """Compare only index.json and trainer.json with their hashes."""
    damage = find_difference(folder, lambda number, name: name in (INDEX, STATE))
    return None if damage is None else damage.what


def find_difference(folder: Path, selected: Callable[[int, str], bool]) -> Damage | None:
    """Compare pieces of a checkpoint with their hashes, on several threads; what is wrong with the first bad one.

    Args:
        folder: a checkpoint without `size_problem`.
        selected: whether a piece is compared, by its number and its file's name; ranks share them out.

    Raises:
        ValueError: COMPLETE is damaged.
    """
    marker = read_marker(folder)

    def check(piece: tuple[str, int, str]) -> Damage | None:
        name, first, sha256 = piece
        try:
            with open(folder / name, "rb", buffering=0) as file:
                file.seek(first)
                found = hashlib.sha256(file.read(marker.piece_bytes)).hexdigest()
        except OSError as error:
            return Damage(f"{name} cannot be read ({error.strerror})", may_pass=True)
        changed = f"{name} was changed after it was written (near byte {first})"
        return None if found == sha256 else Damage(changed, may_pass=False)

    pieces = [piece for number, piece in enumerate(marker.pieces()) if selected(number, piece[0])]
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

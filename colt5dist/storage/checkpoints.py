"""Checkpoint folders: their names, their index, and the fragments in which their tensors lie."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from colt5dist.errors import ConfigError
from colt5dist.storage.complete_file import FOLDER_NAME, FORMAT_VERSION, INDEX, folder_name, size_problem

CHECKPOINTS = "checkpoints"
"""Folder of a run that holds its checkpoints."""
BEST = "best.json"
"""File beside the checkpoints that names the one with the best evaluation: its step, the key and its value there."""
WEIGHT = "weight"
"""Key of the float32 master weights; keys other than this and the next are the optimizer's own (exp_avg, ...)."""
AVERAGE = "ema"
"""Key of the exponential moving average of the weights, which a checkpoint has if `train.ema` was set."""


def step_folder(root: Path, step: int) -> Path:
    """Folder of the checkpoint of a step, `step_00001000` for instance."""
    return root / folder_name(step)


def folder_step(folder: Path) -> int:
    """Step of a checkpoint, from the name of its folder."""
    match = FOLDER_NAME.fullmatch(folder.name)
    assert match, folder
    return int(match[1])


def checkpoint_folders(root: Path) -> list[Path]:
    """Folders whose name is that of a checkpoint, lowest step first; all others are ignored."""
    found = [path for path in root.glob("step_*") if FOLDER_NAME.fullmatch(path.name)] if root.is_dir() else []
    return sorted(found, key=folder_step)


def is_whole(folder: Path) -> bool:
    """Whether COMPLETE exists and every file has the size that it states."""
    return size_problem(folder) is None


def find_checkpoints(root: Path, run_id: str | None = None) -> tuple[list[Path], list[Path]]:
    """Find the checkpoints in a folder, judged by COMPLETE and the sizes of their files.

    Args:
        root: folder of the checkpoints.
        run_id: the run whose checkpoints count as whole; None: any run.

    Returns:
        The whole checkpoints, lowest step first; and the other folders that have the name of a checkpoint.
    """
    folders = checkpoint_folders(root)
    whole = [path for path in folders if size_problem(path, run_id) is None]
    return whole, [path for path in folders if path not in whole]


def read_best(root: Path) -> dict[str, Any] | None:
    """Content of best.json; None where there is none, or a damaged one.

    Args:
        root: folder of the checkpoints.
    """
    try:
        content = json.loads((root / BEST).read_bytes())
        return content if isinstance(content["step"], int) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def read_index(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Read index.json.

    Returns:
        Shape and fragments by (parameter name, key).

    Raises:
        ConfigError: it cannot be read, or names a file outside the folder.
    """
    path = folder / INDEX
    content = read_json(path, fix="use another checkpoint")
    try:
        if content["format_version"] != FORMAT_VERSION:
            raise ConfigError(
                f"{folder}: checkpoint format {content['format_version']}, this version reads {FORMAT_VERSION}; "
                "load it with the version that wrote it"
            )
        found = {(str(entry["name"]), str(entry["key"])): entry for entry in content["tensors"]}
        files = {str(part["file"]) for entry in found.values() for part in entry["fragments"]}
    except (KeyError, TypeError):
        raise ConfigError(f"{path}: is damaged; use another checkpoint") from None
    for name in files:
        if Path(name).name != name:
            raise ConfigError(f"{path}: names a file outside the folder: {name}; use another checkpoint")
    return found


def parameter_shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter in a checkpoint."""
    return {name: tuple(e["shape"]) for (name, key), e in read_index(folder).items() if key == WEIGHT}


def read_json(path: Path, *, fix: str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: the file.
        fix: what the user can do if it cannot be read.

    Raises:
        ConfigError: it cannot be read, or is no JSON object.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); {fix}") from None
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: is damaged; {fix}")
    return content


class FragmentReader:
    """Reads slices of a checkpoint's tensors, whatever number of ranks and ZeRO stage wrote them.

    Within its context a file stays open from its first use on.

    Args:
        folder: a whole checkpoint.
        index: its content, from `read_index`.
        keep_open: whether files stay open; otherwise a file is opened for each slice, so that what is mapped into
            memory is one slice and not all that has been read.
    """

    def __init__(self, folder: Path, index: dict[tuple[str, str], dict[str, Any]], *, keep_open: bool = True) -> None:
        self.folder = folder
        self.index = index
        self._keep_open = keep_open
        self._files: dict[str, Any] = {}

    def __enter__(self) -> "FragmentReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()

    def fill(self, name: str, key: str, shape: tuple[int, ...], offset: int, target: torch.Tensor) -> None:
        """Fill a tensor with consecutive elements of a stored one.

        Args:
            name: name of the parameter.
            key: `WEIGHT`, `AVERAGE`, or a key of the optimizer's.
            shape: shape that the parameter must have.
            offset: first element to read, counted in the flattened parameter.
            target: flat, of any type; as many elements are read as it has.

        Raises:
            ConfigError: the checkpoint is of another model or another optimizer, or cannot be read.
        """
        entry = self.index.get((name, key))
        if entry is None or tuple(entry["shape"]) != shape:
            raise ConfigError(
                f"{self.folder}: {key} of parameter {name} with shape {list(shape)} is missing; "
                "use the model.* and optimizer.name of the run that wrote it"
            )
        first, last = offset, offset + target.numel()
        num_read = 0
        for part, low, high in _overlaps(entry["fragments"], first, last):
            target[low - first : high - first].copy_(self._slice(f"{name}|{key}|{part['offset']}", part, low, high))
            num_read += high - low
        if num_read != last - first:
            raise ConfigError(
                f"{self.folder}: its index has {num_read} of {last - first} elements of {name}; use another checkpoint"
            )

    def _slice(self, tensor_name: str, part: dict[str, Any], low: int, high: int) -> torch.Tensor:
        """Elements low .. high - 1 of the flattened parameter, which lie in the fragment `part`; float32."""
        path = self.folder / part["file"]
        try:
            file = self._files.get(path.name) or safe_open(path, framework="pt").__enter__()
            if self._keep_open:
                self._files[path.name] = file
            return file.get_slice(tensor_name)[low - part["offset"] : high - part["offset"]]
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path}: cannot be read ({error}); use another checkpoint") from None


def _overlaps(parts: Iterable[dict[str, Any]], first: int, last: int) -> Iterator[tuple[dict[str, Any], int, int]]:
    for part in parts:
        low, high = max(first, part["offset"]), min(last, part["offset"] + part["length"])
        if low < high:
            yield part, low, high

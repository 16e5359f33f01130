"""Folders beside the checkpoints, and what the trainer asks of a checkpoint: its state, model and optimizer."""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from colt5dist.errors import ConfigError
from colt5dist.storage.checkpoints import AVERAGE, WEIGHT, parameter_shapes_of, read_index, read_json
from colt5dist.storage.complete_file import FOLDER_NAME, FORMAT_VERSION, STATE, folder_name
from colt5dist.storage.exported import ExportedReader, is_exported
from colt5dist.train.checkpoint.trainer_state import TrainerState
from colt5dist.train.config.schema import OptimizerConfig, RunConfig
from colt5dist.train.optimizer.groups import ADAMW_MOMENTS, num_moments
from colt5dist.train.optimizer.muon import MOMENTUM

DAMAGED, UNREADABLE, REPLACED = "damaged", "unread", "replaced"
"""Endings of renamed checkpoints: changed after they were written, not readable, replaced by a new checkpoint."""
TEMPORARY_SUFFIX, DELETED_SUFFIX = ".tmp", ".deleted"
"""Endings of the hidden folders of a checkpoint that is being written or deleted."""
RENAMED = re.compile(rf"{FOLDER_NAME.pattern}\.({DAMAGED}|{UNREADABLE}|{REPLACED})(-\d+)?")
UNFINISHED = re.compile(rf"\.{FOLDER_NAME.pattern}(\{TEMPORARY_SUFFIX}|\{DELETED_SUFFIX})")


def temporary_folder(root: Path, step: int) -> Path:
    """Folder in which a checkpoint is written; it is renamed to `step_folder` when the checkpoint is whole."""
    return root / f".{folder_name(step)}{TEMPORARY_SUFFIX}"


def deleted_folder(folder: Path) -> Path:
    """Name that a checkpoint gets before its files are deleted."""
    return folder.with_name(f".{folder.name}{DELETED_SUFFIX}")


def renamed_folders(root: Path) -> list[Path]:
    """Checkpoints that were renamed because they are damaged, not readable, or were replaced by a new one."""
    return sorted(path for path in root.glob("step_*") if RENAMED.fullmatch(path.name) and path.is_dir())


def unfinished_folders(root: Path) -> list[Path]:
    """Folders that interrupted saves and deletions have left behind."""
    return sorted(path for path in root.glob(".step_*") if UNFINISHED.fullmatch(path.name) and path.is_dir())


def read_state(folder: Path) -> TrainerState:
    """Read the trainer's integers of a checkpoint.

    Raises:
        ConfigError: they cannot be read.
    """
    content = read_json(folder / STATE, fix="use another checkpoint")
    try:
        return TrainerState(**content["state"])
    except (KeyError, TypeError):
        raise ConfigError(f"{folder / STATE}: is damaged; use another checkpoint") from None


def model_problems(folder: Path, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Compare the stored parameters with those of a model.

    Args:
        folder: a checkpoint, or an exported folder.
        shapes: name and shape of every parameter of the model.

    Returns:
        The first difference and the number of further ones, as one line; nothing if there is none.
    """
    saved = ExportedReader(folder).shapes() if is_exported(folder) else parameter_shapes_of(folder)
    found = [f"{folder}: parameter {name} is missing" for name in shapes if name not in saved]
    found += [f"{folder}: parameter {name} is not in this model" for name in saved if name not in shapes]
    found += [
        f"{folder}: parameter {name} has shape {saved[name]}, this model needs {shape}"
        for name, shape in shapes.items()
        if name in saved and saved[name] != shape
    ]
    if not found:
        return []
    more = f" (and {len(found) - 1} more differences)" if len(found) > 1 else ""
    return [f"{found[0]}{more}; use the model.* of the run that wrote it"]


def optimizer_problems(folder: Path, config: OptimizerConfig) -> list[str]:
    """Check that a checkpoint's optimizer states are those of the configured optimizer; returns at most one line."""
    keys = {key for _, key in read_index(folder)} - {WEIGHT, AVERAGE}
    written_by = "muon" if MOMENTUM in keys else "adamw" if keys & set(ADAMW_MOMENTS) else "adafactor"
    if not keys or written_by == config.name:
        return []
    return [
        f"optimizer.name: {config.name} cannot continue from the states of another optimizer in {folder}; set it "
        "back, or start another run with init_from"
    ]


def has_average(folder: Path) -> bool:
    """Whether a checkpoint holds a moving average of the weights."""
    return any(key == AVERAGE for _, key in read_index(folder))


def checkpoint_bytes(shapes: Mapping[str, tuple[int, ...]], config: RunConfig) -> int:
    """Size of a checkpoint without its JSON: weights, moments, and the average of the weights, all float32.

    Args:
        shapes: name and shape of every parameter.
        config: the run.
    """
    num_parameters = sum(map(math.prod, shapes.values()))
    averages = 0 if config.train.ema is None else num_parameters
    return 4 * (num_parameters + num_moments(shapes, config.optimizer) + averages)


def index_content(shapes: dict[str, list[int]], parts: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Content of index.json; the fragments must cover every element of every tensor once.

    Args:
        shapes: full shape of each `parameter|key`.
        parts: fragments of each, with file, offset and length.
    """
    tensors = []
    for name in sorted(shapes):
        pieces = sorted(parts[name], key=lambda part: part["offset"])
        _check_cover(name, pieces, shapes[name])
        parameter, key = name.rsplit("|", 1)
        tensors.append({"name": parameter, "key": key, "shape": shapes[name], "fragments": pieces})
    return {"format_version": FORMAT_VERSION, "tensors": tensors}


def _check_cover(name: str, pieces: Iterable[dict[str, Any]], shape: list[int]) -> None:
    end, total = 0, 1
    for piece in pieces:
        assert piece["offset"] == end, f"{name}: fragments overlap or leave a gap at element {end}"
        end += piece["length"]
    for size in shape:
        total *= size
    assert end == total, f"{name}: fragments end at element {end} of {shape}"

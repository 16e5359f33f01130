"""A trained model on disk, in any of its three forms: a run folder, one of its checkpoints, an exported folder."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from colt5dist.errors import ConfigError
from colt5dist.storage.checkpoints import (
    AVERAGE,
    BEST,
    CHECKPOINTS,
    WEIGHT,
    FragmentReader,
    checkpoint_folders,
    find_checkpoints,
    folder_step,
    parameter_shapes_of,
    read_best,
    read_index,
    read_json,
    step_folder,
)
from colt5dist.storage.complete_file import COMPLETE, find_difference, read_complete, size_problem
from colt5dist.storage.exported import ExportedReader, is_exported, read_exported_config

CONFIG = "config.yaml"
"""The resolved configuration, in a run folder."""
VOCABULARY = Path("tokenizer", "vocabulary.json")
"""Which tokenizer it is, in a run folder and in an exported one; `colt5dist.data.model_tokenizer` writes it."""
WHAT_TO_NAME = "name a run folder, a checkpoint, or a folder that launch/export.py wrote"


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """Where a trained model is, and the settings it was trained with."""

    folder: Path
    """The checkpoint, or the exported folder."""
    root: Path
    """The folder with the tokenizer: that of the run, or the exported one."""
    settings: dict[str, Any]
    """`seed`, and the sections `model`, `data` and `train` as they were at this step."""
    step: int
    """Steps that it was trained for."""
    is_checkpoint: bool
    """Whether `folder` is a checkpoint."""
    shapes: dict[str, tuple[int, ...]]
    """Name and shape of every parameter."""
    is_average: bool = False
    """Whether the weights are the moving average of a checkpoint's (`train.ema`)."""

    def check_hashes(self) -> None:
        """Compare the files with their hashes, where the form has some: checkpoints do.

        Raises:
            ConfigError: a file is not what was written.
        """
        if not self.is_checkpoint:
            return
        try:
            damage = find_difference(self.folder, lambda number, name: True)
        except ValueError as error:
            raise ConfigError(f"{self.folder}: {error}; use another checkpoint") from None
        if damage:
            raise ConfigError(f"{self.folder}: {damage}; use another checkpoint")

    def fill(self, name: str, offset: int, target: torch.Tensor) -> None:
        """Fill a flat tensor, of any type, with the weights of a parameter from element `offset` on.

        One file is open meanwhile, so no more than one tensor of it is mapped into memory.

        Raises:
            ConfigError: there is no such parameter, or its file cannot be read.
        """
        if name not in self.shapes:
            raise ConfigError(f"{self.folder}: has no parameter {name}")
        key = AVERAGE if self.is_average else WEIGHT
        self._reader.fill(name, key, self.shapes[name], offset, target)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the stored weights."""
        return torch.float32 if self.is_checkpoint else ExportedReader(self.folder).dtype

    @property
    def token_ids(self) -> dict[str, int] | None:
        """`pad_id`, `start_id` and `eos_id` of its tokenizer; None where the folder does not hold the tokenizer.

        Raises:
            ConfigError: the file is damaged.
        """
        path = self.root / VOCABULARY
        if path.exists():
            content: Any = read_json(path, fix="copy the folder again")
        elif self.is_checkpoint or (content := read_exported_config(self.root).get("token_ids")) is None:
            return None
        try:
            return {name: int(content[name]) for name in ("pad_id", "start_id", "eos_id")}
        except (KeyError, TypeError, ValueError):
            raise ConfigError(f"{path}: is damaged; copy the folder again") from None

    @cached_property
    def _reader(self) -> FragmentReader | ExportedReader:
        if self.is_checkpoint:
            return FragmentReader(self.folder, read_index(self.folder), keep_open=False)
        return ExportedReader(self.folder)


def open_stored(path: str | Path, step: int | str | None = None, *, ema: bool = False) -> StoredModel:
    """Find a trained model.

    Args:
        path: a run folder (its newest whole checkpoint is taken), a checkpoint inside one, or an exported folder.
        step: of a run folder, the step of the checkpoint to take instead, or "best".
        ema: whether to take the moving average of its weights, which a checkpoint holds if `train.ema` was set.

    Raises:
        ConfigError: there is none, it is not whole, or it has no average.
    """
    path = Path(os.path.abspath(path))
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder; {WHAT_TO_NAME}")
    if is_exported(path):
        if ema:
            raise ConfigError(f"ema: {path} is an exported folder, which holds one kind of weights; leave it out")
        if step is not None:
            raise ConfigError(f"step: {step}, but {path} is an exported folder, which holds one step; leave it out")
        content = read_exported_config(path)
        return StoredModel(
            folder=path,
            root=path,
            settings=content["settings"],
            step=content["step"],
            is_checkpoint=False,
            shapes=ExportedReader(path).shapes(),
        )
    folder = _find_checkpoint(path, step)
    root = folder.parent.parent
    if ema and not any(key == AVERAGE for _, key in read_index(folder)):
        raise ConfigError(f"ema: {folder} holds no average of the weights; leave it out, or train with train.ema set")
    found = read_complete(folder).step
    return StoredModel(
        folder=folder,
        root=root,
        settings=settings_at(_read_run_config(root / CONFIG), found),
        step=found,
        is_checkpoint=True,
        shapes=parameter_shapes_of(folder),
        is_average=ema,
    )


def tokenizer_fingerprint_of(root: Path) -> str:
    """Fingerprint of the tokenizer of a run folder or an exported folder; empty where the folder does not hold it.

    Raises:
        ConfigError: the file is damaged.
    """
    path = root / VOCABULARY
    return str(read_json(path, fix="copy the folder again").get("fingerprint", "")) if path.exists() else ""


def settings_at(config: dict[str, Any], step: int) -> dict[str, Any]:
    """The settings that hold at a step: of `data.length_schedule`, those of the last entry that had begun.

    Args:
        config: a run's whole configuration.
        step: number of the step.

    Returns:
        `seed`, and the sections `model`, `data` and `train`.
    """
    model, data, train = dict(config["model"]), dict(config["data"]), dict(config["train"])
    begun = [entry for entry in data.pop("length_schedule", []) if entry["step"] <= step]
    for section, key in (
        (data, "input_length"),
        (data, "target_length"),
        (train, "micro_batch_size"),
        (model, "num_heavy_tokens"),
    ):
        if begun and begun[-1].get(key):
            section[key] = begun[-1][key]
    return {"seed": config.get("seed", 0), "model": model, "data": data, "train": train}


def _find_checkpoint(path: Path, step: int | str | None) -> Path:
    """The checkpoint that a path and a step name; it has all its files, with their sizes."""
    if (path / COMPLETE).exists():
        problem = size_problem(path)
        if problem:
            raise ConfigError(f"{path}: {problem}; use another checkpoint")
        if step is not None and read_complete(path).step != step:
            raise ConfigError(f"step: {step}, but {path} is of step {read_complete(path).step}; leave it out")
        return path
    root = next((folder for folder in (path / CHECKPOINTS, path) if checkpoint_folders(folder)), None)
    if root is None:
        what = "no checkpoint in it yet" if (path / CONFIG).exists() else "holds no trained model"
        raise ConfigError(f"{path}: {what}; {WHAT_TO_NAME}")
    whole, others = find_checkpoints(root)
    if step == "best":
        best = read_best(root)
        if best is None:
            raise ConfigError(f"step: best, but {root} has no {BEST}; a run with checkpoint.keep_best writes it")
        step = int(best["step"])
    if step is not None:
        assert isinstance(step, int)
        folder = step_folder(root, step)
        if folder in whole:
            return folder
        there = ", ".join(str(folder_step(found)) for found in whole) or "none"
        problem = size_problem(folder) if folder in others else f"whole ones: {there}"
        raise ConfigError(f"step: {step}: no whole checkpoint in {root} ({problem})")
    if not whole:
        reasons = "; ".join(f"{folder.name}: {size_problem(folder)}" for folder in others)
        raise ConfigError(f"{path}: no whole checkpoint in it ({reasons}); {WHAT_TO_NAME}")
    return whole[-1]


def _read_run_config(path: Path) -> dict[str, Any]:
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError:
        raise ConfigError(f"{path}: is missing; a checkpoint is read where its run folder is") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path}: cannot be read ({reason}); copy the run folder again") from None
    sections = ("model", "data", "train")
    if not isinstance(content, dict) or not all(isinstance(content.get(name), dict) for name in sections):
        raise ConfigError(f"{path}: is not the configuration of a run; copy the run folder again")
    return {str(key): value for key, value in content.items()}

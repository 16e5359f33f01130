"""The weights and the configuration of an exported folder: config.json, and safetensors in one file or in several."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from colt5dist.errors import ConfigError
from colt5dist.files import write_whole
from colt5dist.storage.checkpoints import read_json

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
WEIGHTS_INDEX_NAME = "model.safetensors.index.json"
SECTION = "colt5dist"
"""Key of config.json below which stands what colt5dist reads; the other keys are for other tools."""
FORMAT_VERSION = 1
FILE_BYTES = 5_000_000_000
"""Largest size of a weights file."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types of weights, by their names in safetensors."""
FIX = "export the model again"


def is_exported(path: Path) -> bool:
    """Whether a folder has a config.json, as exported models do."""
    return (path / CONFIG_NAME).is_file()


def read_exported_config(path: Path) -> dict[str, Any]:
    """Read the section of config.json that colt5dist wrote: settings, step and versions.

    Raises:
        ConfigError: it is missing or damaged, or of another version.
    """
    section = read_json(path / CONFIG_NAME, fix=FIX).get(SECTION)
    if not isinstance(section, dict):
        raise ConfigError(
            f"{path / CONFIG_NAME}: is not a model of colt5dist; name a folder that launch/export.py wrote"
        )
    if section.get("format_version") != FORMAT_VERSION:
        raise ConfigError(
            f"{path / CONFIG_NAME}: has format {section.get('format_version')}, this version reads {FORMAT_VERSION}; "
            "load it with the version that wrote it"
        )
    settings = section.get("settings")
    if not isinstance(settings, dict) or not isinstance(settings.get("model"), dict) or "step" not in section:
        raise ConfigError(f"{path / CONFIG_NAME}: is damaged; {FIX}")
    return section


class ExportedReader:
    """Reads slices of the weights of an exported folder.

    Args:
        folder: the folder.

    Raises:
        ConfigError: the weights are missing, or their index is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = [WEIGHTS_NAME]
        if not (folder / WEIGHTS_NAME).exists():
            index = read_json(folder / WEIGHTS_INDEX_NAME, fix=FIX).get("weight_map")
            if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
                raise ConfigError(f"{folder / WEIGHTS_INDEX_NAME}: is damaged; {FIX}")
            names = sorted(set(index.values()))
            for name in names:
                if Path(name).name != name:
                    raise ConfigError(f"{folder / WEIGHTS_INDEX_NAME}: names a file outside the folder: {name}; {FIX}")
        self._file_of: dict[str, Path] = {}
        self._dtype = ""
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name in names:
            path = folder / name
            try:
                with safe_open(path, framework="pt") as file:
                    for key in file.keys():  # noqa: SIM118 (not a dict)
                        self._file_of[key] = path
                        self._shapes[key] = tuple(file.get_slice(key).get_shape())
                        self._dtype = str(file.get_slice(key).get_dtype())
            except (SafetensorError, OSError) as error:
                raise ConfigError(f"{path}: cannot be read ({error}); {FIX}") from None

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        if self._dtype not in DTYPES:
            raise ConfigError(f"{self.folder}: its weights are {self._dtype}; use one of {', '.join(DTYPES)}")
        return DTYPES[self._dtype]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter."""
        return dict(self._shapes)

    def fill(self, name: str, key: str, shape: tuple[int, ...], offset: int, target: torch.Tensor) -> None:
        """Fill a tensor with consecutive elements of a stored one.

        Args:
            name: name of the parameter.
            key: not used: an exported folder holds weights only.
            shape: shape that the parameter must have.
            offset: first element to read, counted in the flattened parameter.
            target: flat, of any type; as many elements are read as it has.

        Raises:
            ConfigError: there is no such parameter, or its file cannot be read.
        """
        if self._shapes.get(name) != shape:
            raise ConfigError(f"{self.folder}: parameter {name} with shape {list(shape)} is missing; {FIX}")
        path = self._file_of[name]
        try:
            with safe_open(path, framework="pt") as file:
                target.copy_(file.get_tensor(name).flatten()[offset : offset + target.numel()])
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path}: cannot be read ({error}); {FIX}") from None


def write_weights(folder: Path, weights: dict[str, torch.Tensor], *, file_bytes: int | None = None) -> None:
    """Write weights as model.safetensors, or as several files with an index where one would be too large.

    Args:
        folder: an existing folder.
        weights: parameters by their names, on any device.
        file_bytes: largest size of a file; None: FILE_BYTES.

    Raises:
        OSError: they cannot be written.
    """
    files = list(_cut(weights, file_bytes or FILE_BYTES))
    names = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    if len(files) == 1:
        names = [WEIGHTS_NAME]
    for name, part in zip(names, files, strict=True):
        tensors = {key: weights[key].detach().cpu().contiguous() for key in part}
        try:
            (folder / name).touch()
            mode = (folder / name).stat().st_mode
            save_file(tensors, folder / name, metadata={"format": "pt"})
            (folder / name).chmod(mode)  # the library writes a file that only its owner reads
        except SafetensorError as error:
            raise OSError(None, str(error), str(folder / name)) from None
    if len(files) > 1:
        total = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
        weight_map = {key: name for name, part in zip(names, files, strict=True) for key in part}
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_whole(folder / WEIGHTS_INDEX_NAME, (json.dumps(content, indent=2) + "\n").encode())


def _cut(weights: dict[str, torch.Tensor], file_bytes: int) -> Iterator[list[str]]:
    """Names of the parameters of each file, in their order."""
    part: list[str] = []
    size = 0
    for name, tensor in weights.items():
        num_bytes = tensor.numel() * tensor.element_size()
        if part and size + num_bytes > file_bytes:
            yield part
            part, size = [], 0
        part.append(name)
        size += num_bytes
    yield part

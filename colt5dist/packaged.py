"""What is installed with the package beside its modules: the scripts of launch/ and the files of configs/.

In a checkout, `colt5dist/launch` and `colt5dist/configs` are links to the folders beside the package.
"""

import os
from pathlib import Path


def _folder(name: str) -> Path:
    """A folder of the package, or, where a copy of the checkout has lost its links, the one beside it."""
    inside = Path(__file__).parent / name
    return (inside if inside.is_dir() else inside.parents[1] / name).resolve()


SCRIPTS = _folder("launch")
"""Folder of the commands, one file each: `colt5dist-pretrain` is `pretrain.py`."""
CONFIGS = _folder("configs")
"""Folder of the configurations."""


def command_files() -> list[Path]:
    """Files of the commands, in the order of their names."""
    return sorted(path for path in SCRIPTS.glob("*.py") if not path.name.startswith("_"))


def job_files() -> list[Path]:
    """Job scripts for schedulers, to be copied and edited, in the order of their names."""
    return sorted(SCRIPTS.glob("[!_]*/pretrain.*"))  # none of __pycache__


def pretrain_target() -> str:
    """Return what `deepspeed` is told to start: the script in a checkout, else the module."""
    is_checkout = SCRIPTS.parent != Path(__file__).resolve().parent
    return "launch/pretrain.py" if is_checkout else "--module colt5dist.launch.pretrain"


def config_names() -> list[str]:
    """Names of the configurations that come with the package, without their ending."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def packaged_config(path: Path) -> Path | None:
    """Return the configuration with this name that comes with the package.

    Args:
        path: `base.yaml`, `base` or `configs/base.yaml`; also `model/base.yaml`, a piece that others include.

    Returns:
        The file, or None if there is none of that name.
    """
    inner = Path(*path.parts[1:]) if path.parts[:1] == ("configs",) else path
    if inner.is_absolute() or ".." in inner.parts or inner == Path():
        return None
    places = (CONFIGS / inner, CONFIGS / f"{inner}.yaml")
    return next((place for place in places if os.path.isfile(place)), None)


def find_config(name: str | Path) -> Path:
    """Find the file of a configuration.

    Args:
        name: path of a YAML file. Where it leads to no file, it may name one that comes with the package
            (`packaged_config`), unless it begins with `/`, `.` or `~`.

    Returns:
        The file; the path as it was given if there is none.
    """
    path = Path(name).expanduser()
    if os.path.exists(path) and not os.path.isdir(path):
        return path
    return (None if os.fspath(name).startswith(("/", ".", "~")) else packaged_config(path)) or path

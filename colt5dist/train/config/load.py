"""Reads a `RunConfig`: dataclass defaults <- YAML file <- `key=value` arguments; reports all problems at once.

A YAML file may include other files, named relative to itself: `include: {model: model/base.yaml}` puts the fields of
that file into the section `model`.
"""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from colt5dist.errors import ConfigError
from colt5dist.train.config.schema import RunConfig
from colt5dist.train.config.text import keep_texts

FREE_SECTIONS = ("deepspeed",)
"""Sections whose keys are not fields of `RunConfig`."""
ALLOW_FROM_ZERO = "from_zero"
"""The entry of `resume_allow` that is not a key: start at step 0 although there are checkpoints, none of them whole."""


def load_config(path: str | Path, overrides: list[str]) -> RunConfig:
    """Read and check a configuration.

    Args:
        path: YAML file.
        overrides: `key=value` arguments; of a repeated key the last one counts.

    Returns:
        The configuration, with `run_dir` set.

    Raises:
        ConfigError: one line per problem: unknown key, wrong type or value, keys that contradict each other.
    """
    problems: list[str] = []
    tree = OmegaConf.structured(RunConfig)
    known = [name for name, _ in _values(OmegaConf.to_container(tree), "")]
    settings = _read_yaml(Path(path))
    for text in overrides:
        key, separator, typed = text.partition("=")
        if not separator or not key:
            problems.append(f"{text}: not of the form key=value; write for instance train.steps=100")
            continue
        if text == "run_dir=":  # an empty shell variable, for instance; as YAML it would be null
            problems.append("run_dir: is empty; give a folder, or null for runs/<name of the config file>")
            continue
        try:
            node = OmegaConf.from_dotlist([text])
        except (OmegaConfBaseException, yaml.YAMLError, UnicodeError):
            problems.append(f"{key}: the value in {text!r} is not readable as YAML; quote it")
            continue
        for k, v in _values(OmegaConf.to_container(node), ""):
            settings.append((k, keep_texts(k, v, typed) if k == key else v, "command line"))
    for key, value, origin in settings:
        problem = _apply(tree, known, key, value)
        if problem:
            problems.append(f"{problem} ({origin})")
    try:
        config = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        problems.append(f"{error.full_key}: {_first_line(error)}; give a value that can be resolved")
        raise ConfigError("\n".join(problems)) from None
    assert isinstance(config, RunConfig)
    if not problems:
        problems = config.problems()
        problems += [
            f"resume_allow: no such key {key}; {_did_you_mean(key, known)}"
            for key in config.resume_allow
            if key not in known and key != ALLOW_FROM_ZERO and key.split(".")[0] not in FREE_SECTIONS
        ]
    if problems:
        raise ConfigError("\n".join(problems))
    if config.run_dir is None:
        config.run_dir = str(Path("runs") / Path(path).stem)
    return config


def config_to_yaml(config: RunConfig) -> str:
    """Write the resolved configuration as YAML, with every key."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def config_leaves(config: RunConfig) -> dict[str, Any]:
    """Return every setting by its dotted key; a free section counts as one value."""
    container = OmegaConf.to_container(OmegaConf.structured(config), resolve=True)
    return dict(_values(container, ""))


def saved_leaves(path: Path) -> dict[str, Any]:
    """Read the settings of a `config.yaml` that a run has written, by dotted key.

    Raises:
        ConfigError: it cannot be read.
    """
    return dict(_values(_load_mapping(path), ""))


def _read_yaml(path: Path) -> list[tuple[str, Any, str]]:
    """Read the settings of a file and of the files that it includes: key, value, and the file with the setting."""
    content = _load_mapping(path)
    pieces = content.pop("include", {})
    if not isinstance(pieces, dict):
        raise ConfigError(f"{path}: include must map sections to files; write include: {{model: model/base.yaml}}")
    settings: list[tuple[str, Any, str]] = []
    for section, name in pieces.items():
        if not isinstance(name, str):
            raise ConfigError(f"{path}: include.{section}: {name!r} is not the name of a file; write a path")
        piece = path.parent / name
        values = _values(_load_mapping(piece, section), "")
        settings.extend((f"{section}.{key}", value, str(piece)) for key, value in values)
    settings.extend((key, value, str(path)) for key, value in _values(content, ""))
    return settings


def _load_mapping(path: Path, section: str = "") -> dict[str, Any]:
    """A YAML file's keys and values; section: the one that the file fills."""
    try:
        content = keep_texts(section, OmegaConf.to_container(OmegaConf.load(path)), path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file; name one that exists") from None
    except (IsADirectoryError, PermissionError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a configuration file ({error}); name a YAML file") from None
    except (yaml.YAMLError, OmegaConfBaseException, OSError) as error:
        raise ConfigError(f"{path}: not valid YAML ({_first_line(error)}); fix the file") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: is not a mapping of keys to values; start from a file in configs/")
    return {str(key): value for key, value in content.items()}


def _apply(tree: DictConfig, known: list[str], key: str, value: Any) -> str | None:
    """Set one key; returns what is wrong, if anything."""
    section = key.split(".")[0]
    if value == "???":
        return f"{key}: has no value; give one"
    if key not in known and section not in FREE_SECTIONS:
        inside = [name for name in known if name.startswith(f"{key}.")]
        if inside:
            return f"{key}: is a section, not a value; set for instance {inside[0]}"
        return f"{key}: no such key; {_did_you_mean(key, known)}"
    try:
        OmegaConf.update(tree, key, value, merge=True, force_add=section in FREE_SECTIONS)
    except OmegaConfBaseException as error:
        return f"{key}: {_first_line(error)}; see the field of that name in --print-config"
    return None


def _did_you_mean(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not near:
        last = {name.rsplit(".", 1)[-1]: name for name in known}
        near = [last[n] for n in difflib.get_close_matches(key.rsplit(".", 1)[-1], last, n=1, cutoff=0.5)]
    return f"did you mean {near[0]}?" if near else "--print-config lists all keys"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")


def _values(content: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings as (dotted key, value); a free section is one leaf."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value and name not in FREE_SECTIONS:
            yield from _values(value, f"{name}.")
        else:
            yield name, value

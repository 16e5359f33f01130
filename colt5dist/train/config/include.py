"""Reads a YAML file of settings, with the files that it includes.

A file may build on others, named relative to itself:

- `include: tiny.yaml`, or a list of files: whole configurations, whose settings come first;
- `include: {model: model/base.yaml}`: files with the fields of a section.

What a file sets itself wins over what it includes; of several included files the later one wins.

Beside a file that has no folder `configs`, `include: configs/base.yaml` is the one that comes with the package.
"""

import difflib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from colt5dist.errors import ConfigError
from colt5dist.packaged import config_names, packaged_config
from colt5dist.train.config.text import NULL_TAG, keep_texts, odd_numbers, parse
from colt5dist.wording import looked_for

FREE_SECTIONS = ("deepspeed",)
"""Sections whose keys are not fields of `RunConfig`."""

Setting = tuple[str, Any, str]
"""Dotted key, value, and the file that has it."""


def read_settings(path: Path) -> list[Setting]:
    """Read the settings of a file and of what it includes; of a repeated key the last one counts.

    Args:
        path: the YAML file.

    Raises:
        ConfigError: a file is missing or cannot be read; the message names it and the file that includes it.
    """
    return list(_read(path, "", ()))


def _read(path: Path, section: str, includers: tuple[Path, ...]) -> Iterator[Setting]:
    """The settings of a file; section: the one that the file fills; includers: the files that led here."""
    content = load_mapping(path, section)
    for inner, name in _included(path, content.pop("include", None)):
        key = f"include.{inner}" if inner else "include"
        piece = path.parent / Path(name).expanduser()
        if name.startswith("configs/") and not os.path.exists(piece):  # as beside a checkout's folder
            piece = packaged_config(Path(name)) or piece
        chain = (*includers, path)
        if piece.resolve() in {file.resolve() for file in chain}:
            names = " includes ".join(str(file) for file in (*chain, piece))
            raise ConfigError(f"{path}: {key}: goes round in a circle ({names}); leave one of them out")
        if not piece.exists():
            raise ConfigError(f"{path}: {key}: {name} is missing; looked for {piece.absolute()}, {_advice(piece)}")
        yield from _read(piece, ".".join(filter(None, (section, inner))), chain)
    prefix = f"{section}." if section else ""
    yield from ((f"{prefix}{key}", value, str(path)) for key, value in flat(content, prefix))


def _included(path: Path, include: Any) -> Iterator[tuple[str, str]]:
    """Pairs (section, file); the section of a whole configuration is empty."""
    entries = include if isinstance(include, list) else [] if include is None else [include]
    for entry in entries:
        for section, name in entry.items() if isinstance(entry, dict) else [("", entry)]:
            if not isinstance(name, str):
                where = f"include.{section}" if section else "include"
                raise ConfigError(
                    f"{path}: {where}: {name!r} is not the name of a file; write include: tiny.yaml, or include: "
                    "{model: model/base.yaml}"
                )
            yield str(section), name


def _advice(missing: Path) -> str:
    """Where names are looked for, and the nearest name that is there."""
    names = sorted(file.name for file in missing.parent.glob("*.yaml")) if missing.parent.is_dir() else []
    near = difflib.get_close_matches(missing.name, names, n=1, cutoff=0.5)
    start = "because a name starts at the folder of the file that includes it"
    return f"{start}; did you mean {near[0]}?" if near else f"{start}; give a file that is there"


def load_mapping(path: Path, section: str = "") -> dict[str, Any]:
    """Read a YAML file's keys and values.

    Args:
        path: the file.
        section: the section of the configuration that the file fills; empty for a whole one.

    Raises:
        ConfigError: it cannot be read, is empty, or is not a mapping; YAML's errors have their line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        fix = f"name one that exists, or one that comes with the package: {', '.join(config_names())}"
        raise ConfigError(f"{path}: no such configuration file{looked_for(path)}; {fix}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a configuration file ({error}); name a YAML file") from None
    try:
        content = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        what = error.problem or error.context
        if what and what.startswith("found duplicate key"):
            key = what.removeprefix("found duplicate key").strip()
            raise ConfigError(f"{path}{line}: the key {key} is there a second time; keep one of them") from None
        raise ConfigError(f"{path}{line}: not valid YAML ({what}); fix the file") from None
    except yaml.reader.ReaderError as error:
        number = text.count("\n", 0, error.position) + 1
        what = f"the character U+{error.character:04X} is not allowed" if isinstance(error.character, int) else "bytes"
        raise ConfigError(f"{path}:{number}: not valid YAML ({what}); remove it") from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ConfigError(f"{path}: not valid YAML ({reason}); fix the file") from None
    except OSError:
        content = None  # neither a mapping nor a list
    root = parse(text)
    if root is None or root.tag == NULL_TAG:
        raise ConfigError(f"{path}: is empty; write settings into it, or start from a file in configs/")
    if not isinstance(root, yaml.MappingNode) or not isinstance(content, dict):
        raise ConfigError(f"{path}: is not a mapping of keys to values; start from a file in configs/")
    if odd := odd_numbers(section, text):
        raise ConfigError("\n".join(f"{path}:{line}: {problem}" for problem, line in odd))
    return {str(key): value for key, value in keep_texts(section, content, text).items()}


def flat(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings as (dotted key, value); a free section is one leaf.

    Args:
        content: the mapping.
        prefix: what leads to it in the whole configuration; it is not part of the keys that are returned.
    """
    for key, value in content.items():
        if isinstance(value, dict) and value and f"{prefix}{key}" not in FREE_SECTIONS:
            yield from ((f"{key}.{inner}", leaf) for inner, leaf in flat(value, f"{prefix}{key}."))
        else:
            yield str(key), value

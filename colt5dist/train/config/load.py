"""Reads a `RunConfig`: dataclass defaults <- YAML file <- `key=value` arguments; reports all problems at once.

What a YAML file includes is read by `include.py`.
"""

import difflib
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from colt5dist.errors import ConfigError
from colt5dist.packaged import find_config
from colt5dist.train.config.include import FREE_SECTIONS, flat, load_mapping, read_settings
from colt5dist.train.config.schema import RunConfig
from colt5dist.train.config.text import TEXT_KEYS, expand_home, keep_texts, odd_numbers, typed_text

ALLOW_FROM_ZERO = "from_zero"
"""The entry of `resume_allow` that is not a key: start at step 0 although there are checkpoints, none of them whole."""

LIST_FORMS = {
    "data.sources": "[{shards: FOLDER, weight: 2.0}]",
    "data.validation": "[{name: NAME, shards: FOLDER}]",
    "data.length_schedule": "[{step: 1000, input_length: 8192}]",
}
"""How the keys are written that take a list of sections."""


def load_config(path: str | Path, overrides: list[str]) -> RunConfig:
    """Read and check a configuration.

    Args:
        path: YAML file, or the name of one that comes with the package (`find_config`).
        overrides: `key=value` arguments; of a repeated key the last one counts.

    Returns:
        The configuration, with `run_dir` set.

    Raises:
        ConfigError: one line per problem: unknown key, wrong type or value, keys that contradict each other.
    """
    problems: list[str] = []
    tree = OmegaConf.structured(RunConfig)
    known = [name for name, _ in flat(OmegaConf.to_container(tree), "")]
    path = find_config(path)
    settings = read_settings(path)
    for text in overrides:
        key, separator, typed = text.partition("=")
        if not separator or not key:
            problems.append(f"{text}: not of the form key=value; write for instance train.steps=100")
            continue
        if text == "run_dir=":  # an empty shell variable, for instance; as YAML it would be null
            problems.append("run_dir: is empty; give a folder, or null for runs/<name of the config file>")
            continue
        if key in TEXT_KEYS:
            settings.append((key, typed_text(typed), "command line"))
            continue
        try:
            node = OmegaConf.from_dotlist([text])
        except (OmegaConfBaseException, yaml.YAMLError, UnicodeError):
            problems.append(f"{key}: the value in {text!r} is not readable as YAML; quote it")
            continue
        odd = [f"{problem} (command line)" for problem, _ in odd_numbers(key, typed)]
        problems += odd
        for k, v in flat(OmegaConf.to_container(node), "") if not odd else ():
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
    expand_home(config)
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
        config.run_dir = str(Path("runs") / path.stem)
    return config


def config_to_yaml(config: RunConfig) -> str:
    """Write the resolved configuration as YAML, with every key; a `${` in a text is written so that it stays one."""
    return OmegaConf.to_yaml(OmegaConf.create(_change_texts(asdict(config), _escape)))


def config_leaves(config: RunConfig) -> dict[str, Any]:
    """Return every setting by its dotted key; a free section counts as one value."""
    return dict(flat(asdict(config)))


def saved_leaves(path: Path) -> dict[str, Any]:
    """Read the settings of a `config.yaml` that a run has written, by dotted key.

    Raises:
        ConfigError: it cannot be read.
    """
    return dict(flat(_change_texts(load_mapping(path), _unescape)))


def _change_texts(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {key: _change_texts(child, change) for key, child in value.items()}
    if isinstance(value, list):
        return [_change_texts(child, change) for child in value]
    return change(value) if isinstance(value, str) else value


def _escape(text: str) -> str:
    """Write a text so that OmegaConf finds no interpolation in it: a backslash before `${`, others there doubled."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def _unescape(text: str) -> str:
    return re.sub(r"(\\*)\\\$\{", lambda found: f"{found[1][: len(found[1]) // 2]}${{", text)


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
    takes_bool = key in known and isinstance(OmegaConf.select(tree, key), bool)
    if takes_bool and isinstance(value, (int, float)) and value not in (0, 1):
        return f"{key}: {value} is neither true nor false; give one of them"
    try:
        OmegaConf.update(tree, key, value, merge=True, force_add=section in FREE_SECTIONS)
    except OmegaConfBaseException as error:
        if key not in LIST_FORMS:
            return f"{key}: {_first_line(error)}; see the field of that name in --print-config"
        is_list = isinstance(value, list) and all(isinstance(entry, dict) for entry in value)
        return f"{key}: {_first_line(error) if is_list else 'no list of sections'}; write it like {LIST_FORMS[key]}"
    return None


def _did_you_mean(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not near:
        last = {name.rsplit(".", 1)[-1]: name for name in known}
        near = [last[n] for n in difflib.get_close_matches(key.rsplit(".", 1)[-1], last, n=1, cutoff=0.7)]
    return f"did you mean {near[0]}?" if near else "--print-config lists all keys"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")

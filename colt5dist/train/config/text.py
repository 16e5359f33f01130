"""What is typed for a text key is that text: YAML would read 1_000, 1.10, 007, 1e3, yes or 12:30 as something else."""

import os
from dataclasses import fields, is_dataclass
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from colt5dist.train.config.schema import RunConfig

PATHS = ("run_dir", "init_from", "data.shards", "data.sources[].shards")
"""Text keys that name a file or folder: a leading ~ is the home folder."""
NULL_TAG = "tag:yaml.org,2002:null"


def text_keys(section: Any = RunConfig, prefix: str = "") -> set[str]:
    """Dotted keys of `RunConfig` whose values are texts; `[]` stands for the entries of a list."""
    found = set()
    hints = get_type_hints(section)
    for field in fields(section):
        found |= _text_keys_of(hints[field.name], f"{prefix}{field.name}")
    return found


def _text_keys_of(hint: Any, key: str) -> set[str]:
    if is_dataclass(hint):
        return text_keys(hint, f"{key}.")
    if get_origin(hint) is list:
        return _text_keys_of(get_args(hint)[0], f"{key}[]")
    options = get_args(hint) if get_origin(hint) is Literal else [o for o in get_args(hint) or [hint] if o != NoneType]
    is_text = all(option is str or isinstance(option, str) for option in options)
    return {key} if is_text else set()


TEXT_KEYS = frozenset(text_keys())


def keep_texts(key: str, value: Any, source: str) -> Any:
    """Replace what YAML made of the texts in a value by what was typed.

    Args:
        key: dotted key of the value; empty for a whole file.
        value: what YAML made of `source`; its mappings and lists are changed in place.
        source: the YAML text.

    Returns:
        The value.
    """
    try:
        node = yaml.compose(source, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return value  # which has been reported where it was read
    return _restore(key, value, node)


def _restore(key: str, value: Any, node: yaml.Node | None) -> Any:
    if isinstance(node, yaml.ScalarNode) and key in TEXT_KEYS and node.tag != NULL_TAG:
        text = node.value
        return os.path.expanduser(text) if key in PATHS else text
    if isinstance(node, yaml.MappingNode) and isinstance(value, dict):
        inside = {name.value: child for name, child in node.value}
        for name in value:
            dotted = f"{key}.{name}" if key else str(name)
            value[name] = _restore(dotted, value[name], inside.get(str(name)))
    if isinstance(node, yaml.SequenceNode) and isinstance(value, list):
        for number, child in enumerate(node.value):
            value[number] = _restore(f"{key}[]", value[number], child)
    return value

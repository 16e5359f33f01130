"""What is typed counts: a text stays that text, where YAML would read 1_000, 1.10, 007, 1e3, yes or 12:30 otherwise.

A number that YAML would read in base 8 or 60 is refused.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from colt5dist.train.config.schema import RunConfig

NULL_TAG = "tag:yaml.org,2002:null"
OCTAL = re.compile(r"[-+]?0[0-7_]+")
"""Numbers that YAML reads in base 8."""
SEXAGESIMAL = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
"""Numbers that YAML reads in base 60."""


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
    return _restore(key, value, parse(source))


def parse(source: str) -> yaml.Node | None:
    """Read a YAML text as nodes, which know how each value was typed; None if it holds nothing, or is not YAML.

    What is merged into a mapping (`<<: *name`) is in the mapping.
    """
    try:
        node = yaml.compose(source, Loader=yaml.SafeLoader)
        _flatten(node)
    except yaml.YAMLError:
        return None  # which is reported where it is read
    return node


def _flatten(node: yaml.Node | None) -> None:
    if isinstance(node, yaml.MappingNode):
        yaml.constructor.SafeConstructor().flatten_mapping(node)
    for child in _children(node):
        _flatten(child)


def _children(node: yaml.Node | None) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [child for _, child in node.value]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def typed_text(typed: str) -> str | None:
    """Return the value of a text key on the command line: what was typed, also `a #b`, `a: b` or `[a]`.

    Args:
        typed: what follows the equals sign. Quotes around it are left out; null and nothing at all are None.
    """
    if typed.lower() in ("", "null"):
        return None
    node = parse(typed) if typed[0] == typed[-1] and typed[0] in "\"'" else None
    return node.value if isinstance(node, yaml.ScalarNode) else typed


def odd_numbers(key: str, source: str) -> list[tuple[str, int]]:
    """Find numbers of which YAML would make another number than the one that is typed.

    Args:
        key: dotted key of the value; empty for a whole file.
        source: the YAML text.

    Returns:
        What is wrong, and the line in `source`, for each.
    """
    return list(_odd_numbers(key, parse(source)))


def _odd_numbers(key: str, node: yaml.Node | None) -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.ScalarNode) and key not in TEXT_KEYS and node.style is None:
        base = 8 if OCTAL.fullmatch(node.value) else 60 if SEXAGESIMAL.fullmatch(node.value) else None
        if base:
            yield (
                f"{key.replace('[]', '')}: YAML reads {node.value} as a number in base {base}; write it in base 10",
                node.start_mark.line + 1,
            )
    if isinstance(node, yaml.MappingNode):
        for name, child in node.value:
            yield from _odd_numbers(f"{key}.{name.value}" if key else str(name.value), child)
    elif isinstance(node, yaml.SequenceNode):
        for child in node.value:
            yield from _odd_numbers(f"{key}[]", child)


def expand_home(config: RunConfig) -> None:
    """Replace a leading ~ in the paths of a configuration by the home folder, after interpolations are resolved."""
    for key in ("run_dir", "init_from"):
        if path := getattr(config, key):
            setattr(config, key, os.path.expanduser(path))
    config.data.shards = os.path.expanduser(config.data.shards)
    for source in config.data.sources:
        source.shards = os.path.expanduser(source.shards)
    for entry in config.data.validation:
        entry.shards = os.path.expanduser(entry.shards)


def _restore(key: str, value: Any, node: yaml.Node | None) -> Any:
    if isinstance(node, yaml.ScalarNode) and key in TEXT_KEYS and node.tag != NULL_TAG:
        return node.value
    if isinstance(node, yaml.MappingNode) and isinstance(value, dict):
        inside = {name.value: child for name, child in node.value}
        for name in value:
            dotted = f"{key}.{name}" if key else str(name)
            value[name] = _restore(dotted, value[name], inside.get(str(name)))
    if isinstance(node, yaml.SequenceNode) and isinstance(value, list):
        for number, child in enumerate(node.value):
            value[number] = _restore(f"{key}[]", value[number], child)
    return value

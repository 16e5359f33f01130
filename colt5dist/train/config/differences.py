"""Which settings of two configurations must be alike: those that do not carry a mark of colt5dist/marks.py."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from colt5dist.marks import is_marked
from colt5dist.train.config.deepspeed_sections import keeps_result_in_deepspeed
from colt5dist.train.config.load import FREE_SECTIONS
from colt5dist.train.config.schema import RunConfig


@cache
def marked_keys(mark: str) -> frozenset[str]:
    """Return the dotted keys of `RunConfig` that carry a mark; `[]` stands for the entries of a list.

    Args:
        mark: KEEPS_RESULT or OF_A_HOST.
    """
    return frozenset(_marked_keys(RunConfig, "", mark))


def _marked_keys(section: Any, prefix: str, mark: str) -> Iterator[str]:
    hints = get_type_hints(section)
    for key in fields(section):
        name, hint = f"{prefix}{key.name}", hints[key.name]
        if is_marked(key, mark):
            yield name
        if get_origin(hint) is list:
            name, hint = f"{name}[]", get_args(hint)[0]
        if is_dataclass(hint):
            yield from _marked_keys(hint, f"{name}.", mark)


def settings_that_must_be_alike(leaves: Mapping[str, Any], mark: str) -> dict[str, Any]:
    """Leave out the settings that carry a mark.

    Args:
        leaves: settings by dotted key, with a free section as one value, as `config_leaves` returns them.
        mark: KEEPS_RESULT between the starts of a run, OF_A_HOST between its ranks.

    Returns:
        The others by dotted key, a free section by each of its own.
    """
    found: dict[str, Any] = {}
    for key, value in leaves.items():
        if key in FREE_SECTIONS:
            found.update(_values_of_free_section(value or {}, key, mark))
        elif key not in marked_keys(mark):
            found[key] = _without_marked(value, key, mark)
    return found


def _without_marked(value: Any, key: str, mark: str) -> Any:
    """A value whose mappings have lost their marked keys; they are the entries of lists."""
    if isinstance(value, list):
        return [_without_marked(entry, f"{key}[]", mark) for entry in value]
    if isinstance(value, dict):
        dotted = {name: f"{key}.{name}" for name in value}
        marked = marked_keys(mark)
        return {n: _without_marked(v, dotted[n], mark) for n, v in value.items() if dotted[n] not in marked}
    return value


def _values_of_free_section(section: Mapping[Any, Any], prefix: str, mark: str) -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        key = f"{prefix}.{name}"
        if isinstance(value, dict):
            yield from _values_of_free_section(value, key, mark)
        elif mark != "keeps_result" or not keeps_result_in_deepspeed(key):
            yield key, value

"""Marks at the fields of the configuration: what a setting decides.

A field without a mark changes the result of a run: its losses and weights. A resumed run may not change it, and all
ranks must have the same value. `keeps_result` marks a field that only decides how fast, how often or where something
is done, or how a new model starts: a resumed run may change it. `of_a_host` marks one that may moreover differ from
host to host.
"""

from dataclasses import Field, field
from typing import Any

KEEPS_RESULT = "keeps_result"
OF_A_HOST = "of_a_host"


def keeps_result(default: Any = None, *, factory: Any = None) -> Any:
    """Return a dataclass field that a resumed run may change, because the result of the run does not depend on it.

    Args:
        default: its default.
        factory: makes the default instead, where it can be changed in place.
    """
    return _marked(default, factory, {KEEPS_RESULT: True})


def of_a_host(default: Any = None, *, factory: Any = None) -> Any:
    """Return a dataclass field that also hosts of one run may have different values of.

    Args:
        default: its default.
        factory: makes the default instead, where it can be changed in place.
    """
    return _marked(default, factory, {KEEPS_RESULT: True, OF_A_HOST: True})


def is_marked(key: Field, mark: str) -> bool:
    """Whether a dataclass field carries KEEPS_RESULT or OF_A_HOST."""
    return bool(key.metadata.get(mark))


def _marked(default: Any, factory: Any, marks: dict[str, bool]) -> Any:
    return field(default=default, metadata=marks) if factory is None else field(default_factory=factory, metadata=marks)

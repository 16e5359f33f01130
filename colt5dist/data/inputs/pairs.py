"""Pairs of an input and a target: how they stand in a file's objects, for training and for scoring alike.

The keys are those of the SCROLLS benchmark: `id`, `pid`, `input` and `output`. Pairs with the same id have the same
input, and each of them has one of the targets that are right for it.
"""

from dataclasses import dataclass
from typing import Any

from colt5dist.data.long_texts import LONG_BYTES


@dataclass(frozen=True, kw_only=True)
class PairKeys:
    """Where the two texts of a pair are in an object, or in the columns of a table."""

    input_key: str = "input"
    """Key of the input."""
    target_key: str = "output"
    """Key of the target."""


@dataclass(frozen=True)
class Pair:
    """An input, and a target that is right for it."""

    input: str
    """The input."""
    target: str
    """The target."""

    def __len__(self) -> int:
        """Characters of both."""
        return len(self.input) + len(self.target)

    @property
    def is_long(self) -> bool:
        """Whether it is tokenized in windows."""
        return max(len(self.input), len(self.target)) > LONG_BYTES


def pair_of(record: dict[str, Any], keys: PairKeys) -> tuple[Pair | None, str]:
    """Read the pair of an object.

    Args:
        record: the object, or a row of a table as one.
        keys: where its texts are.

    Returns:
        The pair, or None; and what is wrong where there is none.
    """
    given, problem = text_of(record, keys.input_key)
    if given is None:
        return None, problem
    target, problem = text_of(record, keys.target_key)
    return (None, problem) if target is None else (Pair(given, target), "")


def text_of(record: dict[str, Any], key: str) -> tuple[str | None, str]:
    """Read one text of a pair.

    Args:
        record: an object.
        key: its key.

    Returns:
        The text, or None; and what is wrong where there is none.
    """
    text = record.get(key)
    if not isinstance(text, str):
        return None, f"no text under {key!r}"
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can escape
        return None, f"not UTF-8 under {key!r}"
    return (None, f"empty under {key!r}") if not text or text.isspace() else (text, "")

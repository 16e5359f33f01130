"""Pairs of an input and a target, read from a file: one sample for each input, with all of its targets.

The keys are those of colt5dist/data/inputs/pairs.py, with which pairs are read for training, too. Lines with the same
id are one sample with several references; `pid`, the number of the pair, is not used.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colt5dist.data.inputs.pairs import PairKeys, text_of
from colt5dist.errors import ConfigError
from colt5dist.pretrained.write_texts import read_objects


@dataclass(frozen=True, kw_only=True)
class PairSample:
    """An input, and the texts that are right for it."""

    line: int
    """Number of its first line in the file, from 1 on."""
    id: str | int | None
    """What its pairs have in common; None: the file does not say."""
    text: str
    """The input."""
    references: tuple[str, ...]
    """The targets, one or more, in the order of the file."""


def read_pairs(
    path: Path, *, input_key: str = PairKeys.input_key, target_key: str = PairKeys.target_key, id_key: str = "id"
) -> list[PairSample]:
    """Read the pairs of a JSON-lines file.

    Args:
        path: an object a line; also compressed (.gz, .zst).
        input_key: key of the input.
        target_key: key of the target.
        id_key: key of the id; an object without it is a sample of its own.

    Returns:
        The samples, in the order of their first lines.

    Raises:
        ConfigError: the file cannot be read or has no pair, a pair lacks its input or target, or two pairs have one id
            and different inputs.
    """
    samples: dict[Any, PairSample] = {}
    for line, record in read_objects(path):
        text = _text_of(path, line, record, input_key, "--input-key")
        target = _text_of(path, line, record, target_key, "--target-key")
        identity = record.get(id_key)
        if identity is not None and (isinstance(identity, bool) or not isinstance(identity, str | int)):
            raise ConfigError(f"{path}: line {line} has no text or number as {id_key!r}; --id-key names another")
        key = (line,) if identity is None else identity
        first = samples.setdefault(key, PairSample(line=line, id=identity, text=text, references=()))
        if first.text != text:
            raise ConfigError(
                f"{path}: lines {first.line} and {line} have the same {id_key!r} and different inputs; --id-key names "
                "another key, and where it names none each line is a sample of its own"
            )
        samples[key] = PairSample(line=first.line, id=identity, text=first.text, references=(*first.references, target))
    if not samples:
        raise ConfigError(f"{path}: has no line; give a pair a line")
    return list(samples.values())


def _text_of(path: Path, line: int, record: dict[str, Any], key: str, option: str) -> str:
    """The text under a key."""
    text, _ = text_of(record, key)
    if text is None:
        raise ConfigError(f"{path}: line {line} has no text with the key {key!r}; {option} names another")
    return text

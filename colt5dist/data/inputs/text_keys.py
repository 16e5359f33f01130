"""Which key or column holds the text: one for all files, and others for the files that a pattern names."""

import os
from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from colt5dist.data.inputs.files import InputFile
from colt5dist.errors import ConfigError


def split_text_keys(given: Iterable[str], default: str) -> tuple[str, list[tuple[str, str]]]:
    """Divide what is given as `--text-key` into the key for all files, and (pattern, key) for some.

    Args:
        given: each a key, or `PATTERN=KEY`, in which the last = counts; of several keys for all files the last counts.
        default: the key for all files if none is given.
    """
    key = next((text for text in reversed(list(given)) if "=" not in text), default)
    return key, [(pattern, own) for pattern, sign, own in (text.rpartition("=") for text in given) if sign]


def text_key_problems(key: str, patterns: Iterable[tuple[str, str]]) -> list[str]:
    """Return everything that is wrong with the keys by themselves, one line each."""
    problems = []
    for pattern, own in [("*", key), *patterns]:
        if not pattern or not own:
            problems.append(f"--text-key: {pattern}={own} has no {'key' if pattern else 'pattern'}; give PATTERN=KEY")
        try:
            own.encode()
        except UnicodeEncodeError:  # the command line held bytes that are not UTF-8
            problems.append(f"--text-key: {own!r} is not UTF-8; give the key exactly as it is in the files")
    return problems


def with_text_keys(files: Iterable[InputFile], patterns: list[tuple[str, str]]) -> list[InputFile]:
    """Give each file the key of the first pattern that matches its path.

    Args:
        files: the inputs.
        patterns: (pattern, key); a pattern matches a whole path, or the end of one from a folder on.

    Raises:
        ConfigError: a pattern matches no file.
    """
    found, unused = [], dict(patterns)
    for file in files:
        matching = [(pattern, key) for pattern, key in patterns if _matches(file.path, pattern)]
        for pattern, _ in matching:
            unused.pop(pattern, None)
        found.append(replace(file, text_key=matching[0][1]) if matching else file)
    for pattern, key in unused.items():
        raise ConfigError(f"--text-key: {pattern}={key} matches none of the input files; fix the pattern")
    return found


def _matches(path: Path, pattern: str) -> bool:
    """Whether a pattern matches; * stands for folders, too."""
    pattern = os.path.normpath(os.path.expanduser(pattern))
    return fnmatchcase(str(path), pattern) or fnmatchcase(str(path), f"*/{pattern}")

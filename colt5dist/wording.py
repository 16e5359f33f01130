"""Parts of messages: singular and plural, where a name was looked for, what a module is for."""

import ast
from pathlib import Path


def count(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun: `1 device`, `2 devices`.

    Args:
        number: the number; thousands are separated by commas.
        noun: the singular.
        plural: the plural; None adds an s to the singular.
    """
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def looked_for(path: Path) -> str:
    """Say where a path that does not begin with / was looked for: `; looked for /home/ann/shards`; else nothing."""
    return "" if path.is_absolute() else f"; looked for {path.absolute()}"


def summary(path: Path) -> str:
    """Return the first line of a Python file's docstring, without importing the file."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]

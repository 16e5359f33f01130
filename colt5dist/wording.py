"""Parts of messages: singular and plural, and where a name was looked for."""

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

"""Singular and plural in messages."""


def count(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun: `1 device`, `2 devices`.

    Args:
        number: the number; thousands are separated by commas.
        noun: the singular.
        plural: the plural; None adds an s to the singular.
    """
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"

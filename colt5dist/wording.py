"""Numbers in sentences."""


def count(number: int, noun: str, plural: str | None = None) -> str:
    """`1 device`, `2 devices`; `plural` where that is not the noun and an s."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"

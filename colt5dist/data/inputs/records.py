"""What the readers of binary formats have in common: how they say that records cannot be read."""


class DamagedError(Exception):
    """The rest of a file cannot be read.

    Args:
        reason: what is wrong, in one line.
        documents: documents that are lost by it, as far as that is known.
    """

    def __init__(self, reason: str, documents: int = 1) -> None:
        super().__init__(reason)
        self.documents = max(documents, 1)


class NoTextError(Exception):
    """No record of a file has the text that was asked for.

    Args:
        reason: what the records have instead, in one line.
        documents: records of the file.
    """

    def __init__(self, reason: str, documents: int) -> None:
        super().__init__(reason)
        self.documents = documents


def one_line(error: Exception) -> str:
    """What a library says in an error, in one line."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(said.split()) or type(error).__name__

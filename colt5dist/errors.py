"""What ends a command with one line and without a traceback: exceptions, and wrong arguments."""

import argparse
import sys
from typing import NoReturn


class ConfigError(ValueError):
    """A key, file or folder given by the user is wrong.

    Each line of the message names the key or file, what is wrong with it, and how to fix it. The scripts print the
    lines to stderr and end with status 2, without a traceback.
    """

    known_to_all = False
    """Whether all ranks have raised the same error, or it has been printed already: then only rank 0 prints."""


class SaveError(RuntimeError):
    """A checkpoint could not be written, and the run stops because of that.

    The message is one line, the same on all ranks. The scripts print it and end with status 74.
    """

    known_to_all = True


class TrainingFault(RuntimeError):
    """The numbers of a run (loss, gradients, weights) are such that it must stop.

    It is raised on all ranks, after rank 0 has printed why. The scripts end with status 1, without a traceback.
    """


def first_line(error: BaseException) -> str:
    """Type of an exception and the first line of its message."""
    return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"


def step_or_best(text: str) -> int | str:
    """Read the option --step: a whole number, or the word best."""
    if text == "best":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor the word best") from None


class OneLineParser(argparse.ArgumentParser):
    """Reports a wrong argument as one line, like all wrong input."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with status 2."""
        print(f"error: arguments: {message}; --help lists them", file=sys.stderr)
        sys.exit(2)

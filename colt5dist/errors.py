"""The exceptions that end a run with one line and without a traceback."""


class ConfigError(ValueError):
    """A key, file or folder given by the user is wrong.

    Each line of the message names the key or file, what is wrong with it, and the mend. The scripts print the lines
    to stderr and end with status 2, without a traceback.
    """


class SaveError(RuntimeError):
    """A checkpoint could not be written, and the run does not go on without it.

    The message is one line, the same on all ranks. The scripts print it and end with status 74.
    """


class TrainingFault(RuntimeError):
    """The numbers of a run are such that it must not go on; raised on all ranks, after rank 0 has told of it.

    The scripts end with status 1, without a traceback.
    """

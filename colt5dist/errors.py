"""The exceptions that end a run with one line and without a traceback."""


class ConfigError(ValueError):
    """A key, file or folder given by the user is wrong.

    Each line of the message names the key or file, what is wrong with it, and the mend. The scripts print the lines
    to stderr and end with status 2, without a traceback.
    """

    known_to_all = False
    """Whether all ranks have raised the same one, or it has been printed: then rank 0's line is enough."""


class SaveError(RuntimeError):
    """A checkpoint could not be written, and the run does not go on without it.

    The message is one line, the same on all ranks. The scripts print it and end with status 74.
    """

    known_to_all = True


class TrainingFault(RuntimeError):
    """The numbers of a run are such that it must not go on; raised on all ranks, after rank 0 has told of it.

    The scripts end with status 1, without a traceback.
    """

"""The one exception for wrong user input."""


class ConfigError(ValueError):
    """A key, file or folder given by the user is wrong.

    Each line of the message names the key or file, what is wrong with it, and the mend. The scripts print the lines
    to stderr and end with status 2, without a traceback.
    """

"""The one exception for what a user can mend: a wrong path, key, value or file."""


class UserError(ValueError):
    """Bad input. The message is one sentence that names the file or value, what was expected and what to do.

    The command line prints it and exits with code 2, without a traceback.
    """

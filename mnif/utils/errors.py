"""The one error a user is meant to read."""


class UserError(Exception):
    """A mistake the user can mend: the message is one line that says what was wrong, where, and what to do.

    The command line prints it to stderr and leaves with exit code 2.
    """

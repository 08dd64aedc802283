"""The exception whose message is written for the person at the keyboard."""


class UserError(ValueError):
    """One line that names the thing, its value and what to do; the command line prints it and exits 2."""

"""Exceptions whose messages address the user."""


class UserError(ValueError):
    """A one-line message with the thing, its value and what to do. The command line prints it and exits with 2."""


class BackendError(RuntimeError):
    """No backend can run this call. The message holds the reason of each refusal."""


def first_line(error: object) -> str:
    """Return the first line of an exception's message, or its class's name if the message is empty."""
    return str(error).strip().partition("\n")[0] or type(error).__name__

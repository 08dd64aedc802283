"""Exceptions whose messages are written for the person at the keyboard."""


class UserError(ValueError):
    """One line that names the thing, its value and what to do; the command line prints it and exits 2."""


class BackendError(RuntimeError):
    """No backend can run this call; the message holds each refusal's reason."""


def first_line(error: object) -> str:
    """The first line of an exception's message, or its class's name if the message is empty."""
    return str(error).strip().partition("\n")[0] or type(error).__name__

"""Exceptions whose messages address the user."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A one-line message with the thing, its value and what to do. The command line prints it and exits with 2."""


class BackendError(RuntimeError):
    """No backend can run this call. The message holds the reason of each refusal."""


class Refusal(BackendError):
    """The limits of the backends refuse this call, so no kernel has run."""


def first_line(error: object) -> str:
    """Return the first line of an exception's message, or its class's name if the message is empty."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def did_you_mean(value: str, names: Iterable[str]) -> str:
    """Return the end of an error about an unknown name: `; did you mean A or B?`, or nothing if no name is similar."""
    close = difflib.get_close_matches(value, list(names), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def choices(value: str, names: Iterable[str]) -> str:
    """Return the end of an error about an unknown name: the names like it, or all names if none is similar."""
    names = list(names)
    return did_you_mean(value, names) or f"; choose one of {', '.join(names)}"

"""Names of files. A name is bytes, and need not be UTF-8: Python then keeps each such byte as a lone surrogate."""

from __future__ import annotations

import unicodedata


def printable(name: str) -> str:
    r"""Return the name as text that every file and screen can hold. A byte that is not UTF-8 becomes `\xff`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def comparable(name: str) -> str:
    """Return the name in NFC. A name that is not UTF-8 counts as Latin-1, like the names in many older packages."""
    try:
        name.encode()
    except UnicodeEncodeError:
        name = name.encode("utf-8", "surrogateescape").decode("latin-1")
    return unicodedata.normalize("NFC", name)

"""Names of files. A name is bytes, and need not be UTF-8: Python then keeps each such byte as a lone surrogate."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable

_MAX_BYTES = 120
"""Limit on a name, which leaves room for a suffix and for the names of partial files: file systems hold 255 bytes."""
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10))}
"""Names of devices on Windows, with any suffix."""


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


def file_name(name: str) -> str:
    """Return the name of a file or folder for any text, such as a label, a task or a model. See `file_names`."""
    return file_names([name])[name]


def file_names(names: Iterable[str]) -> dict[str, str]:
    """Return a file name for each text. They differ on every file system, and none leaves its folder.

    Letters, digits, `.`, `_` and `-` stay, and `-` replaces runs of other characters. The name ends with a hash of the
    text in three cases: another one of `names` would have the same name, a character of another script is lost, or a
    file system reserves the name or cannot hold it. File systems may ignore case and Unicode's form.

    Texts of other calls may get the same name if they differ in case or in ASCII punctuation.
    """
    plain = {name: _slug(name) for name in names}
    hashed = {name for name in plain if not _is_unambiguous(name, plain[name])}
    while True:
        result = {name: _with_hash(name) if name in hashed else slug for name, slug in plain.items()}
        counts = Counter(map(_folded, result.values()))
        ambiguous = {name for name, slug in result.items() if counts[_folded(slug)] > 1} - hashed
        if not ambiguous:
            return result
        hashed |= ambiguous


def _slug(name: str) -> str:
    kept = "".join(c if c in "._-" or unicodedata.category(c)[0] in "LMN" else " " for c in name)
    return "-".join(kept.split()).strip("-.")


def _is_unambiguous(name: str, slug: str) -> bool:
    is_lossy = any(not c.isascii() and c not in slug for c in name)
    is_reserved = slug.partition(".")[0].lower() in _RESERVED
    return bool(slug) and not is_lossy and not is_reserved and len(slug.encode()) <= _MAX_BYTES


def _with_hash(name: str) -> str:
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:12]
    slug = _slug(name).encode()[:_MAX_BYTES].decode(errors="ignore").rstrip("-.")
    return f"{slug}-{digest}" if slug and slug.partition(".")[0].lower() not in _RESERVED else digest


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())

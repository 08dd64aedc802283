"""SHA-256 and MD5 in hexadecimal: of bytes or text, of parts in turn, of a file."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_BLOCK = 1 << 20


def sha256(data: Any) -> str:
    """SHA-256 of bytes, of anything with the buffer protocol, or of text as UTF-8."""
    return sha256_of_parts([data])


def sha256_of_parts(parts: Iterable[Any]) -> str:
    """SHA-256 of all parts in turn, without a separator between them."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file, read block by block."""
    return sha256_of_parts(blocks(path))


@functools.cache
def sha256_of_sources(*folders: str) -> str:
    """SHA-256 of the Python code of this package's folders or files, such as `data/image_files` or `eval/embed.py`."""
    root = Path(__file__).parents[1]
    paths = [path for name in folders for path in ((root / name).rglob("*.py") if "." not in name else [root / name])]
    return sha256_of_parts(path.read_bytes() for path in sorted(paths))


def blocks(path: Path) -> Iterator[bytes]:
    """The content of a file in blocks of 1 MiB."""
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            yield block


def md5_of(data: bytes) -> str:
    """MD5, to check a transfer only."""
    return hashlib.md5(data).hexdigest()

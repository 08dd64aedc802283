"""Names of files that may be images, and names of the formats that ingest doesn't read.

A suffix only selects candidates, and a graphic without suffix may be any of them. The content decides: a JPEG
with another suffix is a JPEG. A format that ingest doesn't read is named in the reject.
"""

from __future__ import annotations

import re

from bclip_fast.data.image_files import IMAGE_SUFFIXES as READ_SUFFIXES
from bclip_fast.data.image_files import UNREAD_SUFFIXES, ImageError, open_image

_SUFFIXES = frozenset(READ_SUFFIXES + UNREAD_SUFFIXES)
# In a name such as pone.0012345.g001, the end is not a suffix.
_NUMBER_OF_FIGURE = re.compile(r"(?:fig|[fgu])?\d+[a-z]?", re.IGNORECASE)


def suffix_of(name: str) -> str:
    """Return the image suffix of a name in lower case, with the dot. Empty if the name has none."""
    stem, dot, suffix = name.rpartition(".")
    suffix = f".{suffix.lower()}"
    return suffix if stem and dot and suffix in _SUFFIXES else ""


def without_suffix(name: str) -> str:
    """Return a name without its image suffix."""
    return name[: len(name) - len(suffix_of(name))]


def may_be_image(name: str) -> bool:
    """Return whether a file's name has an image suffix, or no suffix at all."""
    last = name.rpartition("/")[2]
    _, dot, end = last.rpartition(".")
    return bool(suffix_of(last)) or not dot or bool(_NUMBER_OF_FIGURE.fullmatch(end))


def preference(name: str) -> int:
    """Return the rank of a name's suffix among the versions of one image: 0 is the best."""
    suffix = suffix_of(name)
    return READ_SUFFIXES.index(suffix) if suffix in READ_SUFFIXES else len(READ_SUFFIXES) + bool(suffix)


def num_pixels(data: bytes) -> int:
    """Return width times height from the header of an image. 0 if it cannot be read."""
    try:
        image = open_image(data)
    except ImageError:  # `sanitize` gives the reason
        return 0
    return image.width * image.height

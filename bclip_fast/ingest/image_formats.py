"""Which files of an article may be images, and the names of the formats that ingest doesn't read.

A suffix only selects candidates, and a graphic without suffix may be any of them. The content decides: a JPEG counts
as a JPEG whatever its name. A format that ingest doesn't read is named in the reject.
"""

from __future__ import annotations

import io
import re
import warnings

from PIL import Image

from .sanitize import FORMATS

# In order of preference. PMC's GIFs are thumbnails of its full-size JPEGs.
READ_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".png", ".tif", ".tiff", ".gif", ".webp", ".bmp", ".dib", ".dcm",
)  # fmt: skip
OTHER_SUFFIXES = (
    ".jp2", ".j2k", ".j2c", ".jpf", ".jpx", ".jxl", ".avif", ".heic", ".heif", ".svg", ".eps", ".ps", ".ai", ".emf",
    ".wmf", ".psd", ".jxr", ".pcx", ".pnm", ".ppm", ".pgm",
)  # fmt: skip
_SUFFIXES = frozenset(READ_SUFFIXES + OTHER_SUFFIXES)
# The end of a name such as pone.0012345.g001 is no suffix.
_NUMBER_OF_FIGURE = re.compile(r"(?:fig|[fgu])?\d+[a-z]?", re.IGNORECASE)
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF", b"msf1": "HEIF"}
_STARTS = (
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"II\xbc\x01", "JPEG XR"),
    (b"%PDF", "PDF"),
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "PostScript"),
    (b"\xd7\xcd\xc6\x9a", "WMF"),
    (b"8BPS", "Photoshop"),
    (b"P4", "PNM"), (b"P5", "PNM"), (b"P6", "PNM"),
    (b"\x1f\x8b", "gzip"),
    (b"PK\x03\x04", "zip"),
)  # fmt: skip


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


def other_format(data: bytes) -> str:
    """Return the name of the format of `data`, if it is one that ingest doesn't read. Else return an empty string."""
    if data[4:8] == b"ftyp":
        return _BRANDS.get(data[8:12], "MP4 or another container")
    if data[40:44] == b" EMF":
        return "EMF"
    head = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith((b"<?xml", b"<svg", b"<!doctype svg", b"<!--")) and b"<svg" in head:
        return "SVG"
    return next((name for start, name in _STARTS if data.startswith(start)), "")


def num_pixels(data: bytes) -> int:
    """Return width times height from the header of an image. 0 if it cannot be read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                return image.width * image.height
        except Exception:  # decoders raise any exception for corrupt headers, and `sanitize` gives the reason
            return 0

"""Names of file formats, from a file's first bytes."""

from __future__ import annotations

# Suffixes of images whose formats `decode` does not read.
UNREAD_SUFFIXES = (
    ".jp2", ".j2k", ".j2c", ".jpf", ".jpx", ".jxl", ".avif", ".heic", ".heif", ".svg", ".eps", ".ps", ".ai", ".emf",
    ".wmf", ".psd", ".jxr", ".pcx", ".pnm", ".ppm", ".pgm",
)  # fmt: skip
_SIGNATURES = (
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "PostScript"),
    (b"%PDF", "PDF"),
    (b"8BPS", "Photoshop"),
    (b"II\xbc\x01", "JPEG XR"),
    (b"P4", "PNM"),
    (b"P5", "PNM"),
    (b"P6", "PNM"),
    (b"\xd7\xcd\xc6\x9a", "WMF"),
    (b"\x1f\x8b", "gzip"),
    (b"PK\x03\x04", "zip"),
)
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF", b"msf1": "HEIF"}


def name_of_format(data: bytes) -> str | None:
    """Return the name of the format of a file that `decode` does not read, or None if it is unknown.

    TIFF is among them, because only some of its layouts are read.

    >>> name_of_format(b"%PDF-1.7")
    'PDF'
    """
    for signature, name in _SIGNATURES:
        if data.startswith(signature):
            return name
    if data[4:8] == b"ftyp":
        return _BRANDS.get(data[8:12], "MP4 or another container")
    if data[40:44] == b" EMF":
        return "EMF"
    start = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<svg" in start:
        return "SVG"
    if start.startswith((b"<!doctype html", b"<html")):
        return "HTML"
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        return "Git LFS pointer (run `git lfs pull`)"
    return None

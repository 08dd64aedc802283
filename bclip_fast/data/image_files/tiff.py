"""The TIFF layouts that Pillow decodes correctly. All others are refused.

Pillow decodes some layouts to noise or to a negative without an error: 16-bit colours in separate planes, signed 8-bit
values, and 16-bit values with white as zero. `tests/data/test_image_files.py` compares every accepted layout with an
independent reader, tifffile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .errors import ImageError

if TYPE_CHECKING:
    from PIL import Image, ImageFile

REMEDY = "save it as 8-bit or 16-bit grey or RGB without separate planes"
_SUBFILE, _OLD_SUBFILE, _COMPRESSION, _PHOTOMETRIC, _BITS = 254, 255, 259, 262, 258
_PLANAR, _EXTRA, _SAMPLE_FORMAT = 284, 338, 339
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _CMYK, _YCBCR, _CIELAB = 0, 1, 2, 3, 5, 6, 8
_COLOURS = {_RGB: 3, _CMYK: 4}  # samples of a pixel
_UNSIGNED, _SIGNED, _FLOAT = 1, 2, 3
_REDUCED, _MASK = 1, 4  # bits of NewSubfileType
_JPEG = 7
_MAX_PAGES = 64
_NAMES = {0: "white-is-zero grey", 1: "grey", 2: "RGB", 3: "palette", 4: "mask", 5: "CMYK", 6: "YCbCr", 8: "CIELAB"}
_FORMATS = {1: "unsigned", 2: "signed", 3: "float", 4: "undefined", 5: "complex", 6: "complex"}


class Layout(NamedTuple):
    """What decides how a page's samples become pixels.

    photometric, sample_format: values of the TIFF tags.
    bits: bits of each sample, extra samples included.
    extra: meanings of the extra samples: 0 unspecified, 1 associated alpha, 2 unassociated alpha.
    separate: whether each sample has its own plane.
    raw: whether the page is not compressed.
    """

    photometric: int
    bits: tuple[int, ...]
    sample_format: int
    extra: tuple[int, ...]
    separate: bool
    raw: bool

    def __str__(self) -> str:
        bits = "+".join(map(str, self.bits)) if len(self.bits) <= 8 else f"{len(self.bits)} x {self.bits[0]}"
        parts = [f"{bits}-bit {_FORMATS.get(self.sample_format, 'unknown')}"]
        parts += [_NAMES.get(self.photometric, f"photometric interpretation {self.photometric}")]
        parts += [f"extra samples {self.extra[:8]}"] if self.extra else []
        return " ".join(parts + (["in separate planes"] if self.separate else []))


def select_page(image: ImageFile.ImageFile) -> None:
    """Move to the first page that is neither a reduced version of another page nor a mask."""
    # Pillow's n_frames would read the directories of all pages, in quadratic time.
    for page in range(_MAX_PAGES):
        try:
            image.seek(page)
        except EOFError:
            break
        tags = image.tag_v2  # type: ignore[attr-defined]
        if not tags.get(_SUBFILE, 0) & (_REDUCED | _MASK) and tags.get(_OLD_SUBFILE, 1) != 2:
            return
    image.seek(0)


def layout(image: Image.Image) -> Layout:
    """Return the layout of the current page."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    extra = tags.get(_EXTRA, ())
    formats = tags.get(_SAMPLE_FORMAT, (1,))
    bits = tuple(tags.get(_BITS, (1,)))
    photometric = tags.get(_PHOTOMETRIC, _BLACK_IS_ZERO)
    unnamed = len(bits) - _COLOURS.get(photometric, len(bits))
    extra = extra if isinstance(extra, tuple) else (extra,)
    if not extra and unnamed == 1:  # Pillow ignores a sample without a meaning
        extra = (0,)
    if len(set(formats)) != 1:
        raise ImageError(f"TIFF with samples of different formats is not supported: {REMEDY}")
    return Layout(
        photometric,
        bits,
        formats[0],
        extra,
        tags.get(_PLANAR, 1) == 2 and len(bits) > 1,
        tags.get(_COMPRESSION, 1) == 1,
    )


def check_layout(image: Image.Image) -> None:
    """Raise ImageError if Pillow would decode the current page wrongly."""
    page = layout(image)
    if not _is_correct(page, image.tag_v2.get(_COMPRESSION, 1)):  # type: ignore[attr-defined]
        raise ImageError(f"TIFF of {page} is not supported: {REMEDY}")


def _is_correct(page: Layout, compression: int) -> bool:
    depths = set(page.bits)
    if len(depths) != 1:
        return False
    [depth] = depths
    if page.photometric in (_BLACK_IS_ZERO, _WHITE_IS_ZERO) and not page.extra:
        if len(page.bits) != 1:
            return False
        if page.photometric == _WHITE_IS_ZERO:
            return page.sample_format == _UNSIGNED and depth in (1, 2, 4, 8, 16)
        return depth in {_UNSIGNED: (1, 2, 4, 8, 12, 16, 32), _SIGNED: (16, 32), _FLOAT: (32,)}.get(
            page.sample_format, ()
        )
    if page.sample_format != _UNSIGNED:
        return False
    if page.photometric == _BLACK_IS_ZERO:
        return len(page.bits) == 2 and depth == 8 and not page.separate
    if page.photometric == _PALETTE:
        return len(page.bits) == 1 and depth in (1, 2, 4, 8)
    if page.photometric == _CIELAB:
        return page.bits == (8, 8, 8) and not page.separate
    if page.photometric == _YCBCR:
        return page.bits == (8, 8, 8) and compression == _JPEG
    colours = _COLOURS.get(page.photometric)
    if colours is None or depth not in (8, 16) or len(page.bits) != colours + len(page.extra) or len(page.extra) > 1:
        return False
    if page.photometric == _CMYK and page.extra:
        return False
    if not page.separate:
        return True
    # Pillow's own decoder, which reads uncompressed files, takes each byte of a plane for a pixel.
    return page.extra in ((), (2,)) if depth == 8 else not page.raw and not page.extra and page.photometric == _RGB


def with_black_zero(image: Image.Image) -> Image.Image:
    """Return a decoded page with the right sign and range, where Pillow ignores the tags for them."""
    from PIL import Image

    page = layout(image)
    if page.photometric == _WHITE_IS_ZERO and page.bits == (16,):
        return Image.fromarray(65535 - np.asarray(image))
    if page.sample_format == _UNSIGNED and page.bits == (32,):
        values = np.asarray(image).view(np.uint32)
        return Image.fromarray(values.astype(np.float32) / np.float32(65537), "F") if values.max() > 65535 else image
    return image

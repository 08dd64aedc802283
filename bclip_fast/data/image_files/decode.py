"""Open an image file and decode it to 8-bit RGB."""

from __future__ import annotations

import io
import struct
import threading
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from bclip_fast.errors import UserError

from . import dicom, jpeg, png, tiff
from .colours import to_rgb
from .errors import ImageError
from .formats import name_of_format

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL import Image, ImageFile

ImageConversion = Literal["standard", "open_clip"]
RULES = 2
"""Version of the conversion rules. A change of pixels or refusals increases it, so stored embeddings are computed
again."""

MAX_BYTES = 256 << 20
MAX_PIXELS = 178_956_970  # Pillow's limit against decompression bombs, and that of ops.image
# In order of preference among versions of one image. PMC's GIFs are thumbnails of its full-size JPEGs.
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".png", ".tif", ".tiff", ".gif", ".webp", ".bmp", ".dib", ".dcm",
    ".dicom",
)  # fmt: skip
# Pillow's formats whose decoders start no programs (as EPS does) and call only libraries that Pillow includes.
FORMATS = ("JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP")
_ORIENTATION = 0x0112
_JPEG_FORMATS = ("JPEG", "MPO")
# Exceptions of Pillow's plugins for corrupt input.
CORRUPT = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, struct.error, ArithmeticError,
    AttributeError, RuntimeError,
)  # fmt: skip


class OpenImage:
    """An image file whose header has been read.

    Attributes:
        format: "JPEG", "MPO" (several JPEGs in one file), "PNG", "GIF", "TIFF", "BMP", "WEBP" or "DICOM".
        mode: Pillow's mode of the stored pixels, or DICOM's photometric interpretation.
        width, height: size in pixels. For TIFF, after the orientation has been applied.
    """

    def __init__(self, data: bytes) -> None:
        self._dicom: dicom.Header | None = None
        if dicom.is_dicom(data):
            self._dicom = dicom.read_header(data)
            self.format, self.mode = "DICOM", self._dicom.photometric
            self.width, self.height = self._dicom.width, self._dicom.height
            return
        self._data, self._reduced = data, 1
        self.image = _open(data)
        if self.image.format == "TIFF":
            tiff.select_page(self.image)
            tiff.check_layout(self.image)
        self.format, self.mode = self.image.format or "", self.image.mode
        self.width, self.height = self.image.size

    @property
    def is_upright(self) -> bool:
        """Whether the pixels need no turning: the orientation tag is 1 or absent."""
        if self._dicom is not None:
            return True
        try:
            return self.image.getexif().get(_ORIENTATION, 1) == 1
        except CORRUPT:  # the pixels are intact; Pillow ignores broken EXIF data in the same way
            return True

    def reduce_jpeg(self, width: int, height: int) -> None:
        """Let the decoder of an RGB or grey JPEG scale by 1/2, 1/4 or 1/8, to at least this size."""
        if self.format == "JPEG" and self.mode in ("RGB", "L"):
            factor = min(self.width // width, self.height // height)
            self._reduced = next(divisor for divisor in (8, 4, 2, 1) if divisor <= max(1, factor))

    def rgb(self) -> Image.Image:
        """Decode the pixels to RGB, upright. The error is an ImageError."""
        with as_image_errors():
            if self._dicom is not None:
                return dicom.to_rgb(self._dicom)
            upright = self.is_upright
            image = self._load()
            if not upright and self.format != "TIFF":  # Pillow turns a TIFF when it loads it
                from PIL import ImageOps

                image = ImageOps.exif_transpose(image)
            return to_rgb(tiff.with_black_zero(image) if self.format == "TIFF" else image)

    def _load(self) -> Image.Image:
        """Return the stored pixels. Those of a JPEG are RGB already."""
        if self.format in _JPEG_FORMATS:
            image = jpeg.decode_intact(self._data, self._reduced)
            if image is not None:
                image.info |= self.image.info
                return image
            if self._reduced > 1:
                self.image.draft(None, (self.width // self._reduced, self.height // self._reduced))
        elif self.format == "PNG":
            png.check_pixels(self._data)
        self.image.load()
        return self.image


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> OpenImage:
    """Open an image file and check its size before any pixel is decoded.

    Raises:
        ImageError: the format is unknown or unsupported, the header is damaged, the file exceeds `MAX_BYTES` or the
            image `max_pixels`. The message is one line without the name of the file.
    """
    if len(data) > MAX_BYTES:
        raise ImageError(f"image larger than {MAX_BYTES >> 20} MiB")
    with as_image_errors():
        image = OpenImage(data)
    if image.width * image.height > max_pixels:
        raise ImageError("image of too many pixels")
    return image


def is_upright_jpeg(data: bytes) -> bool:
    """Return whether `ops.image` decodes a file to the pixels that `open_image` gives: a JPEG that needs no turning."""
    if not data.startswith(b"\xff\xd8\xff"):
        return False
    if data.find(b"Exif\0\0", 0, 1 << 16) < 0:
        return True
    try:
        return open_image(data).is_upright
    except ImageError:  # the decoder reports the damage
        return True


def read_rgb(data: bytes, name: Callable[[], str], conversion: ImageConversion = "standard") -> Image.Image:
    """Decode an image file of any supported format to RGB, upright and over white.

    Args:
        name: function that returns the image's name for an error message. It is called only then: it may read a file.
        conversion: "open_clip" returns Pillow's image in the mode of its file instead, not turned, of any layout. The
            caller converts it after the resize, as open_clip does.

    Raises:
        UserError: the image has an unknown format, is damaged, or is too large. The message names it.
    """
    try:
        return open_image(data).rgb() if conversion == "standard" else _open_with_pillow(data)
    except ImageError as error:
        raise UserError(f"image {name()} cannot be decoded: {error}") from error


def _open_with_pillow(data: bytes) -> Image.Image:
    from PIL import Image

    with as_image_errors():
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise ImageError("image of too many pixels")
        if image.format in _JPEG_FORMATS and (pixels := jpeg.decode_intact(data)) is not None:
            if image.mode in ("RGB", "L"):  # the same pixels as Pillow's
                return pixels if image.mode == "RGB" else pixels.getchannel(0)
        elif image.format == "PNG":
            png.check_pixels(data)
        image.load()
        if image.mode == "La":
            raise ImageError("Pillow does not convert grey with associated alpha to RGB")
        return image


class _NoWarnings:
    """Ignores all warnings while at least one thread decodes.

    `warnings.catch_warnings` replaces the filters of the process. If two threads left it in the order in which they
    entered it, the process would keep the filters of the first one.
    """

    def __init__(self) -> None:
        self._lock, self._depth = threading.Lock(), 0
        self._filters = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            self._depth += 1
            if self._depth == 1:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.simplefilter("ignore")

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                self._filters.__exit__(None, None, None)


_no_warnings = _NoWarnings()


@contextmanager
def as_image_errors() -> Iterator[None]:
    """Turn every exception of the decoders into an ImageError with a reason of one line."""
    from PIL import Image

    # The pixel limits refuse decompression bombs, so Pillow's warning adds nothing.
    with _no_warnings:
        try:
            yield
        except ImageError:
            raise
        except Image.DecompressionBombError:
            raise ImageError("image of too many pixels") from None
        except MemoryError:
            raise ImageError("out of memory") from None
        except CORRUPT as error:
            raise ImageError(" ".join(str(error).split())[:150] or type(error).__name__) from None


def _open(data: bytes) -> ImageFile.ImageFile:
    from PIL import Image

    # Pillow loads some plugins only after a first failure.
    Image.init()
    content = png.without_metadata(data) if data.startswith(png.SIGNATURE) else data
    try:
        return Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.UnidentifiedImageError:
        name = name_of_format(data)
        if name == "TIFF":
            raise ImageError(f"TIFF of an unsupported layout: {tiff.REMEDY}") from None
        raise ImageError(
            f"image in a format that is not read: {name}" if name else "not an image of a known format"
        ) from None

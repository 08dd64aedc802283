"""Single-frame DICOM images as 8-bit RGB.

The rule: apply the rescale (modality LUT), then the first window (VOI LUT) of the file. Without a window, values of
b <= 8 bits go from 0 to 2^b - 1, and deeper ones from their minimum to their maximum. MONOCHROME1 and an INVERSE
presentation are inverted. Palettes and YBR become RGB. The patient's orientation isn't applied: rows and columns keep
their order.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .colours import scaled_to_8_bits
from .errors import ImageError

if TYPE_CHECKING:
    from PIL import Image

_DEFLATED = b"1.2.840.10008.1.2.1.99"
_MAX_DEFLATED = 1 << 20
_DATASETS = ("Dataset", "FileDataset", "FileMetaDataset")  # pydicom's


@dataclass(frozen=True)
class Header:
    """A parsed DICOM file with pixels. `photometric`: its PhotometricInterpretation. Sizes in pixels."""

    dataset: Any
    photometric: str
    width: int
    height: int


def is_dicom(data: bytes) -> bool:
    """Return whether a file has DICOM's preamble."""
    return data[128:132] == b"DICM"


@contextmanager
def _as_image_errors() -> Iterator[None]:
    """Turn every exception into an ImageError, because pydicom passes on those of its decoders."""
    try:
        yield
    except ImageError:
        raise
    except Exception as error:
        if isinstance(error, AttributeError) and type(error.obj).__name__ in _DATASETS:
            raise ImageError(f"DICOM without {error.name}") from None
        raise ImageError(f"DICOM: {' '.join(str(error).split())[:150] or type(error).__name__}") from None


@_as_image_errors()
def read_header(data: bytes) -> Header:
    """Parse a DICOM file. Raises ImageError if it is damaged or has not exactly one frame, or without pydicom."""
    try:
        import pydicom
    except ModuleNotFoundError:
        raise ImageError("DICOM needs pydicom: pip install pydicom") from None
    if len(data) > _MAX_DEFLATED and _DEFLATED in data:  # pydicom inflates it without a limit
        raise ImageError("deflated DICOM of more than 1 MiB is not supported; save it without deflation")
    dataset = pydicom.dcmread(io.BytesIO(data))
    if "PixelData" not in dataset:
        raise ImageError("DICOM without an image")
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames != 1:
        raise ImageError(f"DICOM of {frames} frames; export the frame that you need")
    return Header(dataset, str(dataset.PhotometricInterpretation), int(dataset.Columns), int(dataset.Rows))


@_as_image_errors()
def to_rgb(header: Header) -> Image.Image:
    """Decode the pixels by the rule of this module."""
    from PIL import Image

    dataset, pixels = header.dataset, _stored_pixels(header)
    if header.photometric == "PALETTE COLOR":
        pixels = _through_palette(pixels, dataset)
    if pixels.ndim == 3:
        if pixels.shape[2] != 3 or pixels.dtype != np.uint8:
            raise ImageError(f"DICOM with pixels of {pixels.shape[2]} x {pixels.dtype} is not supported")
        return Image.fromarray(np.ascontiguousarray(pixels))
    if pixels.ndim != 2:
        raise ImageError(f"DICOM with pixels of shape {pixels.shape} is not supported")
    grey = _grey(pixels, dataset)
    if (header.photometric == "MONOCHROME1") != (dataset.get("PresentationLUTShape") == "INVERSE"):
        grey = 255 - grey
    return Image.fromarray(grey).convert("RGB")


@_as_image_errors()
def by_percentiles(header: Header, low: float, high: float) -> np.ndarray:
    """Return grey levels (H, W) uint8 between two percentiles of the stored values, without rescale and window.

    The levels are rounded down, as in medpmc-clip-eval. Raises ImageError if the pixels are damaged or not grey.
    """
    pixels = _stored_pixels(header)
    if pixels.ndim != 2:
        raise ImageError(f"DICOM with pixels of shape {pixels.shape} is not grey")
    values = pixels.astype(np.float32)
    bottom, top = np.percentile(values, [low, high])
    return (np.clip((values - bottom) / max(top - bottom, 1e-6), 0, 1) * 255).astype(np.uint8)


def _stored_pixels(header: Header) -> np.ndarray:
    from pydicom.pixels import pixel_array

    _check_compression(header.dataset)
    pixels: np.ndarray = pixel_array(header.dataset)
    return pixels


def _check_compression(dataset: Any) -> None:
    from pydicom.pixels import get_decoder

    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        is_readable = get_decoder(syntax).is_available
    except NotImplementedError:
        is_readable = False
    if not is_readable:
        raise ImageError(f"DICOM with {syntax.name} is not supported; save it without compression")


def _through_palette(pixels: np.ndarray, dataset: Any) -> np.ndarray:
    from pydicom.pixels import apply_color_lut

    coloured: np.ndarray = apply_color_lut(pixels, dataset)
    if coloured.dtype != np.uint16:
        return coloured
    # Some writers store 8-bit levels in a palette of 16 bits.
    entries = np.arange(1 << 8 * min(2, pixels.dtype.itemsize)).astype(np.uint16)
    is_8_bit = int(apply_color_lut(entries, dataset).max()) < 256
    return (coloured if is_8_bit else coloured >> 8).astype(np.uint8)


def _grey(pixels: np.ndarray, dataset: Any) -> np.ndarray:
    """Return the levels of pixels of shape (H, W), uint8."""
    if pixels.dtype.itemsize > 2:
        return _levels(pixels, pixels, dataset)
    # A table of the levels of all values: float64 for every pixel would take 8 times the memory.
    limits = np.iinfo(pixels.dtype)
    domain = np.arange(limits.min, limits.max + 1).astype(pixels.dtype)
    rows = pixels.astype(np.int32) - limits.min
    occurs = np.zeros(len(domain), bool)
    occurs[rows] = True
    levels: np.ndarray = _levels(domain, domain[occurs], dataset)[rows]
    return levels


def _levels(pixels: np.ndarray, occurring: np.ndarray, dataset: Any) -> np.ndarray:
    """Return the levels of `pixels`, uint8. `occurring`: the pixels whose minimum and maximum count."""
    from pydicom.pixels import apply_modality_lut, apply_voi

    values = np.asarray(apply_modality_lut(pixels, dataset), dtype=np.float64)
    if dataset.get("VOILUTSequence"):
        looked_up = np.asarray(apply_voi(np.rint(values).astype(np.int64), dataset), dtype=np.float64)
        return scaled_to_8_bits(looked_up, 0.0, 2.0 ** _lut_bits(dataset) - 1)
    window = _window(dataset)
    if window is not None:
        return _windowed(values, *window, function=str(dataset.get("VOILUTFunction") or "LINEAR"))
    if "PixelPaddingValue" in dataset:
        occurring = occurring[occurring != dataset.PixelPaddingValue]
    inside = np.asarray(apply_modality_lut(occurring, dataset), dtype=np.float64)
    low, high = (float(inside.min()), float(inside.max())) if inside.size else (0.0, 0.0)
    bits = int(dataset.BitsStored)
    if bits <= 8 and low >= 0 and high < 2**bits:
        low, high = 0.0, 2.0**bits - 1
    return scaled_to_8_bits(values, low, high)


def _lut_bits(dataset: Any) -> int:
    return int(dataset.VOILUTSequence[0].LUTDescriptor[2])


def _window(dataset: Any) -> tuple[float, float] | None:
    """Return the centre and the width of the first window."""
    centre, width = dataset.get("WindowCenter"), dataset.get("WindowWidth")
    if centre in (None, "") or width in (None, ""):
        return None
    first = [value if isinstance(value, int | float | str) else value[0] for value in (centre, width)]
    return float(first[0]), float(first[1])


def _windowed(values: np.ndarray, centre: float, width: float, function: str) -> np.ndarray:
    """Apply a window, DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3."""
    if not np.isfinite([centre, width]).all() or width <= 0:
        raise ImageError(f"DICOM window of centre {centre} and width {width}")
    if function == "SIGMOID":
        return np.rint(255 / (1 + np.exp(-4 * (values - centre) / width))).astype(np.uint8)
    if function == "LINEAR_EXACT":
        return scaled_to_8_bits(values, centre - width / 2, centre + width / 2)
    if width == 1:
        return np.where(values > centre - 0.5, 255, 0).astype(np.uint8)
    start = centre - 0.5 - (width - 1) / 2
    return scaled_to_8_bits(values, start, start + width - 1)

"""Image files to RGB pixels: every layout is right or refused, and damage becomes an error that names the image."""

from __future__ import annotations

import io
import re
import warnings
from pathlib import Path

import image_layouts
import numpy as np
import pytest
from dicom_files import dicom
from image_layouts import Layout, deep
from PIL import Image, TiffImagePlugin
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEGLosslessSV1

from bclip_fast.data.image_files import ImageError, decode, open_image, read_rgb, tiff
from bclip_fast.errors import UserError

DOCUMENT = Path(__file__).parents[2] / "docs/images.md"
LAYOUTS = [*image_layouts.tiffs(), *image_layouts.others()]


@pytest.mark.parametrize("layout", LAYOUTS, ids=[f"{layout.format} {layout.name}" for layout in LAYOUTS])
def test_rgb_every_layout_is_right_or_refused(layout: Layout):
    if layout.pixels is None:
        with pytest.raises(ImageError):
            open_image(layout.data).rgb()
        return
    image = open_image(layout.data).rgb()
    assert image.mode == "RGB"
    pixels = np.asarray(image).astype(float)
    assert pixels.shape == layout.pixels.shape
    assert np.abs(pixels - layout.pixels).max() <= layout.tolerance


def table() -> str:
    """Return the Markdown table of docs/images.md."""
    formats = ("TIFF", "PNG", "GIF", "BMP", "WEBP", "JPEG")
    rows: dict[str, dict[str, str]] = {}
    for layout in LAYOUTS:
        name = re.sub(r"orientation \d", "orientation", layout.name)
        rows.setdefault(name, {})[layout.format] = (
            "refused"
            if layout.pixels is None
            else "as written"
            if layout.source == "written"
            else f"as {layout.source}"
        )
    lines = ["| layout | " + " | ".join(formats) + " |", "|---" * (len(formats) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(row.get(kind, "") for kind in formats) + " |" for name, row in rows.items()]
    return "\n".join(lines)


def test_documented_table_is_the_tested_one():
    assert table() in DOCUMENT.read_text(), f"replace the table of {DOCUMENT.name} with:\n{table()}"


def test_open_image_tiff_of_many_reduced_pages_reads_few_of_them(monkeypatch: pytest.MonkeyPatch):
    pages = [Image.new("L", (8, 8), 9 * i) for i in range(9)]
    options = {"save_all": True, "append_images": pages[1:], "tiffinfo": {254: 1}}
    data = image_layouts.encode(pages[0], "TIFF", **options)
    reads: list[int] = []
    seek = TiffImagePlugin.TiffImageFile.seek
    monkeypatch.setattr(
        TiffImagePlugin.TiffImageFile, "seek", lambda self, page: (reads.append(page), seek(self, page))
    )
    monkeypatch.setattr(
        TiffImagePlugin.TiffImageFile, "n_frames", property(lambda self: pytest.fail("reads all pages"))
    )
    monkeypatch.setattr(tiff, "_MAX_PAGES", 4)
    assert open_image(data).rgb().getpixel((0, 0)) == (0, 0, 0)
    assert max(reads) == 3


def test_layout_of_many_samples_has_a_short_text():
    assert len(str(tiff.Layout(2, (8,) * 999, 1, (0,) * 996, False, True))) < 100


def test_open_image_jpeg_of_several_images_gives_the_first():
    image = Image.fromarray(deep(image_layouts.COLOURS, "u1"))
    data = image_layouts.encode(image, "MPO", save_all=True, append_images=[image.rotate(180)])
    first = image_layouts.encode(image, "JPEG")
    assert open_image(data).format == "MPO"
    assert np.array_equal(np.asarray(open_image(data).rgb()), np.asarray(open_image(first).rgb()))


def test_decoding_threads_leave_the_filters_of_warnings_as_they_were():
    before = list(warnings.filters)
    first, second = decode.as_image_errors(), decode.as_image_errors()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert warnings.filters[0][0] == "ignore"
    second.__exit__(None, None, None)
    assert warnings.filters == before


RAMP = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)  # 0 to 4095


def grey_of(data: bytes) -> np.ndarray:
    """Return the levels of a DICOM image, after a check that its channels are equal."""
    pixels = np.asarray(open_image(data).rgb()).astype(float)
    assert (pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all()
    return pixels[..., 0]


@pytest.mark.parametrize(
    ("data", "right"),
    [
        (dicom(deep(image_layouts.GREY, "u1")), 255 * image_layouts.GREY),
        (dicom(deep(image_layouts.GREY, "u1"), "MONOCHROME1"), 255 * (1 - image_layouts.GREY)),
        (dicom(RAMP, bits=12), 255.0 * RAMP / 4095),
        (dicom(RAMP, "MONOCHROME1", bits=12), 255 * (1 - RAMP / 4095)),
        (dicom(RAMP, bits=12, PresentationLUTShape="INVERSE"), 255 * (1 - RAMP / 4095)),
        # A window from 1000 to 2000. C.11.2.1.2.1: its ramp goes from c - 0.5 - (w - 1) / 2 to c - 0.5 + (w - 1) / 2.
        (dicom(RAMP, bits=12, WindowCenter=1500, WindowWidth=1000), 255 * ((RAMP - 1000.0) / 999).clip(0, 1)),
        (dicom(RAMP, bits=12, WindowCenter=["1500", "9"], WindowWidth=["1000", "9"]),
         255 * ((RAMP - 1000.0) / 999).clip(0, 1)),
        (dicom(RAMP, bits=12, RescaleSlope=2, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=400),
         255 * ((2.0 * RAMP - 1024 + 160) / 399).clip(0, 1)),
        (dicom(RAMP.astype(np.int16) - 2048, WindowCenter=0, WindowWidth=100, VOILUTFunction="LINEAR_EXACT"),
         255 * ((RAMP - 2048.0 + 50) / 100).clip(0, 1)),
        (dicom(RAMP.astype(np.int16) - 2048, WindowCenter=0, WindowWidth=400, VOILUTFunction="SIGMOID"),
         255 / (1 + np.exp(-4 * (RAMP - 2048.0) / 400))),
        (dicom(np.where(RAMP < 9, -2000, RAMP).astype(np.int16), PixelPaddingValue=-2000),
         255 * ((RAMP - 9.0) / 4086).clip(0, 1)),
        (dicom(RAMP.astype("u1") % 16, bits=4), RAMP % 16 * 17.0),
        (dicom(np.packbits(RAMP % 3 == 0, axis=1, bitorder="little"), bits=1, BitsAllocated=1, Columns=64),
         255.0 * (RAMP % 3 == 0)),
        (dicom(RAMP.astype(np.uint32) * 1000), 255 * (RAMP / 4095)),
    ],
    ids=["u1", "u1 inverted", "12 bits", "12 bits inverted", "inverse presentation", "window", "first of two windows",
         "rescale and window", "exact window", "sigmoid", "padding", "4 bits", "1 bit", "32 bits"],
)  # fmt: skip
def test_rgb_dicom_follows_its_rule(data: bytes, right: np.ndarray):
    assert np.abs(grey_of(data) - right).max() <= 1


def test_rgb_dicom_colours():
    pixels = deep(image_layouts.COLOURS, "u1")
    assert np.array_equal(np.asarray(open_image(dicom(pixels, "RGB")).rgb()), pixels)
    # JFIF: Y = 0.299 R + 0.587 G + 0.114 B, and the chroma are differences from it.
    luma = pixels @ [0.299, 0.587, 0.114]
    chroma = [128 + 0.564 * (pixels[..., 2] - luma), 128 + 0.713 * (pixels[..., 0] - luma)]
    ybr = np.rint(np.stack([luma, *chroma], -1)).clip(0, 255).astype(np.uint8)
    assert np.abs(np.asarray(open_image(dicom(ybr, "YBR_FULL")).rgb()).astype(float) - pixels).max() <= 3


@pytest.mark.parametrize("scale", [1, 256], ids=["8-bit levels", "16-bit levels"])
def test_rgb_dicom_palette_of_16_bits(scale: int):
    index = deep(image_layouts.GREY, "u1")
    palette = {}
    for name, levels in (("Red", np.arange(256)), ("Green", np.arange(256)[::-1]), ("Blue", np.zeros(256))):
        palette[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        palette[f"{name}PaletteColorLookupTableData"] = (levels * scale).astype("<u2").tobytes()
    pixels = np.asarray(open_image(dicom(index, "PALETTE COLOR", **palette)).rgb())
    assert np.array_equal(pixels, np.stack([index, 255 - index, np.zeros_like(index)], -1))


@pytest.mark.parametrize("file", ["SC_rgb_jpeg_dcmtk.dcm", "SC_rgb_rle.dcm", "SC_rgb_small_odd_big_endian.dcm"])
def test_rgb_dicom_of_other_transfer_syntaxes_is_as_pydicom(file: str):
    from pydicom.data import get_testdata_file
    from pydicom.pixels import pixel_array

    path = get_testdata_file(file, download=False)
    if path is None:
        pytest.skip(f"pydicom here has no {file}")
    assert np.array_equal(np.asarray(open_image(Path(path).read_bytes()).rgb()), pixel_array(path))


def with_syntax(data: bytes, uid: str, padding: int = 0) -> bytes:
    """Replace the transfer syntax of a DICOM file, and keep its pixels.

    padding: size in bytes of a private element before the transfer syntax.
    """
    old = b"\x02\0\x10\0UI\x14\x001.2.840.10008.1.2.1\0"
    assert old in data
    value = uid.encode() + b"\0" * (len(uid) % 2)
    private = b"\x02\0\x02\x01OB\0\0" + padding.to_bytes(4, "little") + bytes(padding) if padding else b""
    new = private + b"\x02\0\x10\0UI" + len(value).to_bytes(2, "little") + value
    length = int.from_bytes(data[140:144], "little") + len(new) - len(old)
    return (data[:140] + length.to_bytes(4, "little") + data[144:]).replace(old, new)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (dicom(RAMP, bits=12).replace(b"\x28\0\x04\0CS", b"\x28\0\x05\0CS"), "without PhotometricInterpretation"),
        (dicom(RAMP, bits=12, Columns=None), "DICOM"),
        (dicom(RAMP, bits=12, WindowCenter=1500, WindowWidth=1234).replace(b"1234", b"12x4"), "DICOM"),
        (with_syntax(dicom(RAMP), JPEGLosslessSV1), "JPEG Lossless.* not supported; save it without compression"),
        (with_syntax(dicom(np.zeros((999, 999), "u2")), DeflatedExplicitVRLittleEndian, 5000), "deflated DICOM"),
        (with_syntax(dicom(RAMP), "1.2.3.4"), "DICOM"),
        (dicom(np.zeros((3, 8, 8, 3), np.uint8), "RGB"), "3 frames"),
        (dicom(RAMP, bits=12)[:-50], "DICOM"),
        (dicom(RAMP, bits=12)[:300], "DICOM"),
        (dicom(RAMP, bits=12, WindowCenter=1500, WindowWidth=0), "window"),
        (dicom(np.zeros((8, 8, 3), np.uint16), "RGB"), "uint16"),
        (dicom(RAMP, bits=12, Rows=60000, Columns=60000), "too many pixels"),
    ],
)
def test_open_image_bad_dicom_is_refused_with_reason(data: bytes, reason: str):
    with pytest.raises(ImageError, match=reason) as caught:
        open_image(data).rgb()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "known format"),
        (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40), "JPEG 2000"),
        (b"\0\0\0\x20ftypavif" + bytes(40), "AVIF"),
        (b"%PDF-1.7 " + bytes(40), "PDF"),
        (b"<html><body>Not found</body></html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS"),
        (LAYOUTS[0].data[:60], "TIFF|truncated|format"),
    ],
)
def test_read_rgb_unknown_format_is_named_with_the_image(data: bytes, reason: str):
    with pytest.raises(UserError, match=f"image fig9 cannot be decoded: .*({reason})"):
        read_rgb(data, lambda: "fig9")


def test_read_rgb_open_clip_conversion_keeps_the_mode_of_the_file():
    [data] = [layout.data for layout in LAYOUTS if (layout.format, layout.name) == ("PNG", "palette")]
    assert read_rgb(data, lambda: "x", "open_clip").mode == "P"
    [data] = [layout.data for layout in LAYOUTS if (layout.format, layout.name) == ("JPEG", "orientation 6")]
    assert read_rgb(data, lambda: "x", "open_clip").size == (image_layouts.WIDTH, image_layouts.HEIGHT)
    [data] = [layout.data for layout in LAYOUTS if layout.name == "grey u1 with associated alpha"]
    with pytest.raises(UserError, match="image x cannot be decoded: Pillow does not convert"):
        read_rgb(data, lambda: "x", "open_clip")


@pytest.mark.parametrize("conversion", ["standard", "open_clip"])
@pytest.mark.parametrize("level", [0, 6])
def test_png_with_a_changed_bit_of_its_pixels_is_refused(conversion: str, level: int):
    """Pillow checks neither the checksum of the chunk nor that of the compressed data."""
    pixels = np.random.default_rng(0).integers(0, 99, (40, 60, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=level)
    whole = buffer.getvalue()
    for place in range(whole.index(b"IDAT") + 4, len(whole) - 20, 997):
        damaged = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
        with pytest.raises(UserError, match="image x cannot be decoded: PNG with a wrong checksum"):
            read_rgb(damaged, lambda: "x", conversion)  # type: ignore[arg-type]
    assert np.array_equal(np.asarray(read_rgb(whole, str, conversion)), pixels)  # type: ignore[arg-type]

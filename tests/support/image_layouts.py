"""Image files of every layout that the decoder accepts or refuses, with their correct pixels.

tifffile, an independent writer, makes the TIFF files. The correct pixels follow from the arrays and the stated rules,
without Pillow.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tifffile
from PIL import Image

HEIGHT, WIDTH = 24, 37
_ROWS, _COLUMNS = np.mgrid[0:HEIGHT, 0:WIDTH]
GREY = ((_ROWS * 7 + _COLUMNS * 3) % 251) / 250.0  # within [0, 1]
COLOURS = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], -1)
ALPHA = np.where(_COLUMNS < 12, 0.0, np.where(_COLUMNS < 24, 0.5, 1.0))


class Layout(NamedTuple):
    """A file and its correct pixels.

    format, name: place in the table of docs/images.md.
    pixels: (H, W, 3) in levels of 0 to 255, or None if the decoder must refuse the file.
    source: who wrote the file: "tifffile", "Pillow", or "written" by hand.
    tolerance: largest difference in levels.
    """

    format: str
    name: str
    data: bytes
    pixels: np.ndarray | None
    source: str
    tolerance: float = 1.0


def deep(values: np.ndarray, dtype: str) -> np.ndarray:
    """Scale values within [0, 1] to the positive range of an integer type. A float type keeps them."""
    kind = np.dtype(dtype)
    return values.astype(kind) if kind.kind == "f" else np.rint(values * float(np.iinfo(kind).max)).astype(kind)


def rgb(values: np.ndarray) -> np.ndarray:
    """Return (H, W, 3) levels of grey or colour values within [0, 1]."""
    return 255.0 * (np.repeat(values[..., None], 3, -1) if values.ndim == 2 else values)


def over_white(values: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return rgb(values) * alpha[..., None] + 255.0 * (1 - alpha[..., None])


def tiff(pixels: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **({"photometric": "minisblack"} | options))
    return buffer.getvalue()


def packed_tiff(values: np.ndarray, bits: int, photometric: int) -> bytes:
    """Write an uncompressed little-endian TIFF with packed samples and rows that start at a byte (TIFF 6.0)."""
    places = np.arange(bits)[::-1]
    stored = np.packbits((values[..., None] >> places & 1).astype(np.uint8).reshape(len(values), -1), axis=1)
    height, width = values.shape
    entries = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1)]
    entries += [(278, height), (279, stored.size)]
    directory = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in entries)
    header = b"II*\0" + struct.pack("<I", 8 + stored.size + stored.size % 2)
    pixels = stored.tobytes() + bytes(stored.size % 2)
    return header + pixels + struct.pack("<H", len(entries)) + directory + bytes(4)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tiffs() -> Iterator[Layout]:
    """TIFF files of grey, colour and alpha layouts."""

    def case(name: str, pixels: np.ndarray, right: np.ndarray | None, **options: Any) -> Layout:
        tolerance = 2.0 if "CIELAB" in name or "associated" in name else 1.0
        return Layout("TIFF", name, tiff(pixels, **options), right, "tifffile", tolerance)

    for order, bytes_name in (("<", "little-endian"), (">", "big-endian")):
        for dtype in ("u1", "u2", "i2", "u4", "i4", "f4"):
            # A signed type holds its positive half. 32-bit integers go from their minimum to their maximum.
            right = rgb(GREY / 2) if dtype == "i2" else rgb(GREY)
            accepted = not (dtype == "u4" and order == ">")
            yield case(f"grey {dtype}, {bytes_name}", deep(GREY, dtype), right if accepted else None, byteorder=order)
        white = {"photometric": "miniswhite", "byteorder": order}
        yield case(f"white-is-zero u1, {bytes_name}", deep(GREY, "u1"), rgb(1 - GREY), **white)
        accepted = order == "<"
        yield case(f"white-is-zero u2, {bytes_name}", deep(GREY, "u2"), rgb(1 - GREY) if accepted else None, **white)
        for planes in ("contig", "separate"):
            for dtype in ("u1", "u2"):
                pixels = deep(COLOURS, dtype)
                stored = np.moveaxis(pixels, -1, 0) if planes == "separate" else pixels
                options = {"photometric": "rgb", "planarconfig": planes, "byteorder": order}
                right = None if (planes, dtype) == ("separate", "u2") else rgb(COLOURS)
                yield case(f"RGB {dtype} {planes}, {bytes_name}", stored, right, **options)
                yield case(
                    f"RGB {dtype} {planes} deflate, {bytes_name}",
                    stored,
                    rgb(COLOURS),
                    compression="zlib",
                    **options,
                )
    for dtype in ("i1", "f2", "f8"):
        yield case(f"grey {dtype}", deep(GREY, dtype) - (1 if dtype == "i1" else 0), None)
    for dtype in ("i1", "i2", "f4"):
        yield case(f"white-is-zero {dtype}", deep(GREY, dtype), None, photometric="miniswhite")
    yield case("RGB f4", deep(COLOURS, "f4"), None, photometric="rgb")
    yield case("grey f4 with NaN", np.where(_ROWS == 3, np.nan, GREY).astype("f4"), None)
    yield case("grey i2 with negative values", np.rint((GREY - 0.5) * 60000).astype("i2"), rgb(GREY))
    for bits in (10, 12, 14):
        values = np.rint(GREY * (2**bits - 1)).astype("u2")
        yield case(f"grey of {bits} bits in 16", values, rgb(GREY))
        data = packed_tiff(values, bits, 1)
        yield Layout("TIFF", f"grey of {bits} packed bits", data, rgb(GREY) if bits == 12 else None, "written")
    for bits in (1, 2, 4):
        values = np.rint(GREY * (2**bits - 1)).astype("u2")
        right = rgb(values / (2**bits - 1))
        yield Layout("TIFF", f"grey of {bits} packed bits", packed_tiff(values, bits, 1), right, "written")
        data = packed_tiff(values, bits, 0)
        yield Layout("TIFF", f"white-is-zero of {bits} packed bits", data, 255 - right, "written")
    palette = np.stack([np.arange(256) * 257, np.arange(256)[::-1] * 257, np.zeros(256)]).astype("u2")
    index = deep(GREY, "u1")
    right = np.moveaxis(palette[:, index], 0, -1) / 257.0
    yield case("palette", index, right, photometric="palette", colormap=palette)
    for dtype in ("u1", "u2"):
        for extra, meaning in (("unassalpha", "alpha"), ("assocalpha", "associated alpha"), ("unspecified", "unused")):
            premultiplied = extra == "assocalpha"
            colours = COLOURS * ALPHA[..., None] if premultiplied else COLOURS
            grey = GREY * ALPHA if premultiplied else GREY
            unused = extra == "unspecified"
            right = rgb(COLOURS) if unused else over_white(COLOURS, ALPHA)
            stored = deep(np.concatenate([colours, ALPHA[..., None]], -1), dtype)
            yield case(f"RGB {dtype} with {meaning}", stored, right, photometric="rgb", extrasamples=[extra])
            right = rgb(GREY) if unused else over_white(GREY, ALPHA)
            stored = deep(np.stack([grey, ALPHA], -1), dtype)
            accepted = dtype == "u1"
            options = {"planarconfig": "contig", "extrasamples": [extra]}
            yield case(f"grey {dtype} with {meaning}", stored, right if accepted else None, **options)
    stored = deep(np.concatenate([COLOURS, np.zeros_like(ALPHA)[..., None]], -1), "u1")
    yield case("RGB u1 with alpha 0", stored, rgb(COLOURS), photometric="rgb", extrasamples=["unassalpha"])
    inks = np.concatenate([1 - COLOURS, np.zeros((HEIGHT, WIDTH, 1))], -1)
    for dtype in ("u1", "u2"):
        for planes in ("contig", "separate"):
            stored = deep(inks, dtype)
            stored = np.moveaxis(stored, -1, 0) if planes == "separate" else stored
            right = None if (planes, dtype) == ("separate", "u2") else rgb(COLOURS)
            yield case(f"CMYK {dtype} {planes}", stored, right, photometric="separated", planarconfig=planes)
    lab = np.stack([120 + 60 * GREY, 20 * GREY[::-1] - 10, 20 * GREY[:, ::-1] - 10], -1).round()
    yield case("CIELAB", lab.astype(np.int16).astype(np.uint8),
               lab_to_rgb(lab), photometric="cielab")  # fmt: skip
    separate = np.moveaxis(lab.astype(np.int16).astype(np.uint8), -1, 0)
    yield case("CIELAB separate", separate, None, photometric="cielab", planarconfig="separate")
    yield case("tiles", deep(COLOURS, "u1"), rgb(COLOURS), photometric="rgb", tile=(16, 16))
    yield case("tiles of 16 bits in planes", np.moveaxis(deep(COLOURS, "u2"), -1, 0), None,
               photometric="rgb", planarconfig="separate", tile=(16, 16))  # fmt: skip
    yield case("BigTIFF", deep(COLOURS, "u1"), rgb(COLOURS), photometric="rgb", bigtiff=True)
    for orientation in range(1, 9):
        data = tiff(deep(COLOURS, "u1"), photometric="rgb", extratags=[(274, "H", 1, orientation, True)])
        yield Layout("TIFF", f"orientation {orientation}", data, turned(rgb(COLOURS), orientation), "tifffile")
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(np.zeros((4, 6, 3), "u1"), photometric="rgb", subfiletype=1)
        writer.write(deep(COLOURS, "u1"), photometric="rgb")
    yield Layout("TIFF", "reduced first page", buffer.getvalue(), rgb(COLOURS), "tifffile")
    image = Image.fromarray(deep(COLOURS, "u1"))
    for compression in ("tiff_lzw", "packbits", "tiff_adobe_deflate"):
        yield Layout("TIFF", compression, encode(image, "TIFF", compression=compression), rgb(COLOURS), "Pillow")


def lab_to_rgb(lab: np.ndarray) -> np.ndarray:
    """Convert CIELAB of a TIFF (L of 0 to 255, a and b signed, white D50) to levels of sRGB (IEC 61966-2-1)."""
    y = (lab[..., 0] / 2.55 + 16) / 116
    f = np.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], -1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * (0.9642, 1.0, 0.8249)
    # From D50 to linear sRGB, with Bradford's adaptation to D65.
    linear = xyz @ np.array([[3.1339, -1.6169, -0.4906], [-0.9788, 1.9161, 0.0335], [0.0719, -0.2290, 1.4052]]).T
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return the upright pixels of an image with an orientation tag (TIFF 6.0, section 8)."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    rows = orientation in (3, 4, 7, 8)
    columns = orientation in (2, 3, 6, 7)
    return pixels[:: -1 if rows else 1, :: -1 if columns else 1]


def exif(orientation: int) -> bytes:
    return b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0" + bytes([orientation]) + b"\0" * 7


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def with_png_chunk(data: bytes, kind: bytes, content: bytes) -> bytes:
    """Insert a chunk after the header of a PNG."""
    return data[:33] + png_chunk(kind, content) + data[33:]


def others() -> Iterator[Layout]:
    """PNG, GIF, BMP, WebP and JPEG files."""
    smooth = np.stack([_ROWS / (HEIGHT - 1), _COLUMNS / (WIDTH - 1), np.full((HEIGHT, WIDTH), 0.4)], -1)
    image, photograph = Image.fromarray(deep(COLOURS, "u1")), Image.fromarray(deep(smooth, "u1"))
    grey = Image.fromarray(deep(GREY, "u1"))
    transparent = np.concatenate([deep(COLOURS, "u1"), deep(ALPHA, "u1")[..., None]], -1)
    png = encode(image, "PNG")
    for kind, options in (("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True})):
        yield Layout(kind, "RGB u1", encode(image, kind, **options), rgb(COLOURS), "Pillow")
        if kind != "BMP":
            data = encode(Image.fromarray(transparent), kind, **options, **({"exact": True} if options else {}))
            yield Layout(kind, "RGB u1 with alpha", data, over_white(COLOURS, ALPHA), "Pillow")
            blank = transparent.copy()
            blank[..., 3] = 0
            data = encode(Image.fromarray(blank), kind, **options, **({"exact": True} if options else {}))
            yield Layout(kind, "RGB u1 with alpha 0", data, rgb(COLOURS), "Pillow")
            for orientation in (3, 6, 8):
                data = encode(image, kind, exif=exif(orientation), **options)
                yield Layout(kind, f"orientation {orientation}", data, turned(rgb(COLOURS), orientation), "Pillow")
    yield Layout("PNG", "grey u1", encode(grey, "PNG"), rgb(GREY), "Pillow")
    yield Layout("PNG", "grey u2", encode(Image.fromarray(deep(GREY, "u2")), "PNG"), rgb(GREY), "Pillow")
    twelve = np.rint(GREY * 4095).astype("u2")
    yield Layout("PNG", "grey of 12 bits in 16", encode(Image.fromarray(twelve), "PNG"), rgb(GREY), "Pillow")
    grey_alpha = Image.fromarray(np.stack([deep(GREY, "u1"), deep(ALPHA, "u1")], -1))
    yield Layout("PNG", "grey u1 with alpha", encode(grey_alpha, "PNG"), over_white(GREY, ALPHA), "Pillow")
    bilevel = Image.fromarray(GREY > 0.5)
    yield Layout("PNG", "bilevel", encode(bilevel, "PNG"), rgb((GREY > 0.5).astype(float)), "Pillow")
    indexed = grey.convert("P")
    yield Layout("PNG", "palette", encode(indexed, "PNG"), rgb(GREY), "Pillow")
    transparent_index = int(deep(GREY, "u1")[0, 0])
    hidden = np.where(deep(GREY, "u1") == transparent_index, 1.0, GREY)
    data = encode(indexed, "PNG", transparency=transparent_index)
    yield Layout("PNG", "palette with transparent colour", data, rgb(hidden), "Pillow")
    profile = zlib.compress(bytes(2 << 20), 9)
    yield Layout("PNG", "colour profile of 2 MiB", with_png_chunk(png, b"iCCP", b"icc\0\0" + profile), rgb(COLOURS),
                 "Pillow")  # fmt: skip
    text = b"Comment\0\0" + zlib.compress(bytes(64 << 20), 9)
    yield Layout("PNG", "text of 64 MiB", with_png_chunk(png, b"zTXt", text), rgb(COLOURS), "Pillow")
    yield Layout("GIF", "palette", encode(grey, "GIF"), rgb(GREY), "Pillow")
    data = encode(indexed, "GIF", transparency=transparent_index)
    yield Layout("GIF", "palette with transparent colour", data, rgb(hidden), "Pillow")
    quality = {"quality": 100, "subsampling": 0}
    yield Layout("JPEG", "RGB u1", encode(photograph, "JPEG", **quality), rgb(smooth), "Pillow", 4)
    yield Layout("JPEG", "grey u1", encode(photograph.getchannel(1), "JPEG", quality=100), rgb(smooth[..., 1]),
                 "Pillow", 4)  # fmt: skip
    cmyk = Image.fromarray(deep(np.concatenate([1 - smooth, np.zeros((HEIGHT, WIDTH, 1))], -1), "u1"), "CMYK")
    yield Layout("JPEG", "CMYK u1 contig", encode(cmyk, "JPEG", **quality), rgb(smooth), "Pillow", 6)
    for orientation in (3, 6, 8):
        data = encode(photograph, "JPEG", exif=exif(orientation), **quality)
        yield Layout("JPEG", f"orientation {orientation}", data, turned(rgb(smooth), orientation), "Pillow", 4)

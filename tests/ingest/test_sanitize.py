"""Sanitised images: a rule for every mode, unchanged bytes of good JPEGs, and reasons against bad or hostile files."""

from __future__ import annotations

import io
import json
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from articles import encode_image as encode
from PIL import Image, ImageOps

from bclip_fast.data.image_files import jpeg as jpeg_module
from bclip_fast.ingest import sanitize as module
from bclip_fast.ingest.sanitize import SanitizeError, sanitize
from bclip_fast.ops import image as image_operator


def decode(data: bytes) -> np.ndarray:
    """Return the pixels, after the checks that apply to every output."""
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.mode) == ("JPEG", "RGB")
    assert "progressive" not in image.info
    assert not image.getexif()
    return np.asarray(image).astype(int)


def gradient(height: int = 40, width: int = 60, channels: int = 3) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    parts = [rows * 255 // (height - 1), columns * 255 // (width - 1), (rows + columns) * 2]
    return np.stack(parts[:channels], -1).astype(np.uint8)


RGB = Image.fromarray(gradient())
GREY = Image.fromarray(gradient()[..., 0])


def test_sanitize_good_jpeg_keeps_its_bytes():
    data = encode(RGB, "JPEG", quality=61)
    result = sanitize(data)
    assert result.data == data
    assert (result.width, result.height, result.source_format, result.source_mode) == (60, 40, "JPEG", "RGB")


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled decoder", "Pillow alone"])
@pytest.mark.parametrize("tail", [bytes(4096), b"Canon" + bytes(range(255)) * 9], ids=["zeros", "trailer"])
def test_sanitize_jpeg_without_end_is_encoded_again(tail, compiled, monkeypatch):
    """Pillow reads such a file, because bytes follow it. Training refuses it."""
    whole = encode(RGB, "JPEG", quality=61)
    data = whole[:-2] + tail
    with pytest.raises(ValueError, match="Premature end"):
        image_operator.decode(data, backend="cpu")
    if not compiled:
        monkeypatch.setattr(jpeg_module, "find_spec", lambda name: None)
    result = sanitize(data)
    assert result.data != data
    assert image_operator.decode(result.data, backend="cpu").shape == (40, 60, 3)
    assert np.abs(decode(result.data) - gradient()).mean() < 4
    # Bytes after the end do no harm, so the file keeps them.
    assert sanitize(whole + tail).data == whole + tail


@pytest.mark.parametrize(
    "data",
    [
        encode(RGB, "JPEG", progressive=True),
        encode(RGB, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"),
        encode(GREY, "JPEG"),
        encode(RGB.convert("CMYK"), "JPEG"),
    ],
    ids=["progressive", "turned by EXIF", "grey", "CMYK"],
)
def test_sanitize_other_jpeg_keeps_its_pixels(data):
    result = sanitize(data)
    assert result.data != data
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")).astype(int)
    assert decode(result.data).shape == expected.shape
    assert np.abs(decode(result.data) - expected).mean() < 3


def with_alpha(mode: str) -> Image.Image:
    alpha = Image.new("L", RGB.size, 255)
    alpha.paste(0, (0, 0, 30, 40))
    image = RGB.copy() if mode == "RGBA" else GREY.copy()
    image.putalpha(alpha)
    return image


def over_white(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image.convert("RGB")).astype(int).copy()
    pixels[:, :30] = 255
    return pixels


PALETTE = RGB.quantize(16)
ONE_BIT = Image.fromarray(gradient()[..., 1] > 127)
SIXTEEN = Image.fromarray(gradient()[..., 1].astype(np.uint16) * 257)
FLOAT = Image.fromarray(gradient()[..., 1].astype(np.float32) / 255)
WIDE = Image.fromarray(gradient()[..., 1].astype(np.int32) * 1_000_000 - 5)
COLUMNS = np.repeat(gradient()[..., 1:2], 3, -1).astype(int)


@pytest.mark.parametrize(
    ("data", "expected", "limit"),
    [
        (encode(RGB, "PNG"), gradient(), 3),
        (encode(RGB, "WEBP", lossless=True), gradient(), 3),
        (encode(RGB, "BMP"), gradient(), 3),
        (encode(RGB, "TIFF", compression="tiff_lzw"), gradient(), 3),
        (encode(PALETTE, "PNG"), np.asarray(PALETTE.convert("RGB")), 6),
        (encode(ONE_BIT, "PNG"), np.repeat(np.asarray(ONE_BIT)[..., None], 3, -1) * 255, 2),
        (encode(ONE_BIT, "TIFF", compression="group4"), np.repeat(np.asarray(ONE_BIT)[..., None], 3, -1) * 255, 2),
        (encode(SIXTEEN, "PNG"), COLUMNS, 2),
        (encode(SIXTEEN, "TIFF"), COLUMNS, 2),
        (encode(FLOAT, "TIFF"), COLUMNS, 2),
        (encode(WIDE, "TIFF"), COLUMNS, 2),
        (encode(with_alpha("RGBA"), "PNG"), over_white(RGB), 4),
        (encode(with_alpha("LA"), "PNG"), over_white(GREY), 4),
        (encode(with_alpha("RGBA"), "WEBP", lossless=True), over_white(RGB), 4),
        (encode(Image.new("P", (60, 40), 0), "PNG", transparency=0), np.full((40, 60, 3), 255), 1),
        (encode(Image.new("RGB", (60, 40), "red"), "PNG", transparency=(255, 0, 0)), np.full((40, 60, 3), 255), 1),
        (encode(GREY, "GIF", save_all=True, append_images=[Image.new("L", GREY.size)]), gradient()[..., [0, 0, 0]], 2),
        (encode(GREY, "TIFF", save_all=True, append_images=[Image.new("L", GREY.size)]), gradient()[..., [0, 0, 0]], 2),
        (encode(RGB.convert("CMYK"), "TIFF"), np.asarray(RGB.convert("CMYK").convert("RGB")), 3),
    ],
)
def test_sanitize_mode_follows_its_rule(data, expected, limit):
    pixels = decode(sanitize(data).data)
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected).mean() < limit


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_sanitize_shorter_side_is_bounded_and_never_enlarged(kind):
    image = Image.fromarray(gradient(900, 1500))
    data = encode(image, kind)
    result = sanitize(data, max_short_side=384)
    assert (result.width, result.height) == (640, 384)
    assert (result.source_width, result.source_height) == (1500, 900)
    expected = np.asarray(image.resize((640, 384), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(decode(result.data) - expected).mean() < 3
    assert sanitize(data, max_short_side=900).height == 900
    unlimited = sanitize(data, max_short_side=0)
    assert (unlimited.width, unlimited.height) == (1500, 900)


def bomb_png(side: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1 << 20), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not an image"),
        (b"<html><body>Not found</body></html>", "not read: HTML"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not read: PostScript"),
        (encode(RGB, "JPEG")[:-20], "cannot be decoded"),
        (encode(RGB, "JPEG")[:300], "cannot be decoded|not an image"),
        (encode(RGB, "PNG")[:-40], "cannot be decoded"),
        (encode(RGB, "TIFF")[:3000], "cannot be decoded"),
        (bomb_png(9_000), "too many pixels"),
        (bomb_png(60_000), "too many pixels"),
        (bomb_png(5_000), "cannot be decoded"),
        (encode(Image.new("RGB", (500, 1)), "PNG"), "single pixel row"),
        (encode(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"), "not finite numbers"),
    ],
)
def test_sanitize_bad_file_is_refused_with_reason(data, reason):
    with pytest.raises(SanitizeError, match=reason) as caught:
        sanitize(data)
    assert "\n" not in str(caught.value)


def test_sanitize_too_many_bytes_is_refused(monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", 100)
    with pytest.raises(SanitizeError, match="larger than"):
        sanitize(encode(RGB, "PNG"))


ODD = """
import json, resource, sys
from pathlib import Path
from bclip_fast.ingest.sanitize import SanitizeError, sanitize
from bclip_fast.ops.image import decode
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
folder, names = Path(sys.argv[1]), json.load(sys.stdin)
for name in names:
    try:
        result = sanitize((folder / name).read_bytes())
        assert tuple(decode(result.data).shape) == (result.height, result.width, 3)
        answer = "ok"
    except SanitizeError as error:
        answer = str(error)
    print(json.dumps([name, answer]))
# ru_maxrss would include the memory of the parent at the fork.
print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))
"""


def test_sanitize_odd_and_hostile_files_in_bounded_time_and_memory(shared_data):
    """Compare the results for 400 files of other projects' test suites with Pillow's."""
    folder = shared_data / "images_odd"
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    rows = random.Random(0).sample(rows, 400)
    process = subprocess.run(
        [sys.executable, "-c", ODD, str(folder)],
        input=json.dumps([row["file"] for row in rows]),
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.returncode == 0, process.stderr[-2000:]
    *answers, memory = process.stdout.splitlines()
    assert int(memory) < 2 << 20  # KiB
    refused = 0
    for row, (name, answer) in zip(rows, map(json.loads, answers), strict=True):
        assert name == row["file"]
        if answer == "ok":
            continue
        refused += 1
        if row["ok"]:
            # sanitize also refuses formats that articles don't use, images that cannot be figures, and damaged JPEGs.
            damage = "image cannot be decoded: Corrupt JPEG data"
            assert answer.startswith(("not an image", "image in a format", "image of", damage)), (row, answer)
    assert 50 < refused < 350


def test_sanitize_image_longer_than_a_jpeg_is_refused():
    data = encode(Image.new("L", (2, 65_501)), "PNG")
    with pytest.raises(SanitizeError, match="image of more than 65500 pixels on a side"):
        sanitize(data, max_short_side=0)
    assert sanitize(encode(Image.new("L", (2, 65_500)), "PNG"), max_short_side=0).height == 65_500

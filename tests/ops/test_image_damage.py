"""JPEG files with damaged scan data are refused wherever libjpeg or the brightness of a block shows it."""

from __future__ import annotations

import random

import numpy as np
import pytest
from jpegs import MODES, OPTIONS, jpeg
from oracle import collected_if, every_backend
from PIL import Image

from bclip_fast import ops
from bclip_fast.data.image_files import ImageError, decode_as_loaders, read_rgb
from bclip_fast.errors import UserError
from bclip_fast.ingest.sanitize import SanitizeError, sanitize

decodes = collected_if("cpu" in every_backend("image"))


def zeroed(data: bytes, place: int) -> bytes:
    return data[:place] + bytes(50) + data[place + 50 :]


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :]


def dropped(data: bytes, place: int) -> bytes:
    return data[:place] + data[place + 1 :]


def repeated(data: bytes, place: int) -> bytes:
    return data[: place + 64] + data[place:]


def places_in(data: bytes, count: int) -> list[int]:
    """Random places in the scans, at least 100 bytes before the end."""
    return [random.Random(count).randrange(data.index(b"\xff\xda") + 14, len(data) - 102) for _ in range(count)]


def is_refused(data: bytes) -> bool:
    try:
        decode_as_loaders(data)
        return False
    except ImageError:
        return True


@decodes
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_damaged_scan_is_refused_by_every_decoder(mode, options):
    whole = jpeg(mode, (300, 200), quality=90, **options)
    damaged = next(data for place in places_in(whole, 50) if is_refused(data := zeroed(whole, place)))
    with pytest.raises(ValueError, match="JPEG cannot be decoded: Corrupt JPEG data"):
        ops.image.decode(damaged)
    for exact in (True, False):
        arguments = {"crop": "squash", "exact": exact}
        with pytest.raises(ValueError, match=r'file 1 of 2: JPEG cannot.*Corrupt.*; on_bad="report" returns'):
            ops.image.decode_resize([whole, damaged], 64, **arguments)
        pixels, errors = ops.image.decode_resize([whole, damaged], 64, on_bad="report", **arguments)
        assert list(errors) == [1]
        assert pixels[0].any()
        assert not pixels[1].any()
    with pytest.raises(ValueError, match=r"file 0 of 3 \(and 1 others\): JPEG cannot"):
        ops.image.decode_resize_normalize([damaged, whole, b"?"], 64, device="cpu")
    for conversion in ("standard", "open_clip"):
        with pytest.raises(UserError, match="image x cannot be decoded: Corrupt JPEG data"):
            read_rgb(damaged, lambda: "x", conversion)
    for max_short_side in (0, 60):
        with pytest.raises(SanitizeError, match="image cannot be decoded: Corrupt JPEG data"):
            sanitize(damaged, max_short_side=max_short_side)


@decodes
def test_most_single_damages_are_refused():
    """The shares of 480 damages. The decoders of libjpeg and Pillow refuse fewer than 5 % of them."""
    files = [jpeg(size=(400, 300), quality=90), jpeg(size=(300, 400), quality=75, subsampling=0), jpeg("L", (500, 300))]
    for damage, least in ((zeroed, 0.85), (repeated, 0.85), (dropped, 0.4), (flipped, 0.25)):
        outcomes = [is_refused(damage(data, place)) for data in files for place in places_in(data, 40)]
        assert np.mean(outcomes) >= least, (damage.__name__, np.mean(outcomes))


@decodes
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_intact_file_of_an_odd_writer_decodes(options):
    whole = jpeg(size=(120, 90), **options)
    expected = ops.image.decode(whole)
    scan = whole.index(b"\xff\xda")
    for data in (
        whole + bytes(100),
        whole + b"\xff\xd8\xff\xe1 a preview \xff\xd9",
        whole[:-2] + b"\xff" * 7 + whole[-2:],  # fill bytes before a marker
        whole[:scan] + b"\xff\xff" + whole[scan:],
        whole[:scan] + b"junk" + whole[scan:],  # between two segments of the header
        whole[:2] + b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x01" + whole[2:],
    ):
        assert ops.image.decode(data).equal(expected)
        assert np.array_equal(np.asarray(read_rgb(data, str)), expected.numpy())


@decodes
@pytest.mark.parametrize("mode", MODES)
def test_extreme_brightness_is_not_damage(mode):
    """Blocks of black and white beside sharp edges, at every coarseness of the quantisation."""
    pixels = np.zeros((96, 128, len(Image.new(mode, (1, 1)).getbands())), np.uint8)
    pixels[:48, ::2], pixels[48:, 5:90], pixels[:, 100:] = 255, 255, 255
    for quality in (1, 5, 20, 50, 75, 95, 100):
        for options in OPTIONS:
            data = jpeg(mode, pixels=pixels, quality=quality, **options)
            assert not is_refused(data), (quality, options)


@decodes
def test_real_images_are_readable(shared_data):
    """Every fourth JPEG of the real data but those of other projects' tests of damage."""
    paths = [path for path in shared_data.rglob("*.jp*g") if "images_odd" not in path.parts]
    assert len(paths) > 1000
    refused = [path.name for path in sorted(paths)[::4] if is_refused(path.read_bytes())]
    assert refused == []

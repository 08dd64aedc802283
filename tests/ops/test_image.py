from __future__ import annotations

import io
import json
import threading

import numpy as np
import pytest
import torch
from oracle import every_backend, skip_if_refused
from PIL import Image

from bclip_fast import ops
from bclip_fast.ops.image import LIMITS

MODES = ["RGB", "L", "CMYK"]


def jpeg(mode="RGB", size=(53, 37), **options) -> bytes:
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    channels = len(Image.new(mode, (1, 1)).getbands())
    noise = np.random.default_rng(0).integers(0, 40, (height, width, channels))
    pixels = (np.stack([x * 3 + y * (c + 1) for c in range(channels)], -1) + noise) % 256
    image = Image.fromarray(pixels.astype(np.uint8).squeeze(), mode)
    out = io.BytesIO()
    image.save(out, "JPEG", **options)
    return out.getvalue()


@pytest.mark.parametrize("backend", every_backend(LIMITS))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0, "quality": 95}, {"quality": 20}], ids=str
)
def test_matches_reference(backend, mode, options, nan_filled):
    skip_if_refused(LIMITS, backend, b"")
    data = jpeg(mode, **options)
    pixels = ops.image.decode(data, backend=backend)
    assert pixels.shape == (37, 53, 3) and pixels.dtype == torch.uint8
    expected = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(pixels.numpy(), expected)
    assert ops.image.peek_size(data, backend=backend) == (37, 53)


def test_exif_orientation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert ops.image.decode(jpeg(exif=exif)).shape == (37, 53, 3)


@pytest.mark.parametrize("backend", every_backend(LIMITS))
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not a JPEG"),
        (b"<html>not found</html>", "not a JPEG"),
        (jpeg()[:20], "not a JPEG"),
        (jpeg(size=(300, 200))[:-5000], "cannot be decoded"),
        (jpeg()[:-20], "cannot be decoded"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "not a JPEG"),
    ],
    ids=["empty", "html", "header", "half", "tail", "png"],
)
def test_broken_files_are_refused(backend, data, words):
    skip_if_refused(LIMITS, backend, b"")
    with pytest.raises(ValueError, match=words):
        ops.image.decode(data, backend=backend)


@pytest.mark.parametrize("backend", every_backend(LIMITS))
def test_a_bomb_is_refused_from_its_header(backend):
    skip_if_refused(LIMITS, backend, b"")
    data = bytearray(jpeg())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = b"\xff\xdc\xff\xdc"  # 65500 x 65500
    with pytest.raises(ValueError, match="exceeds"):
        ops.image.decode(bytes(data), backend=backend)


def test_threads_decode_side_by_side():
    files = [jpeg(quality=quality) for quality in (30, 60, 90)]
    expected = [ops.image.decode(data) for data in files]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(50):
            if not torch.equal(ops.image.decode(files[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index % 3,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_agrees_with_pillow_on_real_figures(shared_data):
    files = sorted((shared_data / "pmc_articles").rglob("*.jpg"))[::12]
    assert len(files) > 40
    for path in files:
        data = path.read_bytes()
        ours, theirs = (ops.image.decode(data, backend=name) for name in ("cpu", "reference"))
        assert torch.equal(ours, theirs), path.name


def test_odd_jpegs_never_crash_and_agree_with_pillow(shared_data):
    """Hostile and damaged files: Pillow's verdict but for a handful, and its pixels where both accept."""
    manifest = [json.loads(line) for line in (shared_data / "images_odd/manifest.jsonl").read_text().splitlines()]
    paths = sorted(shared_data / "images_odd" / row["file"] for row in manifest)
    counts = {"equal": 0, "differ": 0, "both refuse": 0, "one refuses": 0}
    for path in paths:
        data = path.read_bytes() if path.is_file() else b""
        if data[:2] != b"\xff\xd8":
            continue
        results = []
        for backend in ("cpu", "reference"):
            try:
                results.append(ops.image.decode(data, max_pixels=4_000_000, backend=backend))
            except ValueError:
                results.append(None)
        ours, theirs = results
        if ours is None or theirs is None:
            counts["both refuse" if ours is theirs else "one refuses"] += 1
        else:
            counts["equal" if torch.equal(ours, theirs) else "differ"] += 1
    assert counts["equal"] > 100
    # Lossless JPEG, ends inside the last block, and files that Pillow's own parser rejects before libjpeg sees them.
    assert counts["one refuses"] <= 12 and counts["differ"] <= 3, counts

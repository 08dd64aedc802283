from __future__ import annotations

import io
import json
import threading

import numpy as np
import PIL
import pytest
import torch
from jpegs import MODES, OPTIONS, SIZES, boxes_in, jpeg
from oracle import collected_if, every_backend
from pairwise import pairwise
from PIL import Image

from bclip_fast import ops

# Tests that need a build with libjpeg-turbo.
decodes = collected_if("cpu" in every_backend("image"))


@pairwise(
    backend=every_backend("image"),
    mode=MODES,
    options=[{}, {"progressive": True}, {"subsampling": 0, "quality": 95}, {"quality": 20}],
)
def test_decoded_pixels_equal_pillows(backend, mode, options, nan_filled):
    data = jpeg(mode, **options)
    pixels = ops.image.decode(data, backend=backend)
    assert pixels.shape == (37, 53, 3)
    assert pixels.dtype == torch.uint8
    expected = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(pixels.numpy(), expected)
    assert ops.image.peek_size(data, backend=backend) == (37, 53)


def test_exif_orientation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert ops.image.decode(jpeg(exif=exif)).shape == (37, 53, 3)


@pytest.mark.parametrize("backend", every_backend("image"))
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
def test_broken_file_raises_an_error(backend, data, words):
    with pytest.raises(ValueError, match=words):
        ops.image.decode(data, backend=backend)


@pytest.mark.parametrize("backend", every_backend("image"))
def test_bomb_is_refused_from_its_header(backend):
    data = bytearray(jpeg())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = b"\xff\xdc\xff\xdc"  # 65500 x 65500
    with pytest.raises(ValueError, match="exceeds"):
        ops.image.decode(bytes(data), backend=backend)


def test_concurrent_decodes_give_the_same_pixels():
    files = [jpeg(quality=quality) for quality in (30, 60, 90)]
    expected = [ops.image.decode(data) for data in files]
    wrong: list[bool] = []

    def work(index: int) -> None:
        wrong.extend(not torch.equal(ops.image.decode(files[index]), expected[index]) for _ in range(50))

    threads = [threading.Thread(target=work, args=(index % 3,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 300
    assert not any(wrong)


def test_real_figures_decode_to_pillows_pixels(shared_data):
    files = sorted((shared_data / "pmc_articles").rglob("*.jpg"))[::12]
    assert len(files) > 40
    for path in files:
        data = path.read_bytes()
        ours, theirs = (ops.image.decode(data, backend=name) for name in ("cpu", "reference"))
        assert torch.equal(ours, theirs), path.name


def test_odd_jpegs_never_crash_and_agree_with_pillow(shared_data):
    """With few exceptions, both backends accept the same hostile files, and give the same pixels.

    Pillow also accepts files with damage that libjpeg reports.
    """
    manifest = [json.loads(line) for line in (shared_data / "images_odd/manifest.jsonl").read_text().splitlines()]
    paths = sorted(shared_data / "images_odd" / row["file"] for row in manifest)
    counts = {"equal": 0, "differ": 0, "both refuse": 0, "one refuses": 0, "damaged": 0}
    for path in paths:
        data = path.read_bytes() if path.is_file() else b""
        if data[:2] != b"\xff\xd8":
            continue
        results = []
        for backend in ("cpu", "reference"):
            try:
                results.append(ops.image.decode(data, max_pixels=4_000_000, backend=backend))
            except ValueError as error:
                results.append(str(error))
        ours, theirs = results
        if isinstance(ours, str) and isinstance(theirs, str):
            counts["both refuse"] += 1
        elif isinstance(ours, str) and "Corrupt JPEG data" in ours:
            counts["damaged"] += 1
        elif isinstance(ours, str) or isinstance(theirs, str):
            counts["one refuses"] += 1
        else:
            counts["equal" if torch.equal(ours, theirs) else "differ"] += 1
    assert counts["equal"] > 100
    # Exceptions: lossless JPEG, files that end inside the last block, and files that only Pillow's parser rejects.
    assert counts["one refuses"] <= 12, counts
    assert 20 <= counts["damaged"] <= 32, counts
    assert counts["differ"] <= 3, counts


def assert_equal(files, size, **options):
    ours, errors = ops.image.decode_resize(files, size, backend="cpu", **options)
    expected, expected_errors = ops.image.decode_resize(files, size, backend="reference", **options)
    assert errors == expected_errors == {}
    assert ours.shape == (len(files), size, size, 3)
    assert ours.dtype == torch.uint8
    assert torch.equal(ours, expected), (ours.int() - expected.int()).abs().flatten(1).amax(1)


@decodes
@pairwise(mode=MODES, options=OPTIONS, interpolation=["bicubic", "bilinear"])
def test_resized_pixels_equal_pillows(mode, options, interpolation, nan_filled):
    files = [jpeg(mode, size, **options) for size in SIZES]
    for size in (1, 2, 31, 64, 97, 224):
        for crop in ("center", "squash", boxes_in(files, size)):
            assert_equal(files, size, crop=crop, interpolation=interpolation)


@pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="Pillow 13 changed the order of the two passes")
def test_reference_equals_one_call_of_pillow():
    files = [jpeg(size=size) for size in SIZES]
    for size in (1, 50, 97):
        squashed, _ = ops.image.decode_resize(files, size, crop="squash", backend="reference")
        for data, pixels in zip(files, squashed, strict=True):
            image = Image.open(io.BytesIO(data)).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
            assert np.array_equal(pixels.numpy(), np.array(image))


@decodes
def test_crop_equals_the_crop_of_the_decoded_image():
    """Decoding a part of the rows and columns doesn't change their pixels."""
    for options in OPTIONS:
        data = jpeg(size=(75, 61), quality=60, **options)
        image = ops.image.decode(data)
        boxes = [(top, left, 9, 9) for top in range(53) for left in range(67)]
        ours, errors = ops.image.decode_resize([data] * len(boxes), 9, crop=boxes)
        assert not errors
        for pixels, (top, left, height, width) in zip(ours, boxes, strict=True):
            assert torch.equal(pixels, image[top : top + height, left : left + width]), (options, top, left)


@pytest.mark.parametrize("backend", every_backend("image"))
def test_broken_file_does_not_affect_the_others(backend):
    good, bomb = jpeg(size=(80, 60)), jpeg(size=(400, 300))
    files = [good, b"", good[:-200], good, bomb, b"<html>", good]
    boxes = [(0, 0, 60, 80)] * 6 + [(1, 0, 60, 80)]
    out = torch.full((7, 32, 32, 3), 7, dtype=torch.uint8)
    images, errors = ops.image.decode_resize(
        files, 32, crop=boxes, out=out, max_pixels=100_000, on_bad="report", backend=backend
    )
    assert images is out
    assert list(errors) == [1, 2, 4, 5, 6]
    for index, words in {1: "not a JPEG", 2: "cannot be decoded", 4: "400x300 pixels exceeds", 5: "not a JPEG"}.items():
        assert words in errors[index]
    assert errors[6] == "box (top 1, left 0, height 60, width 80) is not inside the image of 80x60 pixels"
    assert not images[list(errors)].any()
    expected, _ = ops.image.decode_resize([good], 32, backend="reference", crop="squash")
    assert torch.equal(images[0], expected[0])
    assert torch.equal(images[3], expected[0])


@decodes
def test_data_below_the_crop_is_not_read():
    data = jpeg(size=(200, 400))
    cut = data[: len(data) // 2]
    images, errors = ops.image.decode_resize([data, cut], 64, crop=[(0, 0, 64, 64)] * 2, backend="cpu")
    assert not errors
    assert torch.equal(images[0], images[1])
    assert list(ops.image.decode_resize([cut], 64, on_bad="report", backend="cpu")[1]) == [0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"size": 0}, "size is 0"),
        ({"size": True}, "size is True"),
        ({"size": 16385}, "1 to 16384"),
        ({"interpolation": "lanczos"}, "choose bicubic or bilinear"),
        ({"crop": "middle"}, "choose center, squash or boxes"),
        ({"crop": [(0, 0, 1, 1)] * 2}, r"need \(1, 4\)"),
        ({"threads": 0}, "threads=0 must be at least 1"),
        ({"out": torch.empty(1, 8, 8, 3)}, "out must be contiguous uint8"),
        ({"out": torch.empty(1, 8, 16, 3, dtype=torch.uint8)[:, :, ::2]}, "out must be contiguous uint8"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_bad_argument_raises_an_error_that_names_it(arguments, words):
    with pytest.raises(ValueError, match=words):
        ops.image.decode_resize([jpeg()], **{"size": 8, **arguments})


def test_number_of_threads_does_not_change_results():
    files = [jpeg(size=(60 + 7 * index, 90)) if index % 5 else b"?" for index in range(40)]
    single = ops.image.decode_resize(files, 48, threads=1, on_bad="report")
    for threads in (2, 5, 64):
        images, errors = ops.image.decode_resize(files, 48, threads=threads, on_bad="report")
        assert torch.equal(images, single[0])
        assert errors == single[1]
        assert len(errors) == 8
    assert ops.image.decode_resize([], 48)[0].shape == (0, 48, 48, 3)


@decodes
def test_real_figures_resize_to_pillows_pixels(shared_data):
    paths = sorted((shared_data / "pmc_articles").rglob("*.jpg"))
    files = [path.read_bytes() for path in paths[:: max(1, len(paths) // 300)][:300]]
    assert len(files) == 300
    assert_equal(files, 224)
    assert_equal(files, 224, crop=boxes_in(files))
    exact, _ = ops.image.decode_resize(files, 224)
    fast, errors = ops.image.decode_resize(files, 224, exact=False)
    distances = (exact.float() - fast.float()).abs().mean((1, 2, 3))
    assert not errors
    assert distances.mean() < 0.7
    assert distances.quantile(0.9) < 2
    assert distances.max() < 5


@pytest.mark.parametrize("exact", [True, False])
def test_odd_files_resize_to_pillows_pixels_or_are_refused(shared_data, exact):
    manifest = [json.loads(line) for line in (shared_data / "images_odd/manifest.jsonl").read_text().splitlines()]
    paths = [shared_data / "images_odd" / row["file"] for row in manifest]
    files = [path.read_bytes() for path in sorted(paths) if path.is_file()]
    for crop in ("center", "squash"):
        options = {"crop": crop, "max_pixels": 4_000_000, "on_bad": "report"}
        ours, errors = ops.image.decode_resize(files, 64, exact=exact, backend="cpu", **options)
        expected, refused = ops.image.decode_resize(files, 64, backend="reference", **options)
        both = [index for index in range(len(files)) if index not in errors and index not in refused]
        distances = (ours[both].float() - expected[both].float()).abs().flatten(1)
        if exact:
            # The exceptions are those of `decode`.
            assert (distances.amax(1) > 0).sum() <= 3, [
                sorted(paths)[both[i]].name for i in distances.amax(1).nonzero()
            ]
        # The exceptions are those of `decode`. The centre crop also ignores damage below it.
        assert len(both) > 100
        damaged = {index for index, reason in errors.items() if "Corrupt JPEG data" in reason}
        assert len((errors.keys() ^ refused.keys()) - damaged) <= (20 if crop == "center" else 12)
        assert 20 <= len(damaged - refused.keys()) <= 32
        assert all(index in errors for index, data in enumerate(files) if data[:2] != b"\xff\xd8")

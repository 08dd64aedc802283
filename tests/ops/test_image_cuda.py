"""Squares of pixels by nvJPEG and our kernel, without a GPU.

The kernel runs on the host. A library with nvJPEG's functions and libjpeg's pixels replaces nvJPEG
(support/fake_nvjpeg.cpp).
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

import cuda_emulator
import pytest
import torch
from cuda_emulator import hosted, outside
from inside import num_passed
from jpegs import MODES, OPTIONS, SIZES, boxes_in, jpeg
from oracle import collected_if, compared
from pairwise import pairwise

from bclip_fast import _cpu, ops
from bclip_fast.ops import image
from bclip_fast.ops.cuda_device import cuda_module
from bclip_fast.ops.image import CLIP_MEAN, CLIP_STD, LIMITS, cuda

ON_GPU = cuda_emulator.ON_GPU
DEVICE = "cuda" if ON_GPU else "cpu"
# Tests that compare with libjpeg's pixels, which the replacement gives and nvJPEG doesn't.
faked = collected_if("BCLIP_NVJPEG" in os.environ)


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("nvjpeg") / "libnvjpeg.so.13"
    source = Path(__file__).parents[1] / "support/fake_nvjpeg.cpp"
    compiler = os.environ.get("CXX", "g++")
    done = subprocess.run(
        [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", str(source), "-o", str(path), "-ljpeg"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return str(path)


@outside
def test_suite_passes_on_the_host(library):
    assert num_passed([Path(__file__).name], "", BCLIP_NVJPEG=library, **cuda_emulator.environment()) >= 25


@outside
def test_suite_passes_on_the_host_under_sanitizers(library):
    sanitized = cuda_emulator.environment(sanitized=True)
    assert num_passed([Path(__file__).name], "broken or normalized or extreme", BCLIP_NVJPEG=library, **sanitized) >= 5


@outside
def test_missing_gpu_is_refused_with_a_reason(monkeypatch):
    if not torch.cuda.is_available():
        with pytest.raises(ops.BackendError, match="cuda: "):
            ops.image.decode_resize([jpeg()], 8, backend="cuda")
        assert "CUDA device" in LIMITS["cuda"](b"")
    # The backends of the CPU normalise in the same way.
    ours, errors = ops.image.decode_resize_normalize(
        [jpeg(), b"?"], 8, device="cpu", dtype=torch.bfloat16, on_bad="report"
    )
    assert ours.shape == (2, 3, 8, 8)
    assert ours.dtype == torch.bfloat16
    assert list(errors) == [1]


@hosted
def test_missing_library_is_refused_with_a_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("BCLIP_NVJPEG", str(tmp_path / "libnvjpeg.so.13"))
    cuda._library.cache_clear()
    try:
        out = torch.empty(1, 8, 8, 3, dtype=torch.uint8, device=DEVICE)
        with pytest.raises(ops.BackendError, match=r"nvJPEG cannot be used.*libnvjpeg.so.13: cannot open"):
            ops.image.decode_resize([jpeg()], 8, out=out, backend="cuda")
        other = Path(tmp_path / "libother.so")
        subprocess.run(["g++", "-shared", "-xc++", "-", "-o", str(other)], input="", text=True, check=True)
        monkeypatch.setenv("BCLIP_NVJPEG", str(other))
        cuda._library.cache_clear()
        with pytest.raises(ops.BackendError, match="it has no nvjpegCreateEx"):
            ops.image.decode_resize([jpeg()], 8, out=out, backend="cuda")
    finally:
        cuda._library.cache_clear()


def squares(files, size, **options):
    out = torch.full((len(files), size, size, 3), 7, dtype=torch.uint8, device=DEVICE)
    if ON_GPU and (reason := LIMITS["cuda"](out)):
        pytest.skip(reason)  # a machine without nvJPEG
    ours, errors = ops.image.decode_resize(files, size, out=out, on_bad="report", backend="cuda", **options)
    assert ours is out
    return ours.cpu(), errors


@hosted
@pairwise(interpolation=["bicubic", "bilinear"], mode=MODES, options=OPTIONS)
def test_resized_pixels_equal_pillows(mode, options, interpolation, nan_filled):
    if ON_GPU and mode != "CMYK" and "progressive" not in options:
        pytest.skip("nvJPEG's pixels differ from libjpeg's")
    files = [jpeg(mode, size, **options) for size in SIZES]
    for size in (1, 27):
        for crop in ("center", "squash", boxes_in(files, size)):
            ours, errors = squares(files, size, crop=crop, interpolation=interpolation)
            expected, _ = ops.image.decode_resize(
                files, size, crop=crop, interpolation=interpolation, backend="reference"
            )
            assert not errors
            assert torch.equal(ours, expected), (ours.int() - expected.int()).abs().flatten(1).amax(1)


@hosted
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_decoded_pixels_are_close_to_libjpegs(mode, options):
    files = [jpeg(mode, size, quality=95, **options) for size in SIZES]
    ours, errors = squares(files, 24)
    expected, _ = ops.image.decode_resize(files, 24, backend="reference")
    distances = (ours.float() - expected.float()).abs().flatten(1)
    assert not errors
    assert distances.mean(1).max() < 2, distances.mean(1)


@faked
@pytest.mark.parametrize("crop", ["center", "squash"])
def test_extreme_shapes_equal_pillows_pixels(crop, nan_filled):
    files = [jpeg(size=size) for size in [(2000, 3), (3, 2000), (900, 1100), (1, 1)]]
    ours, errors = squares(files, 5, crop=crop)
    expected, _ = ops.image.decode_resize(files, 5, crop=crop, backend="reference")
    assert not errors
    assert torch.equal(ours, expected)


@faked
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_normalized_levels_are_accurate(dtype, nan_filled):
    files = [jpeg(size=size) for size in SIZES[:4]] + [b"?"]
    options = {"dtype": dtype, "on_bad": "report"}
    ours, errors = ops.image.decode_resize_normalize(files, 21, device=DEVICE, backend="cuda", **options)
    levels, _ = ops.image.decode_resize(files, 21, on_bad="report", backend="reference")
    assert list(errors) == [4]
    assert ours.shape == (5, 3, 21, 21)
    assert ours.dtype == dtype

    def normalized(kind):
        mean, std = (torch.tensor(values, dtype=kind).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        return (levels.permute(0, 3, 1, 2).to(kind) / 255 - mean) / std

    truth, eager = normalized(torch.float64), normalized(dtype)
    # Level and mean are at most 1, and their difference over the deviation is at most 4. Each of three operations and
    # two constants rounds once in float32, and the result once in its dtype.
    unit, rounding = (torch.finfo(kind).eps / 2 for kind in (torch.float32, dtype))
    bounds = 5 * unit * (truth.abs() + 4) + rounding * truth.abs()
    theirs, _ = ops.image.decode_resize_normalize(files, 21, device="cpu", backend="reference", **options)
    for result in (ours.cpu(), theirs):
        assert list(compared([result], [[eager]], [truth], [bounds], truth.numel())) == []


@faked
def test_broken_and_refused_files_match_the_reference(monkeypatch):
    good, bomb = jpeg(size=(80, 60)), jpeg(size=(400, 300))
    refused, twin = jpeg(size=(80, 60), comment=b"refuse"), jpeg("L", (53, 37))
    damaged = bytearray(refused)
    damaged[-200:-100] = b"\xff\xc4" * 50
    files = [good, b"", good[:-200], refused, bomb, b"<html>", good, bytes(damaged), jpeg("CMYK"), twin, b""]
    files += [jpeg(size=(80, 60), comment=b"grow")]
    boxes = (
        [(0, 0, 60, 80)] * 6
        + [(1, 0, 60, 80), (0, 0, 60, 80)]
        + [(0, 0, 37, 53)] * 2
        + [(5, 5, 5, 5)]
        + [(1, 2, 50, 70)]
    )
    options = {"crop": boxes, "max_pixels": 100_000}
    expected, reasons = ops.image.decode_resize(files, 16, on_bad="report", backend="reference", **options)
    assert list(reasons) == [1, 2, 4, 5, 6, 7, 10]
    for held in (cuda.BATCH_BYTES, 20_000):
        monkeypatch.setattr(cuda, "BATCH_BYTES", held)
        ours, errors = squares(files, 16, **options)
        assert list(errors) == list(reasons)
        assert torch.equal(ours, expected)
        for index in (4, 6):
            assert errors[index] == reasons[index]
    assert squares([], 16)[0].shape == (0, 16, 16, 3)
    assert squares([b""], 16)[1].keys() == {0}


@faked
@pytest.mark.parametrize("others", [[], [jpeg(comment=b"refuse")]], ids=["batch", "file by file"])
def test_decodes_on_two_streams_do_not_share_memory(others):
    """The replacement's streams write pixels only when somebody waits for them."""
    path = os.environ["BCLIP_NVJPEG"]
    replacement, decoder = ctypes.CDLL(path), cuda_module().NvJpeg(path)
    replacement.fake_stream.restype = ctypes.c_void_p
    streams = [replacement.fake_stream(index) for index in range(2)]
    files = [jpeg(size=(80, 60), quality=quality) for quality in (90, 70, 50, 30)]
    pixels, rest = torch.zeros(len(files), 60, 80, 3, dtype=torch.uint8), torch.zeros(53, 37, 3, dtype=torch.uint8)
    for index, (file, stream) in enumerate(zip(files, [*streams, streams[1], streams[0]], strict=True)):
        addresses = [rest.data_ptr()] * len(others) + [pixels[index].data_ptr()]
        refused = decoder.decode([*others, file], addresses, [53] * len(others) + [80], 1, stream)
        assert refused == [0] * len(others)
    for stream in streams:
        replacement.fake_synchronize(ctypes.c_void_p(stream))
    for written, file in zip(pixels, files, strict=True):
        assert torch.equal(written, ops.image.decode(file))


@hosted
def test_build_without_libjpeg_decodes_with_pillow(monkeypatch):
    """Pillow decodes the files that nvJPEG refuses if the package was built with BCLIP_JPEG=0."""
    for name in ("decode_jpeg", "decode_resize"):
        monkeypatch.delattr(_cpu, name, raising=False)
    files = [jpeg(), jpeg(progressive=True), b"?", jpeg("CMYK")]
    expected, reasons = ops.image.decode_resize(files, 24, on_bad="report", backend="reference")
    ours, errors = squares(files, 24)
    assert list(errors) == list(reasons) == [2]
    assert (ours.float() - expected.float()).abs().mean() < 1
    monkeypatch.setattr(image, "find_spec", lambda name: None)
    assert "libjpeg-turbo nor Pillow" in LIMITS["cuda"](torch.empty(0, device=DEVICE))


@hosted
def test_library_gets_only_plain_files():
    # Component ids R, G and B mean that colours are not converted.
    rgb = bytearray(jpeg(subsampling=0))
    frame = rgb.index(b"\xff\xc0") + 10
    for component, letter in enumerate(b"RGB"):
        rgb[frame + 3 * component] = letter
    adobe = b"\xff\xd8\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00" + jpeg()[2:]
    plain = [jpeg(), jpeg("L"), jpeg(subsampling=0), jpeg(subsampling=1, restart_marker_blocks=5), jpeg(comment=b"?")]
    others = [b"", b"\xff\xd8\xff\xd9", jpeg("CMYK"), jpeg(progressive=True), jpeg()[:-1], bytes(rgb), adobe]
    sizes = cuda_module().plain_jpegs(plain + others)
    assert sizes == [(37, 53)] * len(plain) + [(0, 0)] * len(others)
    data = jpeg()
    for end in range(0, 700, 7):
        assert cuda_module().plain_jpegs([data[:end]]) == [(0, 0)]

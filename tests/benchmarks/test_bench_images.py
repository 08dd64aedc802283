"""Tests of `bclip bench images`: the pixels of the contenders, the rows, and missing peers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from bclip_fast import ops
from bclip_fast.benchmarks import images
from bclip_fast.benchmarks.cases import Unavailable, figures
from bclip_fast.benchmarks.report import BenchConfig, run
from bclip_fast.errors import UserError


@pytest.fixture
def figures_on_disk(shared_data, monkeypatch):
    monkeypatch.setenv("BCLIP_SHARED_DATA", str(shared_data))


def test_pillow_yardstick_equals_reference(figures_on_disk):
    files = figures(5)
    expected, _ = ops.image.decode_resize(files, 50, backend="reference")
    assert np.array_equal(np.stack([images.pillow(data, 50) for data in files]), expected.numpy())
    # torch's filter is not bit-exact. A wrong crop or size would differ by far more than 2 levels.
    resized = torch.stack([images.resized(ops.image.decode(data), 50) for data in files])
    assert (resized.int() - expected.int()).abs().max() <= 2


def test_images_missing_peer_has_reason_and_others_have_rows(figures_on_disk, tmp_path, monkeypatch, capsys):
    makers = images.contenders(40)

    def missing():
        raise Unavailable("the peer is not installed")

    available = {name: makers[name] for name in ("decode: ours", "Pillow", "Pillow draft", "ours exact", "ours fast")}
    monkeypatch.setattr(images, "contenders", lambda size: {**available, "OpenCV area": missing})
    config = images.ImagesConfig(num_images=3, size=40, rounds=2, threads=(1, 2))
    assert run(BenchConfig(operator="images", output=tmp_path, images=config)) == 0
    rows = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    measured = {(row["contender"], row["num_threads"]): row for row in rows if "missing" not in row}
    assert measured.keys() == {(name, threads) for name in available for threads in (1, 2)}
    assert all(row["seconds"] > 0 and row["times_pillow"] > 0 and row["commit"] for row in measured.values())
    assert measured["Pillow", 1]["error"] == measured["ours exact", 2]["error"] == 0
    assert 0 < measured["ours fast", 1]["mean_error"] < 2 and "error" not in measured["decode: ours", 1]
    text = capsys.readouterr().out
    assert "missing: OpenCV area: the peer is not installed" in text and "of the CPU time of ours: ours exact" in text


def test_figures_fewer_files_than_requested_returns_all(tmp_path, monkeypatch):
    folder = tmp_path / "pmc_articles"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.jpg").write_bytes(name.encode())
    monkeypatch.setenv("BCLIP_SHARED_DATA", str(tmp_path))
    assert figures(400, least=1) == [b"a", b"b", b"c"] and figures(2) == [b"a", b"b"]
    with pytest.raises(Unavailable, match="3 JPEGs, 4 are needed"):
        figures(4)


def test_images_too_few_figures_or_threads_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("BCLIP_SHARED_DATA", str(tmp_path))
    with pytest.raises(UserError, match="0 JPEGs, 1 are needed: set BCLIP_SHARED_DATA"):
        run(BenchConfig(operator="images", output=tmp_path))
    with pytest.raises(UserError, match="at least 1"):
        images.ImagesConfig(threads=(0,))


def test_torchvision_without_compiled_part_gives_reason():
    reason = ""
    try:
        run_torchvision = images.torchvision(8)
    except Unavailable as unavailable:
        reason = str(unavailable)
    if reason:
        assert "torchvision" in reason
    else:
        assert run_torchvision([images.jpeg_of_one_pixel()], 1)[0].shape == (8, 8, 3)

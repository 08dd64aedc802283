"""The benchmarks of search, on a few vectors and images."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from clusters import vectors
from torch import from_numpy

from bclip_fast.search.parts import Parts
from benchmarks import search_scale, serve


def test_scale_benchmark_reports_size_and_recall_of_a_real_index(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(search_scale, "_PART", 400)
    parts = Parts(tmp_path, "synthetic", 1000, 400)
    parts.open()
    for number, images in enumerate(parts.ranges):
        parts.write(number, from_numpy(vectors(len(images), 16, seed=number)))
    parts.close(delete=False)
    search_scale._measure(str(tmp_path), "faiss_flat:fp16", 1000, 16)
    row = json.loads(capsys.readouterr().out)
    assert (row["index"], row["store"], row["vectors"]) == ("faiss_flat", "fp16", 1000)
    assert row["recall_at_10"] > 0.95
    assert row["file_MB"] == pytest.approx(1000 * 16 * 2 / 1e6, abs=0.1)


@pytest.mark.long
def test_serve_benchmark_counts_answers_of_both_versions(capsys, monkeypatch) -> None:
    checkout = str(Path(serve.__file__).parents[1])
    arguments = ["--before", checkout, "--clients", "4", "--seconds", "0.5", "--rounds", "1", "--images", "40"]
    monkeypatch.setattr(sys, "argv", ["serve", *arguments])
    serve.main()
    now, before, ratio = map(json.loads, capsys.readouterr().out.splitlines())
    assert (now["version"], before["version"], now["clients"]) == ("now", "before", 4)
    assert min(now["answers_per_s"], before["answers_per_s"]) > 0
    assert now["bytes"] == pytest.approx(before["bytes"], rel=0.01)
    assert now["bytes"] > 100_000
    assert set(ratio) == {"ratio", "now", "before"}

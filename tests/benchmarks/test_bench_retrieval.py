"""Tests of `bclip bench retrieval`: its check by brute force."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bclip_fast.benchmarks import measure
from bclip_fast.benchmarks import retrieval as bench
from bclip_fast.benchmarks.report import BenchConfig, run
from bclip_fast.benchmarks.retrieval import RetrievalConfig
from bclip_fast.errors import UserError
from bclip_fast.eval import retrieval


@pytest.fixture(autouse=True)
def _small_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "MATMUL_SIZE", 64)


def test_retrieval_every_contender_passes_brute_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("faiss")
    config = RetrievalConfig(pairs=3000, dim=64, noise=2.0, rival_queries=500, checked=5)
    assert run(BenchConfig("retrieval", tmp_path, retrieval=config)) == 0
    ours, single, faiss = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    assert (ours["queries"], single["queries"], ours["num_checked"], faiss["num_checked"]) == (3000, 500, 10, 5)
    assert single["whole_seconds"] == pytest.approx(6 * single["seconds"])
    assert 0.05 < ours["recall_at_1"][0] < 0.99 and len(faiss["recall_at_1"]) == 1
    assert single["recall_at_1"][0] == pytest.approx(faiss["recall_at_1"][0], abs=1e-9)
    assert "s for all" in capsys.readouterr().out


def test_retrieval_wrong_rank_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = retrieval.rank

    def wrong(*args, **options):
        of_images, of_texts = rank(*args, **options)
        return of_images, replace(of_texts, num_better=of_texts.num_better + 1)

    monkeypatch.setattr(bench.retrieval, "rank", wrong)
    with pytest.raises(AssertionError, match="rank of "):
        bench.measure_retrieval(RetrievalConfig(pairs=200, dim=16, rival_queries=0))


def test_retrieval_config_bad_number_is_refused() -> None:
    for settings in (
        dict(pairs=0),
        dict(queries=9, pairs=8),
        dict(checked=0),
        dict(noise=-1.0),
        dict(rival_queries=-1),
    ):
        with pytest.raises(UserError, match=r"retrieval\."):
            RetrievalConfig(**settings)  # type: ignore[arg-type]

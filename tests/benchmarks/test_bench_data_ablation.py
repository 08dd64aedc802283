"""The comparison of training data: its runs, what a second call keeps, and its intervals."""

from __future__ import annotations

import json
from pathlib import Path

import articles
import numpy as np
import pytest

from bclip_fast.benchmarks import data_ablation, data_ablation_table
from bclip_fast.data.shards.reader import ShardDataset
from bclip_fast.errors import UserError
from bclip_fast.io.jsonl import read_lines


def test_runs_are_equal_in_steps_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(data_ablation, "RESULTS", tmp_path / "results.jsonl")
    source = tmp_path / "articles"
    for number in range(1, 9):
        articles.write_files(source / str(number), articles.article_files(number, has_panels=True))

    def run(*names: str, steps: int = 2) -> str:
        data_ablation.main(
            data_ablation.AblationConfig(
                str(source), tmp_path / "out", names, seeds=1, steps=steps, batch_size=4, test_fraction=0.4, workers=1
            )
        )
        return capsys.readouterr().out

    run("whole")
    first = (tmp_path / "out" / "whole-0.json").read_bytes()
    # As after a kill between two runs.
    out = run("whole", "panels", "deduplicated")
    assert (tmp_path / "out" / "whole-0.json").read_bytes() == first
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["data"] for row in rows] == ["whole", "panels"]
    assert all(line in out for line in data_ablation_table.tables(rows))
    assert "deduplicated: not trained" in out

    shards = tmp_path / "out" / "dataset"
    manifest = {key: row["article"] for key, row in articles.manifest_rows(shards).items()}
    held_out = {sample.meta["article"] for sample in ShardDataset(shards, "test")}
    for row in rows:
        steps = [line["step"] for line in read_lines(tmp_path / "out" / f"{row['data']}-0" / "metrics.jsonl")]
        assert max(steps) == row["steps"] == 2 and row["samples_seen"] == 8
        keys = data_ablation.train_keys(data_ablation._manifest(shards), row["filter"])
        assert len(keys) == row["num_train"] and not held_out & {manifest[key] for key in keys}
        assert set(row["articles"]) == held_out and row["keys"] == rows[0]["keys"]
    assert rows[0]["num_train"] < rows[1]["num_train"]

    with pytest.raises(UserError, match="steps=2, not 3"):
        run("whole", steps=3)


def test_intervals_and_power():
    articles_of, change = np.repeat(np.arange(50), 2), np.random.default_rng(0).normal(0.1, 1.0, (4, 100))
    low, high = data_ablation_table.interval(change, articles_of)
    assert low < change.mean() < high
    # Twice the articles and seeds have half the variance.
    now = data_ablation_table.detectable(change, articles_of)
    assert data_ablation_table.detectable(change, articles_of, 100, 8) == pytest.approx(now / np.sqrt(2))
    # Seeds that differ and articles that don't, and the reverse.
    by_seed, by_article = np.repeat([[0.0], [1.0]], 100, axis=1), np.tile(articles_of / 50, (2, 1))
    assert data_ablation_table.variances(by_seed, articles_of) == pytest.approx((0.0, 0.5))
    assert data_ablation_table.variances(by_article, articles_of)[1] == 0.0
    assert data_ablation_table.variances(by_article, articles_of)[0] == pytest.approx(
        np.var(np.arange(50) / 50, ddof=1)
    )

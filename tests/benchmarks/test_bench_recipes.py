"""The comparison of recipes: its table, its intervals, and runs that are finished already."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bclip_fast.benchmarks import recipes


def row(recipe: str, seed: int, ranks: list[float]) -> dict[str, object]:
    """The row of a run with four queries in each direction, of articles A, A, B and C."""
    return {
        **{"recipe": recipe, "seed": seed, "ranks": [ranks, ranks], "articles": ["A", "A", "B", "C"]},
        **{"mean_rank": float(np.mean(ranks)), "num_test": 4, "chance_recall_at_10": 0.5, "shared_positives": 2.0},
    }


def test_interval_draws_articles_and_not_queries():
    values, articles = np.array([1.0] * 50 + [0.0] * 50), np.array(["A"] * 50 + ["B"] * 50)
    # Two articles: a quarter of the samples has only one of them.
    assert recipes.interval(values, articles) == (0.0, 1.0)
    low, high = recipes.interval(values, np.arange(100))
    assert 0.38 < low < 0.45 < 0.55 < high < 0.62
    assert recipes.interval(np.ones(6), np.array([1, 1, 1, 1, 2, 3])) == (1.0, 1.0)


def test_table_compares_runs_of_the_same_seed():
    runs = [row("clip", 0, [1, 20, 20, 20]), row("clip", 1, [1, 1, 1, 20])]
    runs += [row("siglip", 0, [1, 1, 20, 20]), row("siglip", 1, [1, 1, 1, 1])]
    lines = recipes.table(runs)
    assert lines[2].startswith("| clip | 2 | 50.0% |")
    assert "| 25.0% 75.0% |  |  | 10.5 |  |  | 2.0 of 64 |" in lines[2]
    assert lines[3].startswith("| siglip | 2 | 75.0% |")
    assert "| +25.0% | +0.0% to +50.0% | 5.8 | -4.8 | -9.5 to +0.0 |" in lines[3]
    assert lines[4] == "| chance | | 50.0% | | | | | 2.5 | | | |"
    # Without a run of clip for each seed, there is no difference.
    assert "| 50.0% 100.0% |  |  | 5.8 |  |  |" in recipes.table(runs[1:])[3]


def test_finished_runs_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    trained: list[tuple[str, int]] = []

    def train(config: recipes.RecipesConfig, name: str, seed: int, shards: Path) -> Path:
        trained.append((name, seed))
        (tmp_path / f"{name}-{seed}").mkdir()
        (tmp_path / f"{name}-{seed}" / "metrics.jsonl").write_text('{"shared_positives": 3}\n{"shared_positives": 4}\n')
        return tmp_path / f"{name}-{seed}"

    monkeypatch.setattr(recipes, "_shards", lambda config, seed: tmp_path)
    monkeypatch.setattr(recipes, "_train", train)
    monkeypatch.setattr(recipes, "evaluate", lambda run, shards: row("", 0, [1, 2, 3, 30]))
    monkeypatch.setattr(recipes, "RESULTS", tmp_path / "results.jsonl")
    recipes.main(recipes.RecipesConfig(tmp_path, tmp_path, recipe=("clip",), seeds=2))
    recipes.main(recipes.RecipesConfig(tmp_path, tmp_path, recipe=("clip", "siglip"), seeds=2))
    assert trained == [("clip", 0), ("clip", 1), ("siglip", 0), ("siglip", 1)]
    recorded = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(each["recipe"], each["seed"], each["shared_positives"]) for each in recorded] == [
        (name, seed, 3.5) for name, seed in trained
    ]
    assert all(each["device"] and each["date"] for each in recorded)
    # The table can be made again from the recorded rows.
    assert "\n".join(recipes.table(recorded)) in capsys.readouterr().out

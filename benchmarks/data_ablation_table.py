"""The tables of `data_ablation`: retrieval of each selection, differences with intervals, and what could be detected.

An interval covers 95 % of samples that draw the articles and the seeds, both with replacement. A difference is between
runs with the same seed on the same queries. The detectable difference is the one that a two-sided test at 5 % finds
with a power of 80 %: 2.8 standard errors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .recipes import NUM_RESAMPLES

_RECALL_AT = (1, 5, 10)
_K = 10
_POWER = 2.8


def tables(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of the tables in Markdown. rows: one a run, as `data_ablation` records them."""
    if not rows:
        return ["no finished runs"]
    runs: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        runs.setdefault(row["data"], []).append(row)
    return [*_retrieval(runs), "", *_differences(runs)]


def _retrieval(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    recalls = [f"{direction} R@{k}" for direction in ("i→t", "t→i") for k in _RECALL_AT]
    header = ["data", "runs", "pairs", "steps", "seen", "epochs", *recalls, "median rank i→t", "t→i"]
    lines = [_line(header), _line(["---"] * len(header))]
    for name, of_name in runs.items():
        ranks = np.array([row["ranks"] for row in of_name])  # (seeds, directions, queries)
        first = of_name[0]
        cells = [name, len(of_name), *(first[key] for key in ("num_train", "steps", "samples_seen", "epochs"))]
        cells += [f"{(ranks[:, direction] <= k).mean():.1%}" for direction in (0, 1) for k in _RECALL_AT]
        cells += [f"{np.median(ranks[:, direction], axis=1).mean():.1f}" for direction in (0, 1)]
        lines.append(_line(cells))
    num_test = next(iter(runs.values()))[0]["num_test"]
    chance = [f"{min(1.0, k / num_test):.1%}" for k in _RECALL_AT]
    return [*lines, _line(["chance", *[""] * 5, *chance, *chance, *[f"{(num_test + 1) / 2:.1f}"] * 2])]


def _differences(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    header = ["data", f"R@{_K}", "95 %", "by seed", "- whole", "95 %", "detectable", "medical", "- whole", "95 %"]
    lines = [_line(header), _line(["---"] * len(header))]
    whole = {row["seed"]: row for row in runs.get("whole", [])}
    for name, of_name in runs.items():
        articles, medical = np.array(of_name[0]["articles"]), np.array(of_name[0]["medical"])
        hits = np.array([_hits(row) for row in of_name])
        low, high = interval(hits, articles)
        cells = [
            name,
            f"{hits.mean():.1%}",
            f"{low:.1%} to {high:.1%}",
            " ".join(f"{each.mean():.1%}" for each in hits),
        ]
        cells += [""] * 6
        if medical.any():
            cells[7] = f"{hits[:, medical].mean():.1%}"
        if name != "whole" and all(row["seed"] in whole for row in of_name):
            change = hits - np.array([_hits(whole[row["seed"]]) for row in of_name])
            low, high = interval(change, articles)
            cells[4:7] = f"{change.mean():+.1%}", f"{low:+.1%} to {high:+.1%}", f"{detectable(change, articles):.1%}"
            if medical.any():
                low, high = interval(change[:, medical], articles[medical])
                cells[8:] = f"{change[:, medical].mean():+.1%}", f"{low:+.1%} to {high:+.1%}"
        lines.append(_line(cells))
    return lines


def _line(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _hits(row: dict[str, Any]) -> np.ndarray:
    """The share of the two directions in which each query has its pair among the first _K, (queries,)."""
    hits: np.ndarray = (np.array(row["ranks"]) <= _K).mean(axis=0)
    return hits


def interval(values: np.ndarray, articles: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the mean of values (seeds, queries), over samples of articles (queries,) and of seeds."""
    _, owners = np.unique(articles, return_inverse=True)
    counts = np.bincount(owners)
    sums = np.array([np.bincount(owners, of_seed) for of_seed in values])
    generator, means = np.random.default_rng(0), np.empty(NUM_RESAMPLES)
    for i in range(NUM_RESAMPLES):
        drawn = generator.integers(0, len(counts), len(counts))
        seeds = generator.integers(0, len(sums), len(sums))
        means[i] = sums[seeds][:, drawn].sum() / (len(sums) * counts[drawn].sum())
    low, high = np.quantile(means, [0.025, 0.975]).tolist()
    return low, high


def variances(change: np.ndarray, articles: np.ndarray) -> tuple[float, float]:
    """The variances of a mean difference (seeds, queries) from one article and from one seed.

    The mean over A articles and S seeds has about the variance first / A + second / S. Each is what the sample shows,
    so the second includes the articles' part that differs between seeds.
    """
    _, owners = np.unique(articles, return_inverse=True)
    counts = np.bincount(owners)
    mean = change.mean(axis=0)
    # Variance of a ratio of sums over articles.
    residuals = np.bincount(owners, mean) - mean.mean() * counts
    of_article = float(residuals.var(ddof=1) / counts.mean() ** 2) if len(counts) > 1 else math.nan
    of_seed = float(change.mean(axis=1).var(ddof=1)) if len(change) > 1 else math.nan
    return of_article, of_seed


def detectable(change: np.ndarray, articles: np.ndarray, num_articles: int = 0, num_seeds: int = 0) -> float:
    """The smallest difference that a test with a power of 80 % finds, with other numbers of articles and seeds."""
    of_article, of_seed = variances(change, articles)
    num_articles, num_seeds = num_articles or len(np.unique(articles)), num_seeds or len(change)
    return _POWER * math.sqrt(of_article / num_articles + of_seed / num_seeds)

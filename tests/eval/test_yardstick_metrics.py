"""The metrics of medpmc-clip-eval against scikit-learn, on random and degenerate cases, and their bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from bclip_fast.errors import UserError
from bclip_fast.eval import yardstick_metrics
from bclip_fast.eval.yardstick_metrics import KeptScores, interval, measure, resample


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - np.nanmax(logits, axis=1, keepdims=True))
    return (powers / np.nansum(powers, axis=1, keepdims=True)).astype(np.float32)


def with_classes(num: int, classes: int, seed: int, *, used: int | None = None, decimals: int = 9) -> KeptScores:
    random = np.random.default_rng(seed)
    targets = random.integers(0, used or classes, num)
    logits = random.normal(size=(num, classes))
    logits[np.arange(num), targets] += 1
    return KeptScores("classes", targets, softmax(logits).round(decimals))


def with_labels(num: int, labels: int, seed: int, decimals: int = 9) -> KeptScores:
    random = np.random.default_rng(seed)
    targets = random.random((num, labels)) < np.linspace(0, 0.6, labels)  # the first label never occurs
    scores = 1 / (1 + np.exp(-random.normal(size=(num, labels)) - targets))
    return KeptScores("labels", targets, scores.astype(np.float32).round(decimals))


def with_options(images: int, seed: int, decimals: int = 9) -> KeptScores:
    random = np.random.default_rng(seed)
    counts = random.integers(2, 6, 2 * images)
    logits = random.normal(size=(2 * images, 5))
    logits[np.arange(5) >= counts[:, None]] = np.nan
    targets = (random.random(2 * images) * counts).astype(int)
    logits[np.arange(2 * images), targets] += 1
    return KeptScores("options", targets, softmax(logits).round(decimals), np.tile(np.arange(images), 2))


def expected(kept: KeptScores, rows: np.ndarray) -> list[float]:
    """The yardstick's formulas with scikit-learn, on some rows of the kept scores."""
    targets, scores = kept.targets[rows], kept.scores[rows]
    if kept.kind == "labels":
        found = scores >= 0.5
        columns = range(targets.shape[1])
        f1 = [f1_score(targets[:, i], found[:, i], zero_division=0) for i in columns]
        both = [i for i in columns if len(np.unique(targets[:, i])) == 2]
        areas = [roc_auc_score(targets[:, i], scores[:, i]) for i in both]
        return [float((found == targets).mean()), float(np.mean(f1)), float(np.mean(areas))]
    options = [row[~np.isnan(row)] for row in scores]
    found = np.array([row.argmax() for row in options])
    one_hot = np.concatenate([np.arange(len(row)) == target for row, target in zip(options, targets, strict=True)])
    f1 = f1_score(targets, found, average="macro", zero_division=0)
    return [float(accuracy_score(targets, found)), float(f1), float(roc_auc_score(one_hot, np.concatenate(options)))]


CASES = {
    "binary": with_classes(50, 2, 0),
    "multiclass": with_classes(200, 7, 1),
    "ties": with_classes(120, 4, 2, decimals=1),
    "a class without samples": with_classes(60, 5, 3, used=3),
    "one class": with_classes(30, 3, 4, used=1),
    "all scores equal": KeptScores("classes", np.array([0, 1, 1, 2]), np.full((4, 3), 1 / 3, np.float32)),
    "one sample": with_classes(1, 2, 5),
    "labels": with_labels(150, 6, 6),
    "labels with ties at the threshold": with_labels(150, 6, 7, decimals=1),
    "options": with_options(80, 8),
    "options with ties": with_options(80, 9, decimals=1),
}


@pytest.mark.parametrize("name", CASES)
def test_yardstick_metrics_equal_scikit_learn(name: str) -> None:
    kept = CASES[name]
    assert list(measure(kept).values()) == pytest.approx(expected(kept, np.arange(len(kept.scores))), rel=1e-12)


@pytest.mark.parametrize("name", ["binary", "ties", "a class without samples", "labels", "options with ties"])
def test_yardstick_resamples_equal_scikit_learn_on_the_drawn_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every draw is repeated with the rows themselves, as often as they were drawn."""
    kept, drawn = CASES[name], []
    draw = yardstick_metrics._Draws.__call__

    def recorded(self: object, generator: np.random.Generator) -> np.ndarray:
        drawn.append(draw(self, generator).copy())  # type: ignore[arg-type]
        return drawn[-1]

    monkeypatch.setattr(yardstick_metrics._Draws, "__call__", recorded)
    monkeypatch.setattr(yardstick_metrics, "_num_processors", lambda: 1)
    values = resample(kept, num_draws=20, seed=3)
    for i, row in enumerate(values):
        rows = np.repeat(np.arange(len(kept.scores)), drawn[0][kept.units, i].astype(int))
        assert row.tolist() == pytest.approx(expected(kept, rows), rel=1e-12)
        if kept.kind == "classes":  # drawn within the classes
            assert np.bincount(kept.targets[rows]).tolist() == np.bincount(kept.targets).tolist()
    if kept.groups is not None:  # both questions of an image are drawn together
        assert (drawn[0][kept.units[: len(kept.units) // 2]] == drawn[0][kept.units[len(kept.units) // 2 :]]).all()


def test_yardstick_resamples_depend_on_the_seed_and_not_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = CASES["multiclass"]
    values = []
    for processors in (1, 3):
        monkeypatch.setattr(yardstick_metrics, "_num_processors", lambda processors=processors: processors)
        values.append(resample(kept, num_draws=150, seed=1))
    assert np.array_equal(*values)
    assert not np.array_equal(values[0], resample(kept, num_draws=150, seed=2))
    other = KeptScores("classes", kept.targets, kept.scores[:, ::-1].copy())
    # The draws are paired: a model is compared with itself without any noise.
    assert (resample(other, num_draws=150, seed=1) != values[0]).any()
    assert np.array_equal(
        resample(KeptScores("classes", kept.targets, kept.scores + 0), num_draws=150, seed=1), values[0]
    )


def test_yardstick_interval_covers_the_true_accuracy_at_its_level() -> None:
    """The standard deviation of the resamples is that of a binomial share, and the interval has its quantiles."""
    random = np.random.default_rng(0)
    hits = random.random(400) < 0.8
    scores = np.where(hits[:, None], [0.1, 0.9], [0.9, 0.1]).astype(np.float32)
    kept = KeptScores("classes", np.ones(400, int), scores)
    draws = resample(kept)[:, 0]
    share = hits.mean()
    spread = np.sqrt(share * (1 - share) / 400)
    assert draws.std() == pytest.approx(spread, rel=0.05)
    assert interval(draws) == pytest.approx((share - 1.96 * spread, share + 1.96 * spread), abs=0.004)


def test_yardstick_draw_without_both_kinds_of_a_label_has_no_area() -> None:
    scores = np.array([[0.9], [0.1]], np.float32)
    draws = resample(KeptScores("labels", np.array([[True], [False]]), scores), num_draws=64, seed=0)
    alone = np.isnan(draws[:, 2])
    assert 0 < alone.sum() < 64 and (draws[~alone, 2] == 1).all()
    assert interval(draws[:, 2]) == (1.0, 1.0) and interval(draws[alone, 2]) is None


@pytest.mark.parametrize(
    ("kind", "targets", "scores", "message"),
    [
        ("classes", [0, 1], [[0.5, np.nan], [0.5, 0.5]], "NaN or infinity"),
        ("classes", [0, 2], [[0.5, 0.5], [0.5, 0.5]], "not one of the classes"),
        ("classes", [0], [[1.0]], "at least two"),
        ("classes", [0], [[0.5, 0.5], [0.5, 0.5]], "do not fit"),
        ("options", [1], [[0.5, np.nan]], "has 1 options"),
        ("labels", [[True], [True]], [[0.5], [0.5]], "no label has samples"),
    ],
)
def test_yardstick_unusable_scores_raise(kind: str, targets: list, scores: list, message: str) -> None:
    with pytest.raises(UserError, match=message):
        KeptScores(kind, np.array(targets), np.array(scores, np.float32))  # type: ignore[arg-type]

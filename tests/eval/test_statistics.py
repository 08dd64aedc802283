"""AUROC, ROC, intervals and paired tests against scikit-learn, scipy and brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from bclip_fast.errors import UserError
from bclip_fast.eval import statistics


def draw(num: int, seed: int, ties: bool) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.random(num) < 0.3
    scores = generator.normal(size=num) + labels
    return labels, scores.round(1) if ties else scores


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("num", [5, 40, 1000])
def test_auroc_and_roc_points_equal_scikit_learn(num: int, ties: bool) -> None:
    from sklearn.metrics import auc, roc_auc_score, roc_curve

    labels, scores = draw(num, num, ties)
    labels[:2] = [False, True]
    assert statistics.auroc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    points = np.array(statistics.roc_points(labels, scores, at_most=10**6))
    expected = np.stack(roc_curve(labels, scores, drop_intermediate=False)[:2], axis=1)
    np.testing.assert_allclose(points, expected, atol=1e-12)
    thin = np.array(statistics.roc_points(labels, scores, at_most=50))
    assert len(thin) <= 50
    assert thin[0].tolist() == [0, 0]
    assert thin[-1].tolist() == [1, 1]
    assert auc(*points.T) == pytest.approx(statistics.auroc(labels, scores))


def test_auroc_degenerate_scores_give_half_none_or_an_error() -> None:
    assert statistics.auroc(np.array([True, False, True]), np.zeros(3)) == 0.5
    assert statistics.auroc(np.array([True, True]), np.array([0.1, 0.2])) is None
    assert statistics.roc_points(np.array([False, False]), np.array([0.1, 0.2])) == []
    assert statistics.auroc_interval(np.array([True, True]), np.array([0.1, 0.2])) is None
    for scores in ([0.1, math.nan], [0.1, math.inf]):
        with pytest.raises(UserError, match="1 of 2 are not finite"):
            statistics.auroc(np.array([True, False]), np.array(scores))
    with pytest.raises(UserError, match="as many scores as labels"):
        statistics.auroc(np.array([True]), np.array([0.1, 0.2]))


def plain_bootstrap(values: np.ndarray, statistic, num: int = 4000) -> np.ndarray:
    generator = np.random.default_rng(9)
    resampled = [statistic(values[generator.integers(0, len(values), len(values))]) for _ in range(num)]
    return np.quantile(resampled, [0.025, 0.975])


def test_mean_interval_equals_plain_bootstrap() -> None:
    values = np.random.default_rng(1).choice([0.0, 0.25, 1.0], 300, p=[0.5, 0.2, 0.3])
    np.testing.assert_allclose(statistics.mean_interval(values), plain_bootstrap(values, np.mean), atol=0.006)
    assert statistics.mean_interval(np.ones(5)) == (1.0, 1.0)
    with pytest.raises(UserError, match="finite"):
        statistics.mean_interval(np.array([1.0, math.nan]))


def test_median_interval_is_near_plain_bootstrap_and_covers() -> None:
    values = np.random.default_rng(2).geometric(0.02, 501).astype(float)
    low, high = statistics.median_interval(values)
    expected = plain_bootstrap(values, np.median)
    assert abs(low - expected[0]) <= 2
    assert abs(high - expected[1]) <= 2
    generator, covered = np.random.default_rng(3), 0
    for _ in range(500):
        low, high = statistics.median_interval(generator.normal(size=101))
        covered += low <= 0 <= high
    assert 0.93 <= covered / 500 <= 0.985


def test_auroc_interval_covers_the_true_value() -> None:
    generator, covered = np.random.default_rng(4), 0
    true = 0.5 * math.erfc(-1 / 2)  # normal scores one standard deviation apart: Phi(1 / sqrt 2)
    for i in range(60):
        labels = np.arange(120) < 40
        low, high = statistics.auroc_interval(labels, generator.normal(size=120) + labels, seed=i)
        covered += low <= true <= high
    assert covered >= 52


def test_macro_auroc_interval_equals_plain_bootstrap() -> None:
    labels, scores = zip(*(draw(150, seed, False) for seed in range(3)), strict=True)
    table = np.stack([*labels, *scores], axis=1)

    def mean_area(rows: np.ndarray) -> float:
        return float(np.mean([statistics.auroc(rows[:, i] > 0, rows[:, 3 + i]) for i in range(3)]))

    interval = statistics.macro_auroc_interval(table[:, :3] > 0, table[:, 3:])
    np.testing.assert_allclose(interval, plain_bootstrap(table, mean_area, 1500), atol=0.012)
    # A class that all samples have does not count. Without any other class, the interval is undefined.
    assert statistics.macro_auroc_interval(np.ones((9, 2), bool), np.zeros((9, 2))) is None
    with_all = np.concatenate([table[:, :3] > 0, np.ones((150, 1), bool)], axis=1)
    assert statistics.macro_auroc_interval(with_all, table[:, [3, 4, 5, 3]]) == interval


def test_balanced_interval_contains_the_value() -> None:
    assert statistics.balanced_interval(np.array([[5, 0], [0, 3]])) == (1.0, 1.0)
    low, high = statistics.balanced_interval(np.array([[50, 50, 0], [10, 90, 0], [0, 0, 0]]))
    assert low < 0.7 < high
    assert high - low < 0.15


def test_mcnemar_equals_the_binomial_test() -> None:
    from scipy.stats import binomtest

    generator = np.random.default_rng(5)
    for num in (10, 100, 5000):
        first, second = generator.random(num) < 0.7, generator.random(num) < 0.75
        only = int((first & ~second).sum()), int((~first & second).sum())
        assert statistics.mcnemar(first, second) == pytest.approx(binomtest(only[0], sum(only)).pvalue, rel=1e-9)
    assert statistics.mcnemar(first, first) == 1


def test_sign_flip_is_close_to_all_sign_combinations() -> None:
    differences = np.array([0.5, 0.25, -0.1, 0.9, 0.0, 0.3, 0.25, -0.05])
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product((-1, 1), repeat=len(differences))]
    exact = np.mean(np.array(sums) >= abs(differences.sum()) - 1e-9)
    assert statistics.sign_flip(differences, num=40_000) == pytest.approx(exact, abs=0.01)


def test_auroc_difference_is_significant_only_for_different_scores() -> None:
    generator = np.random.default_rng(6)
    labels = generator.random(400) < 0.5
    good, bad = generator.normal(size=400) + 2 * labels, generator.normal(size=400) + 0.5 * labels
    value, (low, high), p = statistics.auroc_difference(labels, bad, good)  # type: ignore[misc]
    assert value == pytest.approx(statistics.auroc(labels, good) - statistics.auroc(labels, bad))
    assert 0 < low < value < high
    assert p < 0.01
    assert statistics.auroc_difference(labels, good, good)[2] == 1  # type: ignore[index]
    assert statistics.auroc_difference(np.ones(400), good, bad) is None


def test_holm_corrects_in_order() -> None:
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.5, 0.9]) == [1.0, 1.0]
    assert statistics.holm([]) == []

"""Few-shot classification on embeddings that are computed once: 1, 2, 4, ... samples a class, several draws each.

    centroid     The class whose mean embedding, normalised, is nearest by cosine similarity (Snell et al. 2017, Wang
                 et al. 2019, SimpleShot).
    logistic     Multinomial logistic regression with an L2 penalty. Its objective is scikit-learn's:
                 C sum_i cross-entropy_i + |W|^2 / 2, without a penalty of the bias.
    tip_adapter  The training-free Tip-Adapter (Zhang et al. 2022, equations 3 to 7): the zero-shot logits, plus alpha
                 times the labels of the shots, weighted by exp(-beta (1 - cosine similarity)).

C, alpha and beta are chosen on at most 4 validation samples a class, as in CoOp (Zhou et al. 2022). The test split
chooses nothing.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bclip_fast.errors import UserError

from . import probe, statistics, zero_shot
from .linear_heads import LabelledFeatures

log = logging.getLogger(__name__)

Classifier = Literal["centroid", "logistic", "tip_adapter"]
CLASSIFIERS: tuple[Classifier, ...] = get_args(Classifier)
SHOTS = (1, 2, 4, 8, 16)
PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
"""Values of C, the inverse strength of the L2 penalty."""
ALPHAS = tuple(np.linspace(0.1, 5, 20).round(3).tolist())
BETAS = tuple(np.linspace(0.5, 10, 20).round(3).tolist())
SCALE = 100.0
"""Factor of the cosine similarities, as in Tip-Adapter."""
_VAL_SHOTS = 4
_ROWS_AT_ONCE = 8192


def measure(
    train: LabelledFeatures,
    val: LabelledFeatures,
    test: LabelledFeatures,
    class_names: Sequence[str],
    texts: Tensor,
    *,
    shots: Sequence[int] = SHOTS,
    num_seeds: int = 3,
    classifiers: Sequence[Classifier] = CLASSIFIERS,
) -> dict[str, Any]:
    """Report accuracy and balanced accuracy of each classifier and number of shots: mean and deviation over draws.

    Args:
        train, val, test: features (N, D), unit norm, with labels int64 (N,).
        texts: class embeddings (C, D), unit norm, for tip_adapter.

    Returns:
        JSON-ready dict, as for zero-shot classification, of the last classifier's largest number of shots in its first
        draw. In addition, `few_shot` has a row for each classifier, number of shots and draw, and its `seconds`:
        choice, training and test, without embeddings.

    Raises:
        UserError: NaN, or a class with too few training samples.
    """
    for name, data in (("train", train), ("val", val), ("test", test)):
        if not len(data) or not bool(torch.isfinite(data.features).all()):
            raise UserError(f"the {name} features of few_shot must be non-empty and finite")
    num_classes, targets = len(class_names), test.labels.cpu()
    rows: list[dict[str, Any]] = []
    figures: list[dict[str, Any]] = []
    logits = torch.empty(0)
    support = torch.bincount(targets, minlength=num_classes).double()
    majority, uniform = float(support.max()) / len(test), 1 / num_classes
    start = time.perf_counter()
    for classifier in classifiers:
        for num_shots in shots:
            runs = []
            for seed in range(num_seeds):
                chosen = probe.subset(train.labels, num_classes, shots=num_shots, seed=seed, class_names=class_names)
                few = train[chosen.to(train.labels.device)]
                few_val = val[_draw(val.labels, num_classes, min(num_shots, _VAL_SHOTS), seed)]
                began = time.perf_counter()
                settings, predict = _FITS[classifier](few, few_val, num_classes, texts)
                current = _in_chunks(predict, test.features)
                seconds = time.perf_counter() - began
                if num_shots == max(shots) and seed == 0:
                    logits = current
                hits = (current.argmax(1) == targets).double()
                recalls = torch.bincount(targets, hits, minlength=num_classes) / support
                scores = {"accuracy": float(hits.mean()), "balanced accuracy": float(recalls[support > 0].mean())}
                runs.append(scores)
                rows.append(
                    {"classifier": classifier, "shots": num_shots, "seed": seed, **settings, "num_val": len(few_val),
                     "seconds": round(seconds, 4), **scores}
                )  # fmt: skip
            for kind, chance, chance_is in (
                ("accuracy", majority, "always the most frequent class"),
                ("balanced accuracy", uniform, "uniform guess"),
            ):
                values = [scores[kind] for scores in runs]
                deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
                figures.append(
                    statistics.metric(
                        f"{kind}, {_words(classifier)}, {num_shots} shot{'s' if num_shots > 1 else ''}",
                        math.fsum(values) / len(values), chance, chance_is, len(test), deviation=deviation,
                    )
                )  # fmt: skip
    seconds = time.perf_counter() - start
    log.info("few_shot: %d classifiers trained and tested in %.1f s", len(rows), seconds)
    details = zero_shot.measure(targets, logits.argmax(1), class_names, logits.double().softmax(1))
    return details | {"few_shot": rows, "seconds": round(seconds, 2), "figures": figures}


def default_shots(labels: Tensor, num_classes: int) -> tuple[int, ...]:
    """Return those of `SHOTS` for which each class has enough samples. Raises UserError for a class without samples."""
    smallest = int(torch.bincount(labels, minlength=num_classes).min())
    if not smallest:
        raise UserError("the train split has no sample of a class; few_shot needs at least 1 of each class")
    shots = tuple(num for num in SHOTS if num <= smallest)
    if len(shots) < len(SHOTS):
        log.warning("few_shot: a class has only %d training samples, so the numbers of shots are %s", smallest, shots)
    return shots


def _words(classifier: str) -> str:
    return classifier.replace("tip_adapter", "Tip-Adapter")


def _draw(labels: Tensor, num_classes: int, num: int, seed: int) -> Tensor:
    """Draw `num` rows of each class, or all of a class that has fewer."""
    generator = torch.Generator().manual_seed(seed)
    by_class = [(labels.cpu() == number).nonzero()[:, 0] for number in range(num_classes)]
    rows = [rows[torch.randperm(len(rows), generator=generator)[:num]] for rows in by_class]
    return torch.cat(rows).sort().values.to(labels.device)


def _in_chunks(predict: Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
    return torch.cat([predict(chunk).float().cpu() for chunk in features.split(_ROWS_AT_ONCE)])


Fitted = tuple[dict[str, Any], Callable[[Tensor], Tensor]]
"""The chosen settings, and a function from features (n, D) to logits (n, C)."""


def fit_centroid(few: LabelledFeatures, val: LabelledFeatures, num_classes: int, texts: Tensor) -> Fitted:
    """Return the nearest-centroid classifier. It has nothing to choose."""
    sums = few.features.new_zeros(num_classes, few.features.shape[1]).index_add_(0, few.labels, few.features)
    centroids = F.normalize(sums, dim=1)
    return {}, lambda features: SCALE * features @ centroids.T


def fit_logistic(few: LabelledFeatures, val: LabelledFeatures, num_classes: int, texts: Tensor) -> Fitted:
    """Return the logistic regression with the penalty of the best validation accuracy. On ties, the strongest wins."""
    weights: Tensor | None = None
    best: tuple[float, float, Tensor] = (-1.0, 0.0, torch.empty(0))
    for penalty in PENALTIES:
        weights = regression(few, num_classes, penalty, weights)
        accuracy = float((_linear(val.features, weights).argmax(1) == val.labels).double().mean())
        if accuracy > best[0]:
            best = accuracy, penalty, weights
    return {"C": best[1], "val_score": best[0]}, lambda features: _linear(features, best[2])


def regression(data: LabelledFeatures, num_classes: int, penalty: float, start: Tensor | None = None) -> Tensor:
    """Fit a multinomial logistic regression by L-BFGS in float64. Returns (C, D + 1), the bias last.

    penalty: C of scikit-learn's LogisticRegression. start: weights to start at. Default: zeros.
    """
    features, labels = data.features.double().clone(), data.labels.clone()  # autograd saves no inference tensors
    weights = features.new_zeros(num_classes, features.shape[1] + 1) if start is None else start.clone()
    weights.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=1000, tolerance_grad=1e-9, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        cross_entropy = F.cross_entropy(_linear(features, weights), labels, reduction="sum")
        # Divided by C n, so that the tolerance of the gradient means the same for every penalty.
        value = (cross_entropy + weights[:, :-1].square().sum() / (2 * penalty)) / len(labels)
        value.backward()
        return value

    with torch.inference_mode(False), torch.enable_grad():
        optimizer.step(loss)
    return weights.detach()


def _linear(features: Tensor, weights: Tensor) -> Tensor:
    return features.double() @ weights[:, :-1].T + weights[:, -1]


def fit_tip_adapter(few: LabelledFeatures, val: LabelledFeatures, num_classes: int, texts: Tensor) -> Fitted:
    """Return the training-free Tip-Adapter with the alpha and beta of the best validation accuracy. On ties, the
    smallest beta wins, and then the smallest alpha."""
    one_hot = F.one_hot(few.labels, num_classes).float()

    def parts(features: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        return SCALE * features @ texts.T, (-beta * (1 - features @ few.features.T)).exp() @ one_hot

    alphas = texts.new_tensor(ALPHAS)
    best = (-1.0, 0.0, 0.0)
    for beta in BETAS:
        zero_shot_logits, cached = parts(val.features, beta)
        predictions = (zero_shot_logits + alphas[:, None, None] * cached).argmax(2)
        accuracies = (predictions == val.labels).double().mean(1)
        place = int(accuracies.argmax())
        if float(accuracies[place]) > best[0]:
            best = float(accuracies[place]), ALPHAS[place], beta

    def predict(features: Tensor) -> Tensor:
        zero_shot_logits, cached = parts(features, best[2])
        return zero_shot_logits + best[1] * cached

    return {"alpha": best[1], "beta": best[2], "val_score": best[0]}, predict


_FITS: dict[str, Callable[[LabelledFeatures, LabelledFeatures, int, Tensor], Fitted]] = {
    "centroid": fit_centroid,
    "logistic": fit_logistic,
    "tip_adapter": fit_tip_adapter,
}

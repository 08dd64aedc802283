"""Zero-shot classification as the ELEVATER toolkit does it, which the BiomedCLIP paper used.

Per class: encode every prompt, L2-normalise each, average, L2-normalise. An image goes to the class of the highest
cosine similarity.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from . import statistics
from .prompts import PromptSet
from .retrieval import check_embeddings


def class_embeddings(encode: Callable[[list[str]], Tensor], prompts: PromptSet) -> Tensor:
    """(C, D) float32, unit norm, one row per class of `prompts` in its order.

    `encode` maps texts to L2-normalised rows (n, D). Source of the formula: ELEVATER's `feature.py`.
    """
    texts = [prompts.prompts(name) for name in prompts.classes]
    rows = encode([text for group in texts for text in group]).float()
    means = torch.stack([group.mean(0) for group in rows.split([len(group) for group in texts])])
    return F.normalize(means, dim=1)


def similarities(images: Tensor, classes: Tensor) -> Tensor:
    """(N, C) float32 cosine similarities of (N, D) images and (C, D) classes, all of unit norm and finite."""
    check_embeddings(images, "image embeddings")
    check_embeddings(classes, "class embeddings")
    return images.float() @ classes.float().T


def predict(scores: Tensor) -> tuple[Tensor, int]:
    """Class index (N,) int64 of the highest score in (N, C), and how many rows had an exact tie for it.

    On a tie the first class is taken, as argmax does.
    """
    best = scores.amax(1, keepdim=True)
    return scores.argmax(1), int(((scores == best).sum(1) > 1).sum())


def measure(
    labels: Tensor, predictions: Tensor, class_names: Sequence[str], scores: Tensor | None = None
) -> dict[str, Any]:
    """Accuracy, balanced accuracy, AUROC, per-class table and confusion matrix, with chance levels and intervals.

    Balanced accuracy is the mean recall over the classes that occur. Chance is always guessing the most frequent
    class for accuracy, and a uniform guess for balanced accuracy. With two classes the AUROC is that of the second,
    with more the mean over the classes that occur, each against all others (macro).

    Args:
        labels, predictions: (N,) int64, in [0, C).
        scores: (N, C), higher is likelier and comparable between samples, as probabilities are; None: no AUROC.

    Returns:
        A JSON-ready dict; `confusion[i][j]` counts samples of class i predicted as j; `roc` holds a curve a class.
    """
    num_classes, num = len(class_names), len(labels)
    if not num:
        raise UserError("zero-shot classification needs at least one labelled sample, got none")
    if len(predictions) != num:
        raise UserError(f"{num} labels but {len(predictions)} predictions")
    for name, values in (("label", labels), ("prediction", predictions)):
        if values.is_floating_point() or int(values.min()) < 0 or int(values.max()) >= num_classes:
            raise UserError(f"every {name} must be a whole number from 0 to {num_classes - 1}")
    confusion = torch.bincount(labels * num_classes + predictions, minlength=num_classes**2).view(
        num_classes, num_classes
    )
    support, predicted, hits = confusion.sum(1), confusion.sum(0), confusion.diagonal()
    occurring = support > 0
    recall = hits.double() / support
    precision = hits.double() / predicted
    uniform, majority = 1 / num_classes, float(support.max()) / num
    correct = (labels == predictions).double().numpy()
    figures = [
        statistics.figure(
            "accuracy",
            float(hits.sum()) / num,
            majority,
            "always the most frequent class",
            num,
            interval=statistics.mean_interval(correct),
        ),
        statistics.figure(
            "balanced accuracy",
            float(recall[occurring].mean()),
            uniform,
            "uniform guess",
            num,
            interval=statistics.balanced_interval(confusion.numpy()),
        ),
    ]
    areas: list[float | None] = [None] * num_classes
    roc: list[dict[str, Any]] = []
    if scores is not None:
        areas, roc, found = _areas(labels[:, None] == torch.arange(num_classes), scores, class_names)
        figures += found
    return {
        "num_samples": num,
        "classes": list(class_names),
        "chance": {"uniform": uniform, "majority": majority},
        "figures": figures,
        "per_class": [
            {
                "class": name,
                "num_samples": int(support[i]),
                "num_predicted": int(predicted[i]),
                "recall": float(recall[i]) if support[i] else None,
                "precision": float(precision[i]) if predicted[i] else None,
                "auroc": areas[i],
            }
            for i, name in enumerate(class_names)
        ],
        "confusion": confusion.tolist(),
        "roc": roc,
        "samples": {
            "label": [class_names[i] for i in labels.tolist()],
            "prediction": [class_names[i] for i in predictions.tolist()],
            "accuracy": correct.astype(int).tolist(),
            **({} if scores is None else _columns(scores, class_names)),
        },
    }


def measure_multi_label(
    truth: Tensor, scores: Tensor, class_names: Sequence[str], threshold: float | None = None
) -> dict[str, Any]:
    """Macro AUROC of samples that have any number of classes, and at `threshold` the mean accuracy of the classes.

    Source: MedMNIST's evaluator, getAUC and getACC. Classes that all samples have, or none, are left out of the AUROC,
    which is not defined for them. truth: (N, C) bool; scores: (N, C).
    """
    if not len(truth) or truth.shape != scores.shape or truth.shape[1] != len(class_names):
        raise UserError(f"labels {tuple(truth.shape)} and scores {tuple(scores.shape)} must be (N, {len(class_names)})")
    areas, roc, figures = _areas(truth, scores, class_names)
    samples: dict[str, Any] = {}
    if threshold is not None:
        right = ((scores > threshold) == truth).double().mean(1).numpy()
        majority = float(torch.maximum(truth.double().mean(0), 1 - truth.double().mean(0)).mean())
        figures.append(
            statistics.figure(
                "accuracy",
                float(right.mean()),
                majority,
                "each class as it is for most, mean of classes",
                len(truth),
                interval=statistics.mean_interval(right),
            )
        )
        samples["accuracy"] = [round(value, 6) for value in right.tolist()]
    return {
        "num_samples": len(truth),
        "classes": list(class_names),
        "figures": figures,
        "per_class": [
            {"class": name, "num_samples": int(truth[:, i].sum()), "auroc": areas[i]}
            for i, name in enumerate(class_names)
        ],
        "roc": roc,
        "samples": {
            "label": [
                "|".join(name for name, has in zip(class_names, row, strict=True) if has) for row in truth.tolist()
            ],
            **samples,
            **_columns(scores, class_names),
        },
    }


def _columns(scores: Tensor, class_names: Sequence[str]) -> dict[str, list[float]]:
    columns = scores.double().T.tolist()
    return {
        f"score of {name}": [round(x, 7) for x in column] for name, column in zip(class_names, columns, strict=True)
    }


def _areas(
    truth: Tensor, scores: Tensor, class_names: Sequence[str]
) -> tuple[list[float | None], list[dict[str, Any]], list[dict[str, Any]]]:
    """AUROC of each class (None: it or its opposite doesn't occur), the curves, and the figure of both or all."""
    if not bool(torch.isfinite(scores).all()):
        raise UserError("scores hold NaN or infinity")
    binary = len(class_names) == 2 and bool((truth.sum(1) == 1).all())
    values = scores.double().numpy()
    columns = {1: values[:, 1] - values[:, 0]} if binary else dict(enumerate(values.T))
    areas: list[float | None] = [None] * len(class_names)
    roc = []
    for i, column in columns.items():
        own = truth[:, i].numpy()
        areas[i] = statistics.auroc(own, column)
        if areas[i] is not None:
            roc.append({"class": class_names[i], "auroc": areas[i], "points": statistics.roc_points(own, column)})
    known = [area for area in areas if area is not None]
    if not known:
        return areas, roc, []
    name = "AUROC" if binary else "AUROC, macro"
    if binary:
        interval = statistics.auroc_interval(truth[:, 1].numpy(), columns[1])
    else:
        interval = statistics.macro_auroc_interval(truth.numpy(), values)
    mean = sum(known) / len(known)
    return (
        areas,
        roc,
        [statistics.figure(name, mean, 0.5, "random order", len(truth), interval=interval)],
    )


def sensitivity(
    encode: Callable[[list[str]], Tensor], prompts: PromptSet, images: Tensor, labels: Tensor
) -> list[dict[str, Any]]:
    """What each template gives on its own, and all together: template, accuracy, balanced accuracy."""
    rows = []
    single = [dataclasses.replace(prompts, templates=(template,)) for template in prompts.templates]
    for name, one in [*zip(prompts.templates, single, strict=True), ("all together", prompts)]:
        predictions, _ = predict(similarities(images, class_embeddings(encode, one)))
        predictions = predictions.cpu()
        hits = (predictions == labels).double()
        recalls = [float(hits[labels == kind].mean()) for kind in labels.unique().tolist()]
        rows.append(
            {"template": name, "accuracy": float(hits.mean()), "balanced accuracy": sum(recalls) / len(recalls)}
        )
    return rows

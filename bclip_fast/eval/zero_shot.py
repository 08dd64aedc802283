"""Zero-shot classification as in the ELEVATER toolkit, which the BiomedCLIP paper used.

For each class, every prompt is embedded and L2-normalised. The mean of the prompts, L2-normalised again, is the class
embedding. The predicted class has the highest cosine similarity to the image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bclip_fast.errors import UserError

from . import statistics
from .prompts import PromptSet
from .retrieval import check_embeddings


def class_embeddings(encode: Callable[[list[str]], Tensor], prompts: PromptSet) -> Tensor:
    """Embed the classes of a prompt set: (C, D) float32, unit norm. Source of the formula: ELEVATER's `feature.py`.

    encode: maps texts to L2-normalised rows (n, D). Learned embeddings of the prompt set need none.
    """
    if prompts.embeddings is not None:
        return prompts.embeddings
    texts = [prompts.prompts(name) for name in prompts.classes]
    rows = encode([text for class_texts in texts for text in class_texts]).float()
    means = torch.stack([group.mean(0) for group in rows.split([len(class_texts) for class_texts in texts])])
    return F.normalize(means, dim=1)


def similarities(images: Tensor, classes: Tensor) -> Tensor:
    """Return cosine similarities (N, C) float32 of images (N, D) and classes (C, D).

    Raises:
        UserError: rows that are not finite or not of unit norm.
    """
    check_embeddings(images, "image embeddings")
    check_embeddings(classes, "class embeddings")
    return images.float() @ classes.float().T


def predict(scores: Tensor) -> tuple[Tensor, int]:
    """Return the class of the highest score, int64 (N,), and the number of rows with an exact tie for it.

    On a tie the first class wins, as in argmax.
    """
    best = scores.amax(1, keepdim=True)
    return scores.argmax(1), int(((scores == best).sum(1) > 1).sum())


def measure(
    labels: Tensor, predictions: Tensor, class_names: Sequence[str], scores: Tensor | None = None
) -> dict[str, Any]:
    """Compute accuracy, balanced accuracy, AUROC, a table of the classes and the confusion matrix.

    Balanced accuracy is the mean recall over the classes that occur. The chance baseline of accuracy always predicts
    the most frequent class. The baseline of balanced accuracy guesses uniformly. With two classes, the AUROC is that
    of the second. With more, it is the mean over the classes that occur, each against all others (macro).

    Args:
        labels, predictions: int64 (N,), in [0, C).
        scores: (N, C). Higher scores are more likely, and samples are comparable, as for probabilities. None: no AUROC.

    Returns:
        JSON-ready dict. `confusion[i][j]` counts samples of class i predicted as j. `roc` holds one curve per class.
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
    is_correct = (labels == predictions).double().numpy()
    metrics = [
        statistics.metric(
            "accuracy",
            float(hits.sum()) / num,
            majority,
            "always the most frequent class",
            num,
            interval=statistics.mean_interval(is_correct),
        ),
        statistics.metric(
            "balanced accuracy",
            float(recall[occurring].mean()),
            uniform,
            "uniform guess",
            num,
            interval=statistics.balanced_interval(confusion.numpy()),
        ),
    ]
    aurocs: list[float | None] = [None] * num_classes
    roc: list[dict[str, Any]] = []
    if scores is not None:
        aurocs, roc, auroc_metrics = _aurocs(labels[:, None] == torch.arange(num_classes), scores, class_names)
        metrics += auroc_metrics
    return {
        "num_samples": num,
        "classes": list(class_names),
        "chance": {"uniform": uniform, "majority": majority},
        "figures": metrics,
        "per_class": [
            {
                "class": name,
                "num_samples": int(support[i]),
                "num_predicted": int(predicted[i]),
                "recall": float(recall[i]) if support[i] else None,
                "precision": float(precision[i]) if predicted[i] else None,
                "auroc": aurocs[i],
            }
            for i, name in enumerate(class_names)
        ],
        "confusion": confusion.tolist(),
        "roc": roc,
        "samples": {
            "label": [class_names[i] for i in labels.tolist()],
            "prediction": [class_names[i] for i in predictions.tolist()],
            "accuracy": is_correct.astype(int).tolist(),
            **({} if scores is None else _score_columns(scores, class_names)),
        },
    }


def measure_multi_label(
    targets: Tensor, scores: Tensor, class_names: Sequence[str], threshold: float | None = None
) -> dict[str, Any]:
    """Compute the macro AUROC of multi-label samples, and at `threshold` the mean accuracy of the classes.

    The AUROC leaves out classes without positive or without negative samples, where it is undefined. Source: getAUC
    and getACC of MedMNIST's evaluator.

    Args:
        targets: (N, C) bool.
        scores: (N, C).
        threshold: scores above it predict the class. None: no accuracy.
    """
    if not len(targets) or targets.shape != scores.shape or targets.shape[1] != len(class_names):
        raise UserError(
            f"labels {tuple(targets.shape)} and scores {tuple(scores.shape)} must be (N, {len(class_names)})"
        )
    aurocs, roc, metrics = _aurocs(targets, scores, class_names)
    samples: dict[str, Any] = {}
    if threshold is not None:
        accuracies = ((scores > threshold) == targets).double().mean(1).numpy()
        majority = float(torch.maximum(targets.double().mean(0), 1 - targets.double().mean(0)).mean())
        metrics.append(
            statistics.metric(
                "accuracy",
                float(accuracies.mean()),
                majority,
                "the more frequent answer for each class, mean of classes",
                len(targets),
                interval=statistics.mean_interval(accuracies),
            )
        )
        samples["accuracy"] = [round(value, 6) for value in accuracies.tolist()]
    return {
        "num_samples": len(targets),
        "classes": list(class_names),
        "figures": metrics,
        "per_class": [
            {"class": name, "num_samples": int(targets[:, i].sum()), "auroc": aurocs[i]}
            for i, name in enumerate(class_names)
        ],
        "roc": roc,
        "samples": {
            "label": [
                "|".join(name for name, is_positive in zip(class_names, row, strict=True) if is_positive)
                for row in targets.tolist()
            ],
            **samples,
            **_score_columns(scores, class_names),
        },
    }


def _score_columns(scores: Tensor, class_names: Sequence[str]) -> dict[str, list[float]]:
    columns = scores.double().T.tolist()
    return {
        f"score of {name}": [round(x, 7) for x in column] for name, column in zip(class_names, columns, strict=True)
    }


def _aurocs(
    targets: Tensor, scores: Tensor, class_names: Sequence[str]
) -> tuple[list[float | None], list[dict[str, Any]], list[dict[str, Any]]]:
    """Return each class's AUROC, the ROC curves, and at most one metric: the AUROC, or the macro AUROC.

    The AUROC of a class is None without positive or without negative samples.
    """
    if not bool(torch.isfinite(scores).all()):
        raise UserError("scores hold NaN or infinity")
    is_binary = len(class_names) == 2 and bool((targets.sum(1) == 1).all())
    values = scores.double().numpy()
    columns = {1: values[:, 1] - values[:, 0]} if is_binary else dict(enumerate(values.T))
    aurocs: list[float | None] = [None] * len(class_names)
    roc = []
    for i, column in columns.items():
        labels = targets[:, i].numpy()
        aurocs[i] = statistics.auroc(labels, column)
        if aurocs[i] is not None:
            roc.append({"class": class_names[i], "auroc": aurocs[i], "points": statistics.roc_points(labels, column)})
    defined = [value for value in aurocs if value is not None]
    if not defined:
        return aurocs, roc, []
    if is_binary:
        name, interval = "AUROC", statistics.auroc_interval(targets[:, 1].numpy(), columns[1])
    else:
        name, interval = "AUROC, macro", statistics.macro_auroc_interval(targets.numpy(), values)
    mean = sum(defined) / len(defined)
    return aurocs, roc, [statistics.metric(name, mean, 0.5, "random order", len(targets), interval=interval)]


def sensitivity(
    encode: Callable[[list[str]], Tensor], prompts: PromptSet, images: Tensor, labels: Tensor
) -> list[dict[str, Any]]:
    """Classify with each template separately, and with all together. Rows: template, accuracy, balanced accuracy."""
    texts = [text for name in prompts.classes for text in prompts.prompts(name)]
    embeddings = dict(zip(texts, encode(texts), strict=True))

    def look_up(texts: list[str]) -> Tensor:
        return torch.stack([embeddings[text] for text in texts])

    rows = []
    single = [dataclasses.replace(prompts, templates=(template,)) for template in prompts.templates]
    for name, prompt_set in [*zip(prompts.templates, single, strict=True), ("all together", prompts)]:
        predictions, _ = predict(similarities(images, class_embeddings(look_up, prompt_set)))
        predictions = predictions.cpu()
        hits = (predictions == labels).double()
        recalls = [float(hits[labels == label].mean()) for label in labels.unique().tolist()]
        rows.append(
            {"template": name, "accuracy": float(hits.mean()), "balanced accuracy": sum(recalls) / len(recalls)}
        )
    return rows

"""Zero-shot classification as the ELEVATER toolkit does it, which the BiomedCLIP paper used.

Per class: encode every prompt, L2-normalise each, average, L2-normalise. An image goes to the class of the highest
cosine similarity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
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


def predict(images: Tensor, classes: Tensor) -> tuple[Tensor, int]:
    """Class index (N,) int64 of the highest cosine similarity, and how many images had an exact tie for it.

    On a tie the first class is taken, as argmax does.

    Args:
        images: (N, D) float32, unit norm.
        classes: (C, D) float32, unit norm.
    """
    check_embeddings(images, "image embeddings")
    check_embeddings(classes, "class embeddings")
    scores = images.float() @ classes.float().T
    best = scores.amax(1, keepdim=True)
    return scores.argmax(1), int(((scores == best).sum(1) > 1).sum())


def measure(labels: Tensor, predictions: Tensor, class_names: Sequence[str]) -> dict[str, Any]:
    """Accuracy, balanced accuracy, per-class table and confusion matrix, with chance levels.

    Balanced accuracy is the mean recall over the classes that occur. Chance is always guessing the most frequent
    class for accuracy, and a uniform guess for balanced accuracy.

    Args:
        labels, predictions: (N,) int64, in [0, C).

    Returns:
        A JSON-ready dict; `confusion[i][j]` counts samples of class i predicted as j.
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
    return {
        "num_samples": num,
        "classes": list(class_names),
        "chance": {"uniform": uniform, "majority": majority},
        "figures": [
            _figure("accuracy", float(hits.sum()) / num, majority, "always the most frequent class", num),
            _figure("balanced accuracy", float(recall[occurring].mean()), uniform, "uniform guess", num),
        ],
        "per_class": [
            {
                "class": name,
                "num_samples": int(support[i]),
                "num_predicted": int(predicted[i]),
                "recall": float(recall[i]) if support[i] else None,
                "precision": float(precision[i]) if predicted[i] else None,
            }
            for i, name in enumerate(class_names)
        ],
        "confusion": confusion.tolist(),
    }


def _figure(name: str, value: float, chance: float, chance_is: str, num_samples: int) -> dict[str, Any]:
    return {
        "name": name,
        "value": value,
        "chance": chance,
        "chance_is": chance_is,
        "unit": "share",
        "higher_is_better": True,
        "num_samples": num_samples,
    }

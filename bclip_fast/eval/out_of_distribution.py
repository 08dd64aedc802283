"""Detection of images that are unlike the data: scores without training, and their AUROC against other data.

A higher score means "like the data". With cosine similarities s to the C classes and the model's logit scale t:

    maximum softmax   max softmax(t s)               Hendrycks and Gimpel 2017, arXiv 1610.02136
    energy            logsumexp(t s) / t             Liu et al. 2020, arXiv 2010.03759, equation 4, at temperature 1 / t
    maximum cosine    max s
    nearest training  cosine similarity of the k-th nearest training image (Sun et al. 2022, arXiv 2204.06507)

AUROC is the probability that an image of the data scores above one of the other data. FPR95 is the share of the other
data that passes a threshold that 95 % of the data pass.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bclip_fast.errors import UserError

from . import statistics
from .retrieval import check_embeddings, full_float32

NEIGHBOUR = 10
_PAIRS_AT_ONCE = 1 << 24


@torch.inference_mode()
def class_scores(images: Tensor, classes: Tensor, scale: float) -> dict[str, np.ndarray]:
    """Return the scores that need class embeddings, float64 (N,) each.

    images, classes: (N, D) and (C, D), unit norm. scale: factor of the similarities.
    """
    parts: dict[str, list[Tensor]] = {"maximum softmax": [], "energy": [], "maximum cosine": []}
    for chunk in images.split(max(1, _PAIRS_AT_ONCE // len(classes))):
        with full_float32():
            similarities = (chunk.float() @ classes.float().T).double()
        logits = scale * similarities
        parts["maximum softmax"].append(logits.softmax(1).amax(1))
        parts["energy"].append(logits.logsumexp(1) / scale)
        parts["maximum cosine"].append(similarities.amax(1))
    return {name: torch.cat(rows).cpu().numpy() for name, rows in parts.items()}


@torch.inference_mode()
def neighbour_scores(images: Tensor, train: Tensor, neighbour: int = NEIGHBOUR) -> np.ndarray:
    """Return the similarity of the `neighbour`-th nearest of train (M, D), float64 (N,), or of the farthest."""
    number = min(neighbour, len(train))
    rows = []
    for chunk in images.split(max(1, _PAIRS_AT_ONCE // len(train))):
        with full_float32():
            rows.append((chunk.float() @ train.float().T).topk(number, dim=1).values[:, -1].double())
    return torch.cat(rows).cpu().numpy()


def measure(
    images: Tensor, others: Tensor, classes: Tensor, scale: float, train: Tensor | None = None
) -> dict[str, Any]:
    """Compare the scores of the data's images with those of other images.

    Args:
        images, others: (N, D) and (M, D), unit norm.
        classes: class embeddings (C, D), unit norm.
        scale: the model's logit scale.
        train: training images (T, D), for the score by neighbours. None: without it.

    Returns:
        JSON-ready dict: num_samples, num_other, figures, roc, and samples, those of the data first.

    Raises:
        UserError: embeddings that are NaN or not of unit norm.
    """
    for name, rows in (("image embeddings", images), ("embeddings of the other data", others)):
        check_embeddings(rows, name)
    both = torch.cat([images, others])
    scores = class_scores(both, classes, scale)
    if train is not None:
        check_embeddings(train, "training embeddings")
        scores["nearest training"] = neighbour_scores(both, train)
    is_inside = np.arange(len(both)) < len(images)
    figures, roc = [], []
    for name, values in scores.items():
        area = statistics.auroc(is_inside, values)
        if area is None:
            raise UserError("out-of-distribution detection needs images of both data sets")
        interval = statistics.auroc_interval(is_inside, values)
        figures.append(statistics.metric(f"AUROC, {name}", area, 0.5, "random order", len(both), interval=interval))
        passing = values[~is_inside] >= threshold(values[is_inside])
        figures.append(
            statistics.metric(
                f"FPR95, {name}", float(passing.mean()), 0.95, "random order", len(others),
                interval=statistics.mean_interval(passing), higher_is_better=False,
            )
        )  # fmt: skip
        roc.append({"class": name, "auroc": area, "points": statistics.roc_points(is_inside, values)})
    return {
        "num_samples": len(images),
        "num_other": len(others),
        "figures": figures,
        "roc": roc,
        "samples": {
            "in_distribution": is_inside.astype(int).tolist(),
            **{f"score of {name}": [float(f"{value:.9g}") for value in values] for name, values in scores.items()},
        },
    }


def threshold(values: np.ndarray) -> float:
    """Return the highest score that at least 95 % of `values` reach."""
    return float(np.sort(values)[len(values) - int(np.ceil(0.95 * len(values)))])

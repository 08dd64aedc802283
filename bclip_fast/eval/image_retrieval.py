"""Image-to-image retrieval: the images of the same class should be the nearest ones.

Every image with a label is a query. The candidates are the other images, or the images of a separate gallery. R@k is
the share of queries with an image of their class among the first k images. mAP is the mean of the average precision,
over queries and over classes. A query without any correct candidate has neither, so it is left out and counted.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bclip_fast.errors import UserError

from . import average_precision, statistics
from .datasets import EvalDataset, open_dataset
from .labels import Inputs, Results, label_kinds, labelled_rows, read_labels
from .retrieval import RECALL_AT, check_embeddings

log = logging.getLogger(__name__)


def run(inputs: Inputs) -> Results:
    """Rank images for images, once for each label kind. Raises UserError."""
    if inputs.task.multi_label:
        raise UserError(
            f"task {inputs.task.name!r} has multi_label = true, but image_retrieval needs one class an image; "
            "choose another label"
        )
    kinds = label_kinds(inputs)
    gallery = _open_gallery(inputs)
    return {
        inputs.task.name if inputs.task.label or len(kinds) == 1 else f"{inputs.task.name}/{kind}": _run(
            inputs, kind, gallery
        )
        for kind in kinds
    }


def _open_gallery(inputs: Inputs) -> EvalDataset | None:
    """Return the separate gallery, or None for the queries themselves."""
    name = inputs.config.gallery
    if not name:
        return None
    data = open_dataset(name, inputs.data.split) if Path(name).exists() else inputs.open_split(name)
    if (data.split, data.path) == (inputs.data.split, inputs.data.path):
        raise UserError(
            f"gallery={name!r} is the data of the queries, {data.path}, split {data.split!r}; leave --gallery out to "
            "search the other images of the same split"
        )
    return inputs.readable(data)


def _run(inputs: Inputs, kind: str, gallery: EvalDataset | None) -> dict[str, Any]:
    sides: list[Any] = []
    for data in (inputs.data, *([gallery] if gallery is not None else [])):
        labels = read_labels(data, kind, False)
        rows = labelled_rows(labels)
        if not rows:
            raise UserError(f"label {kind!r} of {data.path}, split {data.split!r}: no sample has it; choose another")
        images = inputs.embedder.images(data)
        sides += images[torch.tensor(rows, device=images.device)], [str(labels[row]) for row in rows]
    result = measure(*sides)
    rows = labelled_rows(inputs.data.labels(kind))
    kept = [inputs.data.key(rows[i]) for i in result.pop("rows")]
    result["samples"] = {"key": kept, **result["samples"]}
    if num := result["num_without_match"]:
        log.warning("%s: %d of %d images have no image of their class to find, and are left out", kind, num, len(rows))
    return result | {
        "label": kind,
        "num_without_label": len(inputs.data) - len(rows),
        "gallery_data": None if gallery is None else {"path": gallery.path, "split": gallery.split},
    }


def measure(
    queries: Tensor,
    labels: Sequence[str],
    candidates: Tensor | None = None,
    candidate_labels: Sequence[str] = (),
) -> dict[str, Any]:
    """Compute R@1, R@5, R@10 and mAP over queries and over classes, with chance baselines and 95 % intervals.

    Args:
        queries: (N, D), unit norm.
        labels: class of each query.
        candidates, candidate_labels: (M, D) and M classes of a separate gallery. None: the queries. A query is then
            not a candidate of itself.

    Returns:
        JSON-ready dict: num_samples, num_candidates, num_without_match, figures, per_class, samples, and `rows`, the
        queries that have a correct candidate.

    Raises:
        UserError: NaN or infinity, rows without unit norm, or no query with a correct candidate.
    """
    is_same = candidates is None
    check_embeddings(queries, "query embeddings")
    if candidates is None:
        candidates, candidate_labels = queries, labels
    check_embeddings(candidates, "gallery embeddings")
    if queries.shape[1] != candidates.shape[1] or (len(labels), len(candidate_labels)) != (
        len(queries),
        len(candidates),
    ):
        raise UserError(
            f"queries {tuple(queries.shape)} with {len(labels)} labels and gallery {tuple(candidates.shape)} with "
            f"{len(candidate_labels)} labels do not fit together"
        )
    names = sorted({*labels, *candidate_labels})
    numbers = {name: number for number, name in enumerate(names)}
    query_classes = np.array([numbers[label] for label in labels])
    candidate_classes = np.array([numbers[label] for label in candidate_labels])
    retrieved = average_precision.retrieve(queries, query_classes, candidates, candidate_classes, is_same=is_same)
    rows, ranks, values = retrieved.rows, retrieved.ranks, retrieved.average_precision
    if not len(rows):
        raise UserError(
            f"none of {len(queries)} images has another image of its class to find; pass data with two "
            "images of a class, or a gallery with the same classes"
        )
    classes = query_classes[rows]
    chance = average_precision.chance(ranks.num_correct.numpy(), ranks.num_candidates)
    figures = []
    samples: dict[str, list[Any]] = {"label": [names[number] for number in classes]}
    hits = {k: ranks.hits(k).numpy() for k in RECALL_AT}
    for k, shares in hits.items():
        interval = statistics.mean_interval(shares)
        baseline = ranks.chance_recall(k), "random order"
        figures.append(statistics.metric(f"R@{k}", float(shares.mean()), *baseline, len(rows), interval=interval))
        samples[f"R@{k}"] = [round(value, 6) for value in shares.tolist()]
    samples["average precision"] = [round(value, 6) for value in values.tolist()]
    for name, mean, baseline_mean, interval in (
        ("mAP", float(values.mean()), float(chance.mean()), statistics.mean_interval(values)),
        (
            "mAP, mean over classes",
            _mean_of_classes(values, classes),
            _mean_of_classes(chance, classes),
            statistics.class_mean_interval(values, classes),
        ),
    ):
        figures.append(statistics.metric(name, mean, baseline_mean, "random order", len(rows), interval=interval))
    counts, correct = np.bincount(classes), np.bincount(classes, ranks.num_correct.numpy())
    means = [(np.bincount(classes, column) / np.maximum(counts, 1)).tolist() for column in (hits[1], values, chance)]
    return {
        "num_samples": len(rows),
        "num_candidates": ranks.num_candidates,
        "num_without_match": len(queries) - len(rows),
        "figures": figures,
        "per_class": [
            {
                "class": names[number],
                "num_samples": int(counts[number]),
                "num_correct": int(correct[number] / counts[number]),
                "r_at_1": means[0][number],
                "average_precision": means[1][number],
                "chance": means[2][number],
            }
            for number in np.flatnonzero(counts)
        ],
        "samples": samples,
        "rows": rows.tolist(),
    }


def _mean_of_classes(values: np.ndarray, classes: np.ndarray) -> float:
    counts = np.bincount(classes)
    sums = np.bincount(classes, values)
    return float((sums[counts > 0] / counts[counts > 0]).mean())

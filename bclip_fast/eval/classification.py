"""Evaluate the classifier of a run of `bclip finetune --task classification` on labelled images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bclip_fast.errors import UserError, choices
from bclip_fast.model.image_classifier import ClassHead

from . import zero_shot
from .labels import Inputs, Results, class_targets, labelled_rows, occurring_classes, read_labels


@torch.no_grad()
def measure(head: ClassHead, embeddings: Tensor, labels: Sequence[str], keys: Sequence[str]) -> dict[str, Any]:
    """Compute the metrics of a classifier, as `zero_shot.measure` or `zero_shot.measure_multi_label` return them.

    Args:
        embeddings: (N, D), of the images.
        labels: label of each image. The classes of multi-label samples are joined by `|`.
        keys: name of each image.

    Raises:
        UserError: a label that the classifier doesn't know, or logits that are not finite.
    """
    if unknown := sorted(occurring_classes(labels, head.multi_label) - set(head.names)):
        raise UserError(f"the classifier has no class {unknown[0]!r}{choices(unknown[0], head.names)}")
    targets = class_targets(labels, head.names, head.multi_label)
    logits = head(embeddings.to(head.weight.device)).double().cpu()
    if not bool(logits.isfinite().all()):
        raise UserError("the classifier's logits hold NaN or infinity: its weights are damaged; use another checkpoint")
    probabilities = head.probabilities(logits)
    if head.multi_label:
        result = zero_shot.measure_multi_label(targets, probabilities, head.names, threshold=0.5)
    else:
        result = zero_shot.measure(targets, probabilities.argmax(1), head.names, probabilities)
    result["samples"] = {"key": list(keys), **result["samples"]}
    return result | {"label": head.label, "multi_label": head.multi_label}


def run(inputs: Inputs) -> Results:
    """Classify images with the classifier of the run. Raises UserError for a model without one."""
    head = getattr(inputs.embedder.model, "classifier", None)
    if not isinstance(head, ClassHead):
        raise UserError("this task needs a classifier: bclip finetune MODEL --task classification --data FILE.csv")
    data, kind = inputs.data, inputs.config.label[0] if inputs.config.label else head.label
    labels = read_labels(data, kind, head.multi_label)
    rows = labelled_rows(labels)
    if not rows:
        raise UserError(f"label {kind!r} of {data.path}, split {data.split!r}: no sample has it; choose another label")
    embeddings = inputs.embedder.images(data)
    known = [label for label in labels if label is not None]
    result = measure(head, embeddings[torch.tensor(rows, device=embeddings.device)], known, [data.key(i) for i in rows])
    return {inputs.task.name: result | {"num_without_label": len(labels) - len(rows)}}

"""The evaluation protocols. A task (`tasks/NAME.toml`) names one of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bclip_fast import distributed
from bclip_fast.data.splits import MissingSplit
from bclip_fast.errors import UserError
from bclip_fast.io.hashing import sha256

from . import medpmc, probe, prompts, retrieval, vqa, zero_shot
from .datasets import EvalDataset
from .labels import (
    Inputs,
    Results,
    class_targets,
    label_kinds,
    labelled_rows,
    labels_and_prompts,
    look_alike,
    occurring_classes,
    read_labels,
)
from .linear_heads import LabelledFeatures
from .tasks import Task

log = logging.getLogger(__name__)


def run_retrieval(inputs: Inputs) -> Results:
    """Rank captions for images and images for captions. Raises UserError for data without captions."""
    data, config = inputs.data, inputs.config
    captions = data.captions()
    if captions is None:
        raise UserError(
            f"task {inputs.task.name!r} needs captions, and {data.path} has none; use shards or a CSV with captions"
        )
    image_hashes = None
    if config.duplicates in ("images", "any"):
        image_hashes = [sha256(data.image(i)) for i in range(len(data))]
    texts, images = inputs.embedder.texts(captions), inputs.embedder.images(data)
    result = retrieval.measure(
        images, texts, captions, duplicates=config.duplicates, image_hashes=image_hashes, index=config.index
    )
    result["samples"] = {"key": [data.key(i) for i in range(len(data))], **result["samples"]}
    result["gallery"] = retrieval.gallery(images, texts, captions, num_queries=config.num_gallery_queries)
    return {inputs.task.name: result}


def run_zero_shot(inputs: Inputs) -> Results:
    """Classify images by the similarity of class prompts, once for each label kind."""
    # Check every label and prompt set before the first image is embedded.
    prepared = [(kind, *labels_and_prompts(inputs, inputs.data, kind)) for kind in label_kinds(inputs)]
    results = {}
    for kind, labels, prompt_set in prepared:
        names = list(prompt_set.classes)
        rows = labelled_rows(labels)
        images = inputs.embedder.images(inputs.data)
        images = images[torch.tensor(rows, device=images.device)]
        scores = zero_shot.similarities(images, zero_shot.class_embeddings(inputs.embedder.texts, prompt_set))
        targets = class_targets(labels, names, inputs.task.multi_label)
        if inputs.task.multi_label:
            result = zero_shot.measure_multi_label(targets, scores.cpu(), names)
        else:
            predictions, num_ties = zero_shot.predict(scores)
            if num_ties:
                log.warning(
                    "%s: two classes tie for %s of %s images; the first class is predicted", kind, num_ties, len(rows)
                )
            # The AUROC compares images with one another, so it needs probabilities at the model's logit scale.
            probabilities = (scores.double() * _logit_scale(inputs.embedder.model)).softmax(1)
            result = zero_shot.measure(targets, predictions.cpu(), names, probabilities.cpu())
            result["num_ties"] = num_ties
            if len(prompt_set.templates) > 1:
                result["sensitivity"] = zero_shot.sensitivity(inputs.embedder.texts, prompt_set, images, targets)
        result["samples"] = {"key": [inputs.data.key(i) for i in rows], **result["samples"]}
        result |= {
            "label": kind,
            "num_without_label": len(labels) - len(rows),
            "prompts": prompts.as_json(prompt_set),
        }
        results[inputs.task.name if inputs.task.label else f"{inputs.task.name}/{kind}"] = result
    return results


def run_probe(inputs: Inputs) -> Results:
    """Train linear probes on the train split, select them on the val split, and test them on the task's split.

    The result names the validation data: `val`, or a fifth of train and the reason.
    """
    kinds = label_kinds(inputs)
    train_data = inputs.open_split("train")
    if _is_same(train_data, inputs.data):
        raise UserError(
            f"task {inputs.task.name!r} needs a train split next to {inputs.data.split!r}; {train_data.path} has none"
        )
    val_data, validation = _validation_split(inputs)
    train_data = inputs.readable(train_data)
    val_data = val_data and inputs.readable(val_data)
    name = inputs.task.name
    return {
        name if len(kinds) == 1 else f"{name}/{kind}": _probe(inputs, kind, train_data, val_data)
        | {"label": kind, "validation": validation}
        for kind in kinds
    }


def _is_same(data: EvalDataset, other: EvalDataset) -> bool:
    return (data.split, data.path) == (other.split, other.path)


def _validation_split(inputs: Inputs) -> tuple[EvalDataset | None, str]:
    """Return the validation data of a probe, or None for a part of the training data, and the words for the report.

    Raises:
        UserError: the validation split is there, but faulty.
    """
    try:
        data = inputs.open_split("val")
    except MissingSplit as error:
        log.warning("task %s: validation: a fifth of train, because %s", inputs.task.name, error)
        return None, "a fifth of train, no val found"
    if _is_same(data, inputs.data):
        log.warning("task %s: validation: a fifth of train, because val is the test split", inputs.task.name)
        return None, "a fifth of train, val is the test split"
    return data, "val"


def _probe(inputs: Inputs, kind: str, train_data: EvalDataset, val_data: EvalDataset | None) -> dict[str, Any]:
    config, multi_label = inputs.config, inputs.task.multi_label
    labels, prompt_set = labels_and_prompts(inputs, inputs.data, kind)
    names = list(prompt_set.classes)

    def labelled_features(data: EvalDataset) -> LabelledFeatures:
        split_labels = labels if data is inputs.data else read_labels(data, kind, multi_label)
        if unknown := sorted(occurring_classes(split_labels, multi_label) - set(names)):
            raise UserError(
                f"split {data.split!r} of {data.path} has the class {unknown[0]!r}, which is missing in the test split"
                f"{look_alike(unknown[0], names)}"
            )
        images = inputs.embedder.images(data)
        rows = torch.tensor(labelled_rows(split_labels), device=images.device)
        targets = class_targets(split_labels, names, multi_label).to(images.device)
        return LabelledFeatures(images[rows], targets)

    train, test = labelled_features(train_data), labelled_features(inputs.data)
    if val_data is None:
        # Set a fifth of every class of train aside for validation.
        val_rows = probe.subset(train.labels, len(names), train_fraction=0.2, seed=config.seed)
        is_train = torch.ones(len(train), dtype=torch.bool)
        is_train[val_rows] = False
        device = train.labels.device
        train, val = train[is_train.nonzero()[:, 0].to(device)], train[val_rows.to(device)]
    else:
        val = labelled_features(val_data)
    _check_every_class(train, val, test, names, val_data is None)
    classes = zero_shot.class_embeddings(inputs.embedder.texts, prompt_set)
    result = probe.measure(
        train, val, test, names, probe.text_init(classes, len(names), classes.shape[1]).to(train.features.device),
        train_fractions=config.share, shots=config.shots, num_seeds=config.num_seeds, protocol=config.protocol,
        progress=config.progress and distributed.is_main(),
    )  # fmt: skip
    result["samples"] = {"key": [inputs.data.key(i) for i in labelled_rows(labels)], **result["samples"]}
    return result | {"prompts": prompts.as_json(prompt_set)}


def _check_every_class(
    train: LabelledFeatures, val: LabelledFeatures, test: LabelledFeatures, names: Sequence[str], is_fifth: bool
) -> None:
    """Raise UserError if the test data have a class that a probe cannot learn. Warn if validation lacks one."""
    counts = [
        data.labels.sum(0) if data.labels.ndim == 2 else torch.bincount(data.labels, minlength=len(names))
        for data in (train, val, test)
    ]
    for name, num_train, num_val, num_test in zip(names, *(count.tolist() for count in counts), strict=True):
        if num_test and not num_train:
            reason = ", after a fifth of every class was set aside for validation" if is_fifth and num_val else ""
            raise UserError(f"the train split has no sample of class {name!r}{reason}, but the test split has some")
        if num_test and not num_val:
            log.warning("the validation data of the probe have no sample of class %r", name)


def run_vqa(inputs: Inputs) -> Results:
    """Answer the questions of the data."""
    return {inputs.task.name: vqa.run(inputs.embedder, inputs.data)}


PROTOCOLS: dict[str, Callable[[Inputs], Results]] = {
    "retrieval": run_retrieval,
    "zero_shot": run_zero_shot,
    "probe": run_probe,
    "vqa": run_vqa,
    "medpmc": medpmc.run,
}


def describe(task: Task, data: EvalDataset) -> dict[str, Any]:
    """Describe a task for the results: its texts, the published scores, and its data."""
    return {
        "name": task.name,
        "title": task.title,
        "protocol": task.protocol,
        "about": task.description,
        "metric": task.metric,
        **({"row": task.row, "domain": task.domain} if task.row else {}),
        "published": [score.as_json() for score in task.published],
        "num_samples_published": task.num_samples or None,
        "data": {"path": data.path, "split": data.split, "num_samples": len(data), "fingerprint": data.fingerprint},
    }


def _logit_scale(model: Any) -> float:
    scale = getattr(model, "logit_scale", None)
    return float(scale.detach().exp()) if isinstance(scale, Tensor) and scale.numel() == 1 else 100.0

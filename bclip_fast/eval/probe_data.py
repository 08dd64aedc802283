"""The data of probes and of few-shot classification: labelled features of train, val and test."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bclip_fast.data.splits import MissingSplit
from bclip_fast.errors import UserError

from . import probe, prompts
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

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProbeData:
    """Features and labels of the three splits, and the prompts of the classes."""

    train: LabelledFeatures
    val: LabelledFeatures
    test: LabelledFeatures
    prompts: prompts.PromptSet

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of their numbers."""
        return list(self.prompts.classes)


def for_each_kind(inputs: Inputs, measure: Callable[[Inputs, ProbeData], dict[str, Any]]) -> Results:
    """Measure each label kind on the splits train, val and the task's split. Raises UserError.

    The results name the validation data, the samples and the prompts.
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
    results = {}
    for kind in kinds:
        data, rows = _labelled_splits(inputs, kind, train_data, val_data)
        result = measure(inputs, data)
        result["samples"] = {"key": [inputs.data.key(i) for i in rows], **result["samples"]}
        result |= {"prompts": prompts.as_json(data.prompts), "label": kind, "validation": validation}
        results[name if len(kinds) == 1 else f"{name}/{kind}"] = result
    return results


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


def _labelled_splits(
    inputs: Inputs, kind: str, train_data: EvalDataset, val_data: EvalDataset | None
) -> tuple[ProbeData, list[int]]:
    """Return the features of the splits, and the rows of the test split that have a label."""
    multi_label = inputs.task.multi_label
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
        val_rows = probe.subset(train.labels, len(names), train_fraction=0.2, seed=inputs.config.seed)
        is_train = torch.ones(len(train), dtype=torch.bool)
        is_train[val_rows] = False
        device = train.labels.device
        train, val = train[is_train.nonzero()[:, 0].to(device)], train[val_rows.to(device)]
    else:
        val = labelled_features(val_data)
    _check_every_class(train, val, test, names, val_data is None)
    return ProbeData(train, val, test, prompt_set), labelled_rows(labels)


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

"""The data of `bclip finetune --task classification`: classes, splits without a shared group, and class weights."""

from __future__ import annotations

import csv
import io
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bclip_fast.data import group_splits
from bclip_fast.data.sources import shown
from bclip_fast.data.splits import MissingSplit
from bclip_fast.errors import UserError, choices
from bclip_fast.eval.datasets import EvalDataset, open_dataset
from bclip_fast.eval.datasets.subset import SubsetDataset
from bclip_fast.eval.datasets.table import CsvDataset
from bclip_fast.eval.labels import class_targets, labelled_rows, look_alike, occurring_classes, read_labels

from .finetune_config import FinetuneConfig

log = logging.getLogger(__name__)

_SHOWN_GROUPS = 5


@dataclass(frozen=True)
class Part:
    """The samples of one split that have a label.

    labels: as the data have them. targets: class numbers int64 (N,), or bool (N, C) for multi-label samples.
    """

    data: SubsetDataset
    labels: list[str]
    targets: Tensor


@dataclass(frozen=True)
class ClassData:
    """The splits of the data by name: train, val, and test if the data have one or the run made one.

    label: name of the label. classes: the classes of the training split, sorted.
    """

    label: str
    classes: tuple[str, ...]
    parts: dict[str, Part]
    group: str

    def as_csv(self) -> str:
        """The samples of all splits as a CSV that `bclip eval` reads: path, label, split, and the group."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["path", self.label, "split", *([self.group] if self.group else [])])
        for split, part in self.parts.items():
            groups = part.data.labels(self.group) if self.group else []
            for i, label in enumerate(part.labels):
                base, row = _base(part.data, i)
                path = str(base.file(row)) if isinstance(base, CsvDataset) else base.key(row)
                table.writerow([path, label, split, *([groups[i]] if self.group else [])])
        return text.getvalue()


def read(config: FinetuneConfig) -> ClassData:
    """Read and check the data. Without splits, make them.

    Raises:
        UserError: the data have no such label or group, fewer than two classes, a class without a sample in train or
            val, a class that train lacks, or a group in two splits. The message names the file, the line if there is
            one, and the remedy.
    """
    opened = _open(config)
    kind = _label_kind(opened["train"], config)
    split_data: dict[str, SubsetDataset] = {}
    labels: dict[str, list[str]] = {}
    for split, data in opened.items():
        if config.group:
            _check_groups(data, config.group)
        _check_joined(data, kind, config.multi_label)
        all_labels = read_labels(data, kind, config.multi_label)
        split_data[split] = SubsetDataset(data, labelled_rows(all_labels))
        labels[split] = [label for label in all_labels if label is not None]
    if "val" not in split_data:
        split_data, labels = _with_made_splits(split_data, labels, config)
    elif config.group:
        _check_leaks(split_data, config.group)
    classes = sorted(occurring_classes(labels["train"], config.multi_label))
    subject = f"label {kind!r} of {shown(config.data)}"
    if len(classes) < (1 if config.multi_label else 2):
        found = f"only the class {classes[0]!r}" if classes else "no class"
        raise UserError(f"{subject}: the training split has {found}; a classifier needs samples of two classes")
    parts = {}
    for split, part in split_data.items():
        _check_known(part, labels[split], classes, config.multi_label)
        parts[split] = Part(part, labels[split], class_targets(labels[split], classes, config.multi_label))
        counts = zip(classes, class_counts(parts[split].targets, len(classes)), strict=True)
        log.info("split %s: %d samples: %s", split, len(part), ", ".join(f"{name} {num}" for name, num in counts))
    _check_counts(parts, classes, config, subject)
    return ClassData(kind, tuple(classes), parts, config.group)


def class_counts(targets: Tensor, num_classes: int) -> list[int]:
    """Return the number of samples of each class."""
    occurring = targets.sum(0) if targets.ndim == 2 else torch.bincount(targets, minlength=num_classes)
    counts: list[int] = occurring.tolist()
    return counts


def class_weights(setting: str, targets: Tensor, classes: tuple[str, ...]) -> Tensor:
    """Return the weight of each class in the loss, float32 (C,).

    balanced: N / (C * n_c) for classes of n_c samples, so that each class has the same sum (King and Zeng, 2001; as
    scikit-learn's `class_weight`). For multi-label samples, (N - n_c) / n_c, the weight of the positives of a class.

    Args:
        setting: `none`, `balanced`, or weights by class as `melanoma=4,nevus=1`. Other classes have the weight 1.

    Raises:
        UserError: an unknown class, or a weight that is not a positive number.
    """
    counts = torch.tensor(class_counts(targets, len(classes)), dtype=torch.float64)
    if setting == "none":
        return torch.ones(len(classes))
    if setting == "balanced":
        num = len(targets)
        weights = (num - counts) / counts if targets.ndim == 2 else num / (len(classes) * counts)
        return weights.float()
    weights = torch.ones(len(classes))
    for item in setting.split(","):
        name, _, text = (part.strip() for part in item.rpartition("="))
        if name not in classes:
            raise UserError(
                f"class_weights={setting}: {name!r} is not a class{choices(name, classes)}; write none, balanced, or "
                "weights such as CLASS=2,CLASS=1"
            )
        try:
            weights[classes.index(name)] = weight = float(text)
        except ValueError:
            weight = math.nan
        if not 0 < weight < math.inf:
            raise UserError(f"class_weights={setting}: the weight {text!r} of {name!r} must be a positive number")
    return weights


def _open(config: FinetuneConfig) -> dict[str, EvalDataset]:
    """Return the splits of the data. Only train, if the data have no validation split."""
    if config.split != "train":
        raise UserError(f"split={config.split}: a classifier trains on the split train; rename it in the data")
    train = open_dataset(config.data, "train", filter=config.filter)
    found = {"train": train}
    for split in ("val", "test"):
        try:
            data = open_dataset(config.data, split, filter=config.filter)
        except MissingSplit:
            continue
        # Data without splits are the same for each name.
        if (data.path, data.split) not in {(other.path, other.split) for other in found.values()}:
            found[split] = data
    return found


def _label_kind(data: EvalDataset, config: FinetuneConfig) -> str:
    kinds = [kind for kind in data.label_kinds if kind != config.group]
    if config.label:
        data.labels(config.label)  # raises UserError for an unknown one
        return config.label
    if "label" in kinds:
        return "label"
    if len(kinds) != 1:
        raise UserError(
            f"data={shown(config.data)} has {', '.join(map(repr, kinds)) or 'no labels'}; choose the column of the "
            "classes with --label"
        )
    return kinds[0]


def _base(data: EvalDataset, i: int) -> tuple[EvalDataset, int]:
    while isinstance(data, SubsetDataset):
        i, data = data.rows[i], data.base
    return data, i


def _place(data: EvalDataset, i: int) -> str:
    """Return the file and line of a sample, or its name where the data have no lines."""
    base, row = _base(data, i)
    place = f"line {base.line(row)}" if isinstance(base, CsvDataset) else f"sample {base.key(row)}"
    return f"data {base.path}, {place}"


def _check_groups(data: EvalDataset, group: str) -> None:
    if group not in data.label_kinds:
        raise UserError(f"group={group} is not a column of {data.path}{choices(group, data.label_kinds)}")
    for i, value in enumerate(data.labels(group)):
        if value is None:
            raise UserError(
                f"{_place(data, i)}: column {group!r} is empty; name the group of every image, or leave out --group"
            )


def _check_joined(data: EvalDataset, kind: str, multi_label: bool) -> None:
    if multi_label:
        return
    for i, label in enumerate(data.labels(kind)):
        if label is not None and "|" in label:
            raise UserError(f"{_place(data, i)}: label {label!r} joins several classes; add --multi_label")


def _check_leaks(splits: Mapping[str, EvalDataset], group: str) -> None:
    leaks = group_splits.shared({split: data.labels(group) for split, data in splits.items()})
    if not leaks:
        return
    first, rows = next(iter(leaks.items()))
    places = " and ".join(f"{split} ({_place(splits[split], row)})" for split, row in rows.items())
    names = ", ".join(list(leaks)[:_SHOWN_GROUPS]) + (" ..." if len(leaks) > _SHOWN_GROUPS else "")
    raise UserError(
        f"{group} {first} is in the splits {places}; {len(leaks)} groups are in two splits: {names}; move all "
        "images of a group to one split, or remove the column of splits so that the run makes them"
    )


def _with_made_splits(
    found: dict[str, SubsetDataset], labels: dict[str, list[str]], config: FinetuneConfig
) -> tuple[dict[str, SubsetDataset], dict[str, list[str]]]:
    """Split the training samples: into train and val if there is a test split, else into train, val and test."""
    train = found["train"]
    if config.group and "test" in found:
        _check_leaks(found, config.group)
    classes = sorted(occurring_classes(labels["train"], config.multi_label))
    targets = class_targets(labels["train"], classes, config.multi_label)
    is_of = targets if targets.ndim == 2 else torch.nn.functional.one_hot(targets, max(1, len(classes))).bool()
    # One image in two rows is one group, too.
    groups = [str(name) for name in (train.labels(config.group) if config.group else map(train.key, range(len(train))))]
    shares: dict[str, float] = dict(group_splits.SHARES)
    if "test" in found:
        del shares["test"]
        shares = {split: share / sum(shares.values()) for split, share in shares.items()}
    assigned = group_splits.assign(np.asarray(is_of), groups, config.seed, shares)
    made, made_labels = {}, {}
    for split in shares:
        rows = [i for i, other in enumerate(assigned) if other == split]
        made[split] = SubsetDataset(train, rows)
        made[split].split = split
        made_labels[split] = [labels["train"][i] for i in rows]
    return found | made, labels | made_labels


def _check_known(data: EvalDataset, labels: list[str], classes: list[str], multi_label: bool) -> None:
    known = set(classes)
    for i, label in enumerate(labels):
        if unknown := sorted(occurring_classes([label], multi_label) - known):
            raise UserError(
                f"{_place(data, i)}: the training split has no sample of class {unknown[0]!r}"
                f"{look_alike(unknown[0], classes)}; add some to it, or remove the class from the other splits"
            )


def _check_counts(parts: Mapping[str, Part], classes: list[str], config: FinetuneConfig, subject: str) -> None:
    """Raise UserError if the validation metric is undefined for a class. Warn if the test split lacks one."""
    unit = f"values of {config.group}" if config.group else "images"
    for split in parts:
        targets = parts[split].targets
        for name, num in zip(classes, class_counts(targets, len(classes)), strict=True):
            if num and (num < len(targets) or not config.multi_label):
                continue
            found = "only samples" if num else "no sample"
            text = f"{subject}: split {split} has {found} of class {name!r}"
            if split == "test":
                log.warning("%s, so the report has no score of it", text)
            else:
                raise UserError(
                    f"{text}; each class needs samples of at least three {unit}, so that each split has one"
                )

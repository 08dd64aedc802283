"""Labels of a data set, and the prompts of their classes."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bclip_fast.errors import UserError

from . import learned_prompts, prompts
from .config import EvalConfig
from .datasets import EvalDataset
from .datasets.subset import SubsetDataset
from .datasets.table import CsvDataset
from .embed import Embedder
from .tasks import Task

log = logging.getLogger(__name__)

# Separators of classes in one label. Multi-label data must use the first.
_SEPARATORS = ("|", ";", ",")


Results = dict[str, dict[str, Any]]
"""Name of a result -> JSON-ready result."""


@dataclass
class Inputs:
    """Inputs of a protocol. The embedder computes embeddings when a protocol first asks for them, and only once."""

    embedder: Embedder
    task: Task
    data: EvalDataset
    config: EvalConfig
    open_split: Callable[[str], EvalDataset]
    """Opens another split of the same data."""
    readable: Callable[[EvalDataset], EvalDataset]
    """Returns the part of another split whose images can be decoded."""


def label_kinds(inputs: Inputs) -> tuple[str, ...]:
    """Return the label kinds to classify: the task's, the configured ones, or the default. Raises UserError."""
    if inputs.task.label:
        return (inputs.task.label,)
    kinds = inputs.config.label or default_label_kinds(inputs.data)
    if not kinds:
        available = ", ".join(inputs.data.label_kinds) or "no labels"
        raise UserError(f"task {inputs.task.name!r} needs --label for {inputs.data.path}, which has {available}")
    return kinds


def default_label_kinds(data: EvalDataset) -> tuple[str, ...]:
    """Return the label kinds of zero_shot and probe if the caller names none.

    The default is the only label kind of the data, or the kinds that have a prompt set of the demonstration data.
    With captions, a single text field may be anything (a licence, an article's number), so it is not a default.
    """
    if len(data.label_kinds) == 1 and data.captions() is None:
        return tuple(data.label_kinds)
    return tuple(
        kind
        for kind in prompts.sample_sets()
        if kind in data.label_kinds and len({label for label in data.labels(kind) if label is not None}) > 1
    )


def labels_and_prompts(inputs: Inputs, data: EvalDataset, kind: str) -> tuple[list[str | None], prompts.PromptSet]:
    """Return the labels of one kind, and a prompt set that has all their classes.

    Raises:
        UserError: no sample has the label, the prompt set lacks a class, or the data have only one class.
    """
    labels = read_labels(data, kind, inputs.task.multi_label)
    classes = sorted(occurring_classes(labels, inputs.task.multi_label))
    subject = _subject(data, kind)
    if not classes:
        raise UserError(f"{subject}: no sample has it; choose another label")
    name = inputs.config.prompts
    if name.endswith(learned_prompts.SUFFIXES):
        if inputs.config.templates:
            raise UserError(f"prompts={name} are learned and take no --templates; leave one of them out")
        prompt_set = learned_prompts.load(name, inputs.embedder)
    else:
        prompt_set = prompts.named(name) if name != "auto" else inputs.task.prompts or _default_prompts(kind, classes)
    if inputs.config.templates:
        prompt_set = dataclasses.replace(prompt_set, templates=inputs.config.templates)
    missing = [value for value in classes if value not in prompt_set.classes]
    if missing:
        raise UserError(
            f"{subject}: prompt set {name if name != 'auto' else inputs.task.name!r} has no class "
            f"{', '.join(map(repr, missing))}; it has {', '.join(map(repr, prompt_set.classes))}"
            f"{look_alike(missing[0], prompt_set.classes)}"
        )
    if len(prompt_set.classes) < 2:
        raise UserError(f"{subject}: {classes[0]!r} is the only class; classification needs at least two")
    return labels, prompt_set


def read_labels(data: EvalDataset, kind: str, multi_label: bool) -> list[str | None]:
    """Return the labels of one kind. Log the classes that look alike, and the number of samples without a label.

    Raises:
        UserError: one image has two labels, or a label joins several classes in another way than the task expects.
    """
    labels, subject = data.labels(kind), _subject(data, kind)
    base = data.base if isinstance(data, SubsetDataset) else data
    if isinstance(base, CsvDataset):
        base.check_one_label(kind)
    classes = sorted(occurring_classes(labels, multi_label))
    _check_separators(subject, classes, multi_label)
    groups: dict[str, list[str]] = {}
    for name in classes:
        groups.setdefault(_plain(name), []).append(name)
    for group in groups.values():
        if len(group) > 1:
            text = "%s: the classes %s differ only in case, spaces or the form of numbers, and count as different"
            log.warning(text, subject, ", ".join(map(repr, group)))
    if num_none := labels.count(None):
        log.warning("%s: %d of %d samples have no label and are left out", subject, num_none, len(labels))
    return labels


def _subject(data: EvalDataset, kind: str) -> str:
    return f"label {kind!r} of {data.path}, split {data.split!r}"


def _check_separators(subject: str, classes: Sequence[str], multi_label: bool) -> None:
    """Raise UserError for a label such as `a|b` or `a; b` next to labels `a` and `b`."""
    for separator in _SEPARATORS:
        parts = {name: {part.strip() for part in name.split(separator)} for name in classes}
        counts = Counter(part for names in parts.values() for part in names)
        for name in classes:
            if len(parts[name]) > 1 and all(counts[part] > 1 for part in parts[name]):
                remedy = "separate classes by '|'" if multi_label else "use a task file with multi_label = true"
                raise UserError(f"{subject}: {name!r} joins classes that are also labels of their own; {remedy}")


def look_alike(name: str, classes: Iterable[str]) -> str:
    """Return a remark for an error if a class differs from `name` only in case, spaces or the form of numbers."""
    other = next((other for other in classes if other != name and _plain(other) == _plain(name)), None)
    return "" if other is None else f" ({name!r} and {other!r} differ only in case, spaces or the form of numbers)"


def _plain(name: str) -> str:
    words = " ".join(re.split(r"[\s_-]+", unicodedata.normalize("NFKC", name).casefold())).strip()
    return str(float(words)) if _is_number(words) else words


def _is_number(name: str) -> bool:
    try:
        return math.isfinite(float(name))
    except ValueError:
        return False


def _classes_of(label: str) -> set[str]:
    return {part.strip() for part in label.split("|")} - {""}


def occurring_classes(labels: Sequence[str | None], multi_label: bool) -> set[str]:
    """Return the classes that occur. A multi-label sample joins its classes with `|`."""
    present = {label for label in labels if label is not None}
    return {value for label in present for value in (_classes_of(label) if multi_label else {label})} - {""}


def class_targets(labels: Sequence[str | None], names: Sequence[str], multi_label: bool) -> Tensor:
    """Return the targets of the labelled samples: class numbers int64 (N,), or bool (N, C) for multi-label samples."""
    present = [label for label in labels if label is not None]
    if multi_label:
        label_sets = map(_classes_of, present)
        return torch.tensor([[name in label_set for name in names] for label_set in label_sets])
    numbers = {name: number for number, name in enumerate(names)}
    return torch.tensor([numbers[label] for label in present])


def labelled_rows(labels: Sequence[str | None]) -> list[int]:
    """Return the indices of the samples that have a label."""
    return [i for i, label in enumerate(labels) if label is not None]


def _default_prompts(kind: str, classes: Sequence[str]) -> prompts.PromptSet:
    """Return the demonstration data's prompts if they have every class, else the class names as prompts."""
    prompt_set = prompts.sample_sets().get(kind)
    if prompt_set is None or not all(name in prompt_set.classes for name in classes):
        if all(_is_number(name) for name in classes):
            text = "label %r: the prompts are the numbers %s, which say nothing to a model; pass --prompts with words"
            log.warning(text, kind, ", ".join(classes[:10]))
        return prompts.from_values(classes)
    return dataclasses.replace(prompt_set, classes={name: prompt_set.classes[name] for name in classes})

"""Labels of a data set, and the prompts of their classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bclip_fast.errors import UserError

from . import prompts
from .config import EvalConfig
from .datasets import EvalDataset
from .embed import Embedder
from .tasks import Task


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
    labels = data.labels(kind)
    classes = sorted(occurring_classes(labels, inputs.task.multi_label))
    subject = f"label {kind!r} of {data.path}, split {data.split!r}"
    if not classes:
        raise UserError(f"{subject}: no sample has it; choose another label")
    name = inputs.config.prompts
    prompt_set = prompts.named(name) if name != "auto" else inputs.task.prompts or _default_prompts(kind, classes)
    missing = [value for value in classes if value not in prompt_set.classes]
    if missing:
        raise UserError(
            f"{subject}: prompt set {name if name != 'auto' else inputs.task.name!r} has no class "
            f"{', '.join(map(repr, missing))}; it has {', '.join(map(repr, prompt_set.classes))}"
        )
    if len(prompt_set.classes) < 2:
        raise UserError(f"{subject}: {classes[0]!r} is the only class; classification needs at least two")
    return labels, prompt_set


def occurring_classes(labels: Sequence[str | None], multi_label: bool) -> set[str]:
    """Return the classes that occur. A multi-label sample joins its classes with `|`."""
    present = [label for label in labels if label is not None]
    return {value for label in present for value in (label.split("|") if multi_label else [label])} - {""}


def class_targets(labels: Sequence[str | None], names: Sequence[str], multi_label: bool) -> Tensor:
    """Return the targets of the labelled samples: class numbers int64 (N,), or bool (N, C) for multi-label samples."""
    present = [label for label in labels if label is not None]
    if multi_label:
        label_sets = (set(label.split("|")) for label in present)
        return torch.tensor([[name in label_set for name in names] for label_set in label_sets])
    return torch.tensor([names.index(label) for label in present])


def labelled_rows(labels: Sequence[str | None]) -> list[int]:
    """Return the indices of the samples that have a label."""
    return [i for i, label in enumerate(labels) if label is not None]


def _default_prompts(kind: str, classes: Sequence[str]) -> prompts.PromptSet:
    """Return the demonstration data's prompts if they have every class, else the class names as prompts."""
    prompt_set = prompts.sample_sets().get(kind)
    if prompt_set is None or not all(name in prompt_set.classes for name in classes):
        return prompts.from_values(classes)
    return dataclasses.replace(prompt_set, classes={name: prompt_set.classes[name] for name in classes})

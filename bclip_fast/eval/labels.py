"""Labels of a data set and the prompts that belong to them."""

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
    """What every protocol is given; embeddings are computed once, when one first asks."""

    embedder: Embedder
    task: Task
    data: EvalDataset
    config: EvalConfig
    open_split: Callable[[str], EvalDataset]
    """The same data, another split."""


def _kinds(inputs: Inputs) -> tuple[str, ...]:
    if inputs.task.label:
        return (inputs.task.label,)
    kinds = inputs.config.label or default_kinds(inputs.data)
    if not kinds:
        known = ", ".join(inputs.data.label_kinds) or "no labels"
        raise UserError(f"task {inputs.task.name!r} needs --label for {inputs.data.path}: there are {known}")
    return kinds


def _labelled(inputs: Inputs, data: EvalDataset, kind: str) -> tuple[list[str | None], prompts.PromptSet]:
    labels = data.labels(kind)
    values = sorted(_values(labels, inputs.task.multi_label))
    where = f"label {kind!r} of {data.path}, split {data.split!r}"
    if not values:
        raise UserError(f"{where}: no sample has it")
    name = inputs.config.prompts
    if name != "auto":
        prompt_set = prompts.named(name)
    else:
        prompt_set = inputs.task.prompts or _known_prompts(kind, values)
    missing = [value for value in values if value not in prompt_set.classes]
    if missing:
        raise UserError(
            f"{where}: prompt set {name if name != 'auto' else inputs.task.name!r} has no class "
            f"{', '.join(map(repr, missing))}; it has {', '.join(map(repr, prompt_set.classes))}"
        )
    if len(prompt_set.classes) < 2:
        raise UserError(f"{where}: the only value is {values[0]!r}, so there is nothing to tell apart")
    return labels, prompt_set


def _values(labels: Sequence[str | None], several: bool) -> set[str]:
    """The classes that occur; where a sample may have several, they are joined by `|`."""
    present = [label for label in labels if label is not None]
    return {value for label in present for value in (label.split("|") if several else [label])} - {""}


def _truth(labels: Sequence[str | None], names: Sequence[str], several: bool) -> Tensor:
    """Of the samples that have a label: the class's number (N,) int64, or where there are several (N, C) bool."""
    present = [label for label in labels if label is not None]
    if several:
        return torch.tensor([[name in own for name in names] for own in (set(label.split("|")) for label in present)])
    return torch.tensor([names.index(label) for label in present])


def _known_prompts(kind: str, values: Sequence[str]) -> prompts.PromptSet:
    """The demonstration data's prompts if they have every value, else the values themselves."""
    prompt_set = prompts.sample_sets().get(kind)
    if prompt_set is None or not all(value in prompt_set.classes for value in values):
        return prompts.from_values(values)
    return dataclasses.replace(prompt_set, classes={value: prompt_set.classes[value] for value in values})


def default_kinds(data: EvalDataset) -> tuple[str, ...]:
    """The label kinds that zero_shot and probe take when none is named: the only one, or those whose prompts we know.

    Where there are captions, a lone text field may be anything (a licence, an article's number) and is not taken.
    """
    if len(data.label_kinds) == 1 and data.captions() is None:
        return tuple(data.label_kinds)
    return tuple(
        kind
        for kind in prompts.sample_sets()
        if kind in data.label_kinds and len({label for label in data.labels(kind) if label is not None}) > 1
    )

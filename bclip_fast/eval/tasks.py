"""The tasks: what each needs of model and data, and what it reports. A new task is one function in `TASKS`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from . import prompts, retrieval, zero_shot
from .datasets import EvalDataset
from .embed import Embedder

log = logging.getLogger(__name__)


@dataclass
class Inputs:
    """What every task is given; the image embeddings are computed once, when a task first asks."""

    embedder: Embedder
    data: EvalDataset
    labels: tuple[str, ...] = ()
    prompts: str = "auto"
    duplicates: retrieval.Duplicates = "strict"
    num_gallery_queries: int = 6
    _images: Tensor | None = None

    def images(self) -> Tensor:
        """(N, D) float32, unit norm."""
        if self._images is None:
            self._images = self.embedder.images(self.data)
        return self._images


def run_retrieval(inputs: Inputs) -> dict[str, dict[str, Any]]:
    captions = inputs.data.captions()
    if captions is None:
        raise UserError(
            f"task 'retrieval' needs captions, and {inputs.data.path} has none: use shards or a CSV with captions"
        )
    texts = inputs.embedder.texts(captions)
    result = retrieval.measure(inputs.images(), texts, captions, duplicates=inputs.duplicates)
    result["gallery"] = retrieval.gallery(inputs.images(), texts, captions, num_queries=inputs.num_gallery_queries)
    return {"retrieval": result}


def run_zero_shot(inputs: Inputs) -> dict[str, dict[str, Any]]:
    kinds = inputs.labels or default_kinds(inputs.data)
    if not kinds:
        known = ", ".join(inputs.data.label_kinds) or "no labels"
        raise UserError(f"task 'zero_shot' needs --label for {inputs.data.path}: there are {known}")
    # Every label and prompt is checked before the first image is encoded.
    prepared = [(kind, *_labelled(inputs, kind)) for kind in kinds]
    results = {}
    for kind, labels, prompt_set in prepared:
        names = list(prompt_set.classes)
        number = {name: i for i, name in enumerate(names)}
        rows = [i for i, label in enumerate(labels) if label is not None]
        truth = torch.tensor([number[label] for label in labels if label is not None])
        images = inputs.images()
        classes = zero_shot.class_embeddings(inputs.embedder.texts, prompt_set)
        predictions, num_ties = zero_shot.predict(images[torch.tensor(rows, device=images.device)], classes)
        if num_ties:
            log.warning(
                "%s: %s of %s images are equally near to two classes; the first is taken", kind, num_ties, len(rows)
            )
        result = zero_shot.measure(truth, predictions.cpu(), names)
        result |= {
            "label": kind,
            "num_without_label": len(labels) - len(rows),
            "num_ties": num_ties,
            "prompts": {
                "source": prompt_set.source,
                "templates": list(prompt_set.templates),
                "classes": {name: list(nouns) for name, nouns in prompt_set.classes.items()},
            },
        }
        results[f"zero_shot/{kind}"] = result
    return results


TASKS: dict[str, Callable[[Inputs], dict[str, dict[str, Any]]]] = {
    "retrieval": run_retrieval,
    "zero_shot": run_zero_shot,
}


def _labelled(inputs: Inputs, kind: str) -> tuple[list[str | None], prompts.PromptSet]:
    labels = inputs.data.labels(kind)
    values = sorted({label for label in labels if label is not None})
    where = f"label {kind!r} of {inputs.data.path}, split {inputs.data.split!r}"
    if not values:
        raise UserError(f"{where}: no sample has it")
    prompt_set = _known_prompts(kind, values) if inputs.prompts == "auto" else prompts.named(inputs.prompts)
    missing = [value for value in values if value not in prompt_set.classes]
    if missing:
        raise UserError(
            f"{where}: prompt set {inputs.prompts!r} has no class {', '.join(map(repr, missing))}; "
            f"it has {', '.join(map(repr, prompt_set.classes))}"
        )
    if len(prompt_set.classes) < 2:
        raise UserError(f"{where}: the only value is {values[0]!r}, so there is nothing to tell apart")
    return labels, prompt_set


def _known_prompts(kind: str, values: Sequence[str]) -> prompts.PromptSet:
    from ..data.samples import TEMPLATES

    nouns = _sample_labels().get(kind, {})
    if all(value in nouns for value in values):
        classes = {value: tuple(nouns[value]) for value in values}
        if kind in TEMPLATES:
            return prompts.PromptSet(classes, TEMPLATES[kind], "nouns and templates of the sample data")
        return prompts.PromptSet(classes, source="nouns of the sample data, generic templates")
    return prompts.from_values(values)


def default_kinds(data: EvalDataset) -> tuple[str, ...]:
    """The label kinds that zero_shot takes when none is named: the only one, or those whose prompts we know.

    Where there are captions, a lone text field may be anything (a licence, an article's number) and is not taken.
    """
    if len(data.label_kinds) == 1 and data.captions() is None:
        return tuple(data.label_kinds)
    return tuple(
        kind
        for kind in _sample_labels()
        if kind in data.label_kinds and len({label for label in data.labels(kind) if label is not None}) > 1
    )


def _sample_labels() -> dict[str, dict[str, list[str]]]:
    from ..data.samples import LABELS

    return LABELS

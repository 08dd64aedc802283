"""The protocols: what each needs of model and data, and what it reports; a task, `tasks/NAME.toml`, names one."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bclip_fast.errors import UserError
from bclip_fast.io.hashing import sha256

from . import probe, prompts, retrieval, vqa, zero_shot
from .datasets import EvalDataset
from .labels import Inputs, _kinds, _labelled, _truth, _values
from .tasks import Task

log = logging.getLogger(__name__)


def run_retrieval(inputs: Inputs) -> dict[str, dict[str, Any]]:
    data, config = inputs.data, inputs.config
    captions = data.captions()
    if captions is None:
        raise UserError(
            f"task {inputs.task.name!r} needs captions, and {data.path} has none: use shards or a CSV with captions"
        )
    pictures = None
    if config.duplicates in ("images", "any"):
        pictures = [sha256(data.image(i)) for i in range(len(data))]
    texts, images = inputs.embedder.texts(captions), inputs.embedder.images(data)
    result = retrieval.measure(
        images, texts, captions, duplicates=config.duplicates, pictures=pictures, index=config.index
    )
    result["samples"] = {"key": [data.key(i) for i in range(len(data))], **result["samples"]}
    result["gallery"] = retrieval.gallery(images, texts, captions, num_queries=config.num_gallery_queries)
    return {inputs.task.name: result}


def run_zero_shot(inputs: Inputs) -> dict[str, dict[str, Any]]:
    # Every label and prompt is checked before the first image is encoded.
    prepared = [(kind, *_labelled(inputs, inputs.data, kind)) for kind in _kinds(inputs)]
    results = {}
    for kind, labels, prompt_set in prepared:
        names = list(prompt_set.classes)
        rows = [i for i, label in enumerate(labels) if label is not None]
        images = inputs.embedder.images(inputs.data)
        images = images[torch.tensor(rows, device=images.device)]
        scores = zero_shot.similarities(images, zero_shot.class_embeddings(inputs.embedder.texts, prompt_set))
        if inputs.task.multi_label:
            truth = _truth(labels, names, True)
            result = zero_shot.measure_multi_label(truth, scores.cpu(), names)
        else:
            known = _truth(labels, names, False)
            predictions, num_ties = zero_shot.predict(scores)
            if num_ties:
                log.warning(
                    "%s: %s of %s images are equally near to two classes; the first is taken", kind, num_ties, len(rows)
                )
            # Classes compare within an image, images compare by probability: softmax at the model's own scale.
            likely = (scores.double() * _logit_scale(inputs.embedder.model)).softmax(1)
            result = zero_shot.measure(known, predictions.cpu(), names, likely.cpu())
            result["num_ties"] = num_ties
            if len(prompt_set.templates) > 1:
                result["sensitivity"] = zero_shot.sensitivity(inputs.embedder.texts, prompt_set, images, known)
        result["samples"] = {"key": [inputs.data.key(i) for i in rows], **result["samples"]}
        result |= {
            "label": kind,
            "num_without_label": len(labels) - len(rows),
            "prompts": _words(prompt_set),
        }
        results[inputs.task.name if inputs.task.label else f"{inputs.task.name}/{kind}"] = result
    return results


def run_probe(inputs: Inputs) -> dict[str, dict[str, Any]]:
    config = inputs.config
    kind = _kinds(inputs)[0]
    train_data = inputs.open_split("train")
    try:
        val_data: EvalDataset | None = inputs.open_split("val")
    except UserError:
        val_data = None
    if (train_data.split, train_data.path) == (inputs.data.split, inputs.data.path):
        raise UserError(
            f"task {inputs.task.name!r} needs a train split beside {inputs.data.split!r}; {train_data.path} has none"
        )
    labels, prompt_set = _labelled(inputs, inputs.data, kind)
    names = list(prompt_set.classes)

    def features(data: EvalDataset) -> probe.Labelled:
        images = inputs.embedder.images(data)
        own = data.labels(kind)
        if unknown := sorted(_values(own, inputs.task.multi_label) - set(names)):
            raise UserError(f"split {data.split!r} of {data.path} has the class {unknown[0]!r}; the test split has not")
        rows = [i for i, label in enumerate(own) if label is not None]
        truth = _truth(own, names, inputs.task.multi_label).to(images.device)
        return probe.Labelled(images[torch.tensor(rows, device=images.device)], truth)

    train, test = features(train_data), features(inputs.data)
    if val_data is None:
        # No split to choose by: a fifth of train, drawn class by class, is set aside before anything else.
        held = probe.subset(train.labels, len(names), share=0.2, seed=config.seed)
        rest = torch.ones(len(train), dtype=torch.bool)
        rest[held] = False
        train, val = train[rest.nonzero()[:, 0].to(train.labels.device)], train[held.to(train.labels.device)]
    else:
        val = features(val_data)
    classes = zero_shot.class_embeddings(inputs.embedder.texts, prompt_set)
    result = probe.measure(
        train, val, test, names, probe.text_init(classes, len(names), classes.shape[1]).to(train.features.device),
        shares=config.share, shots=config.shots, num_seeds=config.num_seeds, protocol=config.protocol,
    )  # fmt: skip
    keys = [inputs.data.key(i) for i, label in enumerate(labels) if label is not None]
    result["samples"] = {"key": keys, **result["samples"]}
    result |= {"label": kind, "validation": "a fifth of train" if val_data is None else "val"}
    return {inputs.task.name: result | {"prompts": _words(prompt_set)}}


def run_vqa(inputs: Inputs) -> dict[str, dict[str, Any]]:
    return {inputs.task.name: vqa.run(inputs.embedder, inputs.data)}


PROTOCOLS: dict[str, Callable[[Inputs], dict[str, dict[str, Any]]]] = {
    "retrieval": run_retrieval,
    "zero_shot": run_zero_shot,
    "probe": run_probe,
    "vqa": run_vqa,
}


def describe(task: Task, data: EvalDataset) -> dict[str, Any]:
    """What the report says of a task: its words, the published figures, and the data it ran on."""
    return {
        "name": task.name,
        "title": task.title,
        "protocol": task.protocol,
        "about": task.about,
        "metric": task.metric,
        "published": [dataclasses.asdict(row) for row in task.published],
        "num_samples_published": task.num_samples or None,
        "data": {"path": data.path, "split": data.split, "num_samples": len(data), "fingerprint": data.fingerprint},
    }


def _words(prompt_set: prompts.PromptSet) -> dict[str, Any]:
    return {
        "source": prompt_set.source,
        "templates": list(prompt_set.templates),
        "classes": {name: list(nouns) for name, nouns in prompt_set.classes.items()},
    }


def _logit_scale(model: Any) -> float:
    scale = getattr(model, "logit_scale", None)
    return float(scale.detach().exp()) if isinstance(scale, Tensor) and scale.numel() == 1 else 100.0

"""The evaluation protocols. A task (`tasks/NAME.toml`) names one of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bclip_fast import distributed
from bclip_fast.data.splits import MissingSplit
from bclip_fast.errors import UserError
from bclip_fast.io.hashing import sha256

from . import (
    calibration,
    classification,
    decision_curve,
    few_shot,
    image_retrieval,
    medpmc,
    out_of_distribution,
    probe,
    probe_data,
    prompts,
    retrieval,
    vqa,
    zero_shot,
)
from .datasets import EvalDataset, open_dataset
from .labels import (
    Inputs,
    Results,
    class_targets,
    label_kinds,
    labelled_rows,
    labels_and_prompts,
)
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
            calibration.add(result, targets.numpy(), probabilities.cpu().numpy(), names)
            if len(names) == 2:
                positive = probabilities[:, 1].cpu().numpy()
                result["decision_curve"] = decision_curve.measure(targets.numpy() == 1, positive, names[1])
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
    return probe_data.for_each_kind(inputs, _probe)


def _probe(inputs: Inputs, data: probe_data.ProbeData) -> dict[str, Any]:
    config, names = inputs.config, data.class_names
    classes = zero_shot.class_embeddings(inputs.embedder.texts, data.prompts)
    init = probe.text_init(classes, len(names), classes.shape[1]).to(data.train.features.device)
    return probe.measure(
        data.train, data.val, data.test, names, init,
        train_fractions=config.share, shots=config.shots, num_seeds=config.num_seeds, protocol=config.protocol,
        progress=config.progress and distributed.is_main(),
    )  # fmt: skip


def run_few_shot(inputs: Inputs) -> Results:
    """Classify images by a few samples of each class, on embeddings that are computed once."""
    if inputs.task.multi_label:
        raise UserError(f"task {inputs.task.name!r} has multi_label = true, but few_shot needs one class an image")
    return probe_data.for_each_kind(inputs, _few_shot)


def _few_shot(inputs: Inputs, data: probe_data.ProbeData) -> dict[str, Any]:
    config = inputs.config
    texts = zero_shot.class_embeddings(inputs.embedder.texts, data.prompts).to(data.train.features.device)
    return few_shot.measure(
        data.train, data.val, data.test, data.class_names, texts,
        shots=config.shots or few_shot.default_shots(data.train.labels, len(texts)),
        num_seeds=config.num_seeds, classifiers=config.classifier,
    )  # fmt: skip


def run_ood(inputs: Inputs) -> Results:
    """Compare the scores of the data's images with those of the other data of `ood`, once for each label kind."""
    path = inputs.config.ood
    if not path:
        raise UserError(f"task {inputs.task.name!r} needs --ood, the path of data that are unlike {inputs.data.path}")
    kinds = label_kinds(inputs)
    other = open_dataset(path, inputs.data.split)
    if (other.path, other.split) == (inputs.data.path, inputs.data.split):
        raise UserError(f"ood={path!r} is the data itself; pass other data")
    other = inputs.readable(other)
    try:
        train = inputs.open_split("train")
    except MissingSplit as error:
        log.warning("task %s: no score by training images, because %s", inputs.task.name, error)
        train = None
    if train is not None and (train.path, train.split) == (inputs.data.path, inputs.data.split):
        log.warning("task %s: no score by training images, because train is the data itself", inputs.task.name)
        train = None
    train = train and inputs.readable(train)
    return {
        inputs.task.name if len(kinds) == 1 else f"{inputs.task.name}/{kind}": _ood(inputs, kind, other, train)
        for kind in kinds
    }


def _ood(inputs: Inputs, kind: str, other: EvalDataset, train: EvalDataset | None) -> dict[str, Any]:
    embedder = inputs.embedder
    labels, prompt_set = labels_and_prompts(inputs, inputs.data, kind)
    rows = labelled_rows(labels)
    images = embedder.images(inputs.data)
    result = out_of_distribution.measure(
        images[torch.tensor(rows, device=images.device)],
        embedder.images(other),
        zero_shot.class_embeddings(embedder.texts, prompt_set).to(images.device),
        _logit_scale(embedder.model),
        None if train is None else embedder.images(train),
    )
    keys = [inputs.data.key(i) for i in rows] + [f"other: {other.key(i)}" for i in range(len(other))]
    result["samples"] = {"key": keys, **result["samples"]}
    return result | {
        "label": kind,
        "num_without_label": len(labels) - len(rows),
        "prompts": prompts.as_json(prompt_set),
        "ood_data": {"path": other.path, "split": other.split, "fingerprint": other.fingerprint},
    }


def run_vqa(inputs: Inputs) -> Results:
    """Answer the questions of the data."""
    return {inputs.task.name: vqa.run(inputs.embedder, inputs.data)}


PROTOCOLS: dict[str, Callable[[Inputs], Results]] = {
    "retrieval": run_retrieval,
    "zero_shot": run_zero_shot,
    "probe": run_probe,
    "few_shot": run_few_shot,
    "vqa": run_vqa,
    "ood": run_ood,
    "medpmc": medpmc.run,
    "classification": classification.run,
    "image_retrieval": image_retrieval.run,
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

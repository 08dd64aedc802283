"""The protocol of medpmc-clip-eval: its scores and metrics, next to better-founded metrics.

A score is the softmax of 100 times the cosine similarities, in float32. It compares the classes, the two texts of a
label (with it, without it), or the options of a question. `yardstick_metrics` has the metrics and their source. The
result adds better-founded metrics:

    classes     balanced accuracy, and the AUROC of each class against the others
    options     the AUROC within the questions, and balanced accuracy over the right answers, because the position of an
                option has no meaning

The samples keep every score with 9 significant digits, which give the same float32 back. So `from_samples` computes
metrics and intervals again without the model.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from bclip_fast.errors import UserError
from bclip_fast.io.hashing import sha256_of_parts

from . import prompts, statistics, yardstick_metrics, zero_shot
from .datasets.microbench import OptionQuestion
from .labels import Inputs, Results, class_targets, label_kinds, labelled_rows, labels_and_prompts
from .yardstick_metrics import KeptScores

SCALE = 100.0
"""Factor of the cosine similarities. The model's own scale is not used."""
NAMES = {
    "classes": ("accuracy", "macro F1", "pooled AUC"),
    "labels": ("accuracy", "macro F1", "AUROC, macro"),
    "options": ("accuracy", "macro F1", "pooled AUC"),
}
"""Names of the metrics of each kind, in the order of `yardstick_metrics.METRICS`."""

_DRAWS: dict[str, np.ndarray] = {}
_MAX_DRAWS = 256


def run(inputs: Inputs) -> Results:
    """Classify images, or answer the questions of MicroBench. Raises UserError."""
    if inputs.task.dataset == "microbench":
        return {inputs.task.name: _run_options(inputs)}
    kinds = label_kinds(inputs)
    name = inputs.task.name
    return {name if inputs.task.label else f"{name}/{kind}": _run_classes(inputs, kind) for kind in kinds}


def draws_of(kept: KeptScores, row: str) -> np.ndarray:
    """Return the resamples of a row. Their seed is its name, so all models get the same draws. The last 256 are kept.

    The means over a suite need them again.
    """
    parts = [row, kept.kind, kept.targets.tobytes(), kept.scores.tobytes(), kept.units.tobytes()]
    key = sha256_of_parts(parts)
    if key not in _DRAWS:
        while len(_DRAWS) >= _MAX_DRAWS:
            del _DRAWS[next(iter(_DRAWS))]
        _DRAWS[key] = yardstick_metrics.resample(kept, seed=zlib.crc32(row.encode()))
    return _DRAWS[key]


def _run_classes(inputs: Inputs, kind: str) -> dict[str, Any]:
    data, multi_label = inputs.data, inputs.task.multi_label
    labels, prompt_set = labels_and_prompts(inputs, data, kind)
    if multi_label and not prompt_set.negative_templates:
        raise UserError(f"task {inputs.task.name!r} needs negative_templates in its [prompts], for the other text")
    names, rows = list(prompt_set.classes), labelled_rows(labels)
    images = inputs.embedder.images(data)
    images = images[torch.tensor(rows, device=images.device)]
    similarities = zero_shot.similarities(images, zero_shot.class_embeddings(inputs.embedder.texts, prompt_set))
    targets = class_targets(labels, names, multi_label)
    groups = _groups(getattr(data, "groups", None), rows)
    samples: dict[str, Any] = {"key": [data.key(i) for i in rows]}
    if multi_label:
        negative = dataclasses.replace(prompt_set, templates=prompt_set.negative_templates)
        others = zero_shot.similarities(images, zero_shot.class_embeddings(inputs.embedder.texts, negative))
        scores = (SCALE * torch.stack([others, similarities], 2)).softmax(2)[..., 1].cpu()
        kept = KeptScores("labels", targets.numpy(), scores.numpy(), groups)
        result = zero_shot.measure_multi_label(targets, scores, names)
        result["samples"]["accuracy"] = (kept.predictions == kept.targets).mean(1).round(6).tolist()
    else:
        scores = (SCALE * similarities).softmax(1).cpu()
        kept = KeptScores("classes", targets.numpy(), scores.numpy(), groups)
        predictions = torch.from_numpy(kept.predictions)
        result = zero_shot.measure(targets, predictions, names, (SCALE * similarities.double()).softmax(1).cpu())
    columns = {f"score of {name}": column for name, column in zip(names, scores.numpy().T, strict=True)}
    result["samples"] |= {name: list(map(_digits, column.tolist())) for name, column in columns.items()}
    if kept.groups is not None:
        result["samples"]["group"] = kept.groups.tolist()
    result["samples"] = samples | result["samples"]
    result["figures"] = _figures(kept, inputs.task.row or inputs.task.name, result["figures"])
    result |= {"label": kind, "num_without_label": len(labels) - len(rows), "prompts": prompts.as_json(prompt_set)}
    return result | {"medpmc": {"kind": kept.kind, **yardstick_metrics.measure(kept)}}


def _groups(names: Sequence[str] | None, rows: Sequence[int]) -> np.ndarray | None:
    """Return the numbers of the groups of rows, or None if a row has no group."""
    if names is None or not all(names[row] for row in rows):
        return None
    return np.unique([names[row] for row in rows], return_inverse=True)[1].ravel()


def _figures(kept: KeptScores, row: str, others: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the benchmark's metrics with their intervals, then the other ones."""
    values = yardstick_metrics.measure(kept)
    draws = draws_of(kept, row)
    chance = _chance(kept)
    figures = [
        statistics.metric(name, value, *baseline, len(kept.scores), interval=yardstick_metrics.interval(column))
        for name, value, baseline, column in zip(NAMES[kept.kind], values.values(), chance, draws.T, strict=True)
    ]
    return figures + [figure for figure in others if figure["name"] not in NAMES[kept.kind]]


def _chance(kept: KeptScores) -> list[tuple[float, str]]:
    """Return the baseline of each metric, and its description."""
    if kept.kind == "labels":
        rates = kept.targets.mean(0)
        always = 2 * rates / (1 + rates)
        return [
            (float(np.maximum(rates, 1 - rates).mean()), "the more frequent answer for each label"),
            (float(always.mean()), "always the label"),
            (0.5, "random order"),
        ]
    if kept.kind == "options":
        uniform = float((1 / kept.is_option.sum(1)).mean())
        return [(uniform, "uniform guess"), (uniform, "uniform guess, about"), (0.5, "random order")]
    share = np.unique(kept.targets, return_counts=True)[1].max() / len(kept.targets)
    classes = len(np.unique(kept.targets))
    return [
        (float(share), "always the most frequent class"),
        (float(2 * share / (1 + share) / classes), "always the most frequent class"),
        (0.5, "random order"),
    ]


def _run_options(inputs: Inputs) -> dict[str, Any]:
    data, texts = inputs.data, inputs.embedder.texts
    asked: list[tuple[OptionQuestion, ...]] = data.questions  # type: ignore[attr-defined]
    pairs = [(image, question) for image, questions in enumerate(asked) for question in questions]
    sentences = list(dict.fromkeys(option for _, question in pairs for option in question.options))
    places = {sentence: place for place, sentence in enumerate(sentences)}
    embeddings = F.normalize(texts(sentences).float(), dim=1)
    similarities = zero_shot.similarities(inputs.embedder.images(data), embeddings).cpu()
    scores = np.full((len(pairs), max(len(question.options) for _, question in pairs)), np.nan, np.float32)
    for row, (image, question) in enumerate(pairs):
        own = similarities[image, [places[option] for option in question.options]]
        scores[row, : len(question.options)] = (SCALE * own).softmax(0).numpy()
    images = np.array([image for image, _ in pairs])
    kept = KeptScores("options", np.array([question.answer for _, question in pairs]), scores, images)
    predictions = kept.predictions.tolist()
    answers = [question.options[question.answer] for _, question in pairs]
    is_right = (kept.predictions == kept.targets).astype(float)
    others = [*_within_questions(kept), _balanced(answers, is_right)]
    return {
        "num_samples": len(pairs),
        "figures": _figures(kept, inputs.task.row or inputs.task.name, others),
        "medpmc": {"kind": "options", **yardstick_metrics.measure(kept)},
        "samples": {
            "key": [f"{data.key(image)}/{question.kind}" for image, question in pairs],
            "label": answers,
            "prediction": [question.options[place] for (_, question), place in zip(pairs, predictions, strict=True)],
            "accuracy": is_right.astype(int).tolist(),
            "answer": kept.targets.tolist(),
            "scores": [
                " ".join(map(_digits, row[mask].tolist())) for row, mask in zip(scores, kept.is_option, strict=True)
            ],
            "group": images.tolist(),
        },
    }


def _within_questions(kept: KeptScores) -> list[dict[str, Any]]:
    """Return the AUROC within questions: the share of wrong options that score below the right one."""
    right = kept.scores[np.arange(len(kept.scores)), kept.targets][:, None]
    with np.errstate(invalid="ignore"):
        below = (kept.scores < right).sum(1) + ((kept.scores == right).sum(1) - 1) / 2
    shares = below / (kept.is_option.sum(1) - 1)
    value, interval = float(shares.mean()), statistics.mean_interval(shares)
    name = "AUROC, within questions"
    return [statistics.metric(name, value, 0.5, "random order", len(shares), interval=interval)]


def _balanced(answers: Sequence[str], is_right: np.ndarray) -> dict[str, Any]:
    """Return the mean over the right answers, as texts, of the share of questions with it that are answered rightly."""
    names, numbers = np.unique(answers, return_inverse=True)
    numbers = numbers.ravel()
    support = np.bincount(numbers)
    recalls = np.bincount(numbers, is_right) / support
    hits = np.round(recalls * support).astype(int)
    # The interval needs only how many questions of an answer are right and wrong.
    confusion = np.zeros((len(names), len(names) + 1), int)
    confusion[np.arange(len(names)), np.arange(len(names))] = hits
    confusion[:, -1] = support - hits
    value, interval, chance = float(recalls.mean()), statistics.balanced_interval(confusion), 1 / len(names)
    return statistics.metric("balanced accuracy", value, chance, "uniform guess", len(answers), interval=interval)


def _digits(score: float) -> str:
    return f"{score:.9g}"


def from_samples(result: dict[str, Any]) -> KeptScores:
    """Return the kept scores of a result of this protocol, as `run` returns it or `results.read` reads it.

    Raises:
        UserError: columns that are missing or damaged.
    """
    samples = result["samples"]
    try:
        kind = result["medpmc"]["kind"]
        groups = np.array(samples["group"], dtype=np.int64) if "group" in samples else None
        if kind == "options":
            rows = [np.array(row.split(), dtype=np.float32) for row in samples["scores"]]
            scores = np.full((len(rows), max(map(len, rows))), np.nan, np.float32)
            for place, row in enumerate(rows):
                scores[place, : len(row)] = row
            return KeptScores(kind, np.array(samples["answer"], dtype=np.int64), scores, groups)
        names = result["classes"]
        scores = np.array([samples[f"score of {name}"] for name in names], dtype=np.float32).T
        labels = [str(label) for label in samples["label"]]
        targets = class_targets(labels, names, kind == "labels")
        return KeptScores(kind, targets.numpy(), np.ascontiguousarray(scores), groups)
    except (LookupError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the samples are not those of protocol medpmc ({error!r}); evaluate again") from error

"""Evaluate models on tasks from Python."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bclip_fast import distributed
from bclip_fast.data import filters
from bclip_fast.data.shards.reader import BadSample
from bclip_fast.data.sources import Source, shown
from bclip_fast.errors import UserError
from bclip_fast.hardware import environment_report, pick_device
from bclip_fast.pretrained.any_model import Model, load_model

from . import subgroups, suites, tasks
from .config import EvalConfig
from .datasets import EvalDataset, open_dataset
from .datasets.files import MissingData
from .datasets.vqa import open_dataset as open_questions
from .embed import Embedder, log_skipped
from .embedding_cache import EmbeddingCache, default_folder
from .labels import Inputs, default_label_kinds
from .protocols import PROTOCOLS, describe

log = logging.getLogger(__name__)


def evaluate(model: Model, tasks: Sequence[str] = (), **settings: Any) -> dict[str, Any]:
    """Evaluate a model on tasks.

    Args:
        model: name of a model, as for `load_model`, or (model, preprocess, tokenizer) of any CLIP-like model.
        tasks: task names, as in `EvalConfig.task`.
        settings: other fields of `EvalConfig`, such as `data`.

    Returns:
        JSON-ready dict with `model`, `tasks`, `config`, `environment` and `time`. `tasks` maps the name of a task to
        its result:

            figures   the metrics: name, value, chance, chance_is, unit, higher_is_better, num_samples, interval
            task      the description of the task and the published scores
            samples   one column for each quantity that the task records for every sample

    Raises:
        UserError: unknown data, split, label or prompt set, a damaged image, or an embedding with NaN.
    """
    return Evaluation(EvalConfig(task=tuple(tasks), **settings)).run(model)


class _Readable:
    """Leaves out the images that cannot be decoded, and collects them.

    split: split of the task. The keys of other splits begin with their name.
    by_decoding: find them by decoding alone, for models without an image embedding.
    """

    def __init__(self, embedder: Embedder, split: str, *, by_decoding: bool) -> None:
        self._embedder, self._split, self._by_decoding = embedder, split, by_decoding
        self.skipped: dict[str, str] = {}

    def part_of(self, data: EvalDataset) -> EvalDataset:
        if self._embedder.on_bad_image == "stop":
            return data
        kept, reasons = self._embedder.readable(data, None if self._by_decoding else self._embedder.images(data))
        start = "" if data.split == self._split else f"{data.split}/"
        self.skipped |= {f"{start}{key}": reason for key, reason in reasons.items()}
        log_skipped(reasons, len(data) - len(kept), len(data))
        return kept


class Evaluation:
    """Tasks with their open data sets. Any number of models can be evaluated on them.

    data: data set of each result. finished: results of the finished tasks, if a later one fails. `run` fills both.
    missing: rows of the suite whose data are not there, with the reason.
    """

    def __init__(self, config: EvalConfig) -> None:
        """Open every data set once."""
        self.config = config
        self._filter = config.filter or filters.ALL
        self.data: dict[str, EvalDataset] = {}
        self.finished: dict[str, Any] = {}
        self._open: dict[tuple[str | tuple[Source, ...], str, str, str], EvalDataset] = {}
        self.missing: dict[str, str] = {}
        if config.suite:
            selected = list(suites.load(config.suite).tasks)
        elif config.task:
            selected = [tasks.load(name) for name in dict.fromkeys(config.task)]
        else:
            data = open_dataset(config.data, config.split, filter=self._filter)
            selected = [tasks.load(name) for name in _possible_tasks(data, config)]
        names = [task.name for task in selected]
        if repeated := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"two tasks have the name {repeated!r}, so the results of one would be lost; rename a file")
        self.tasks: list[tuple[tasks.Task, EvalDataset]] = []
        for task in selected:
            try:
                self.tasks.append((task, self._dataset(task, task.split or config.split)))
            except MissingData as error:
                if not config.suite:
                    raise
                self.missing[task.name] = str(error)
                log.warning("suite %s: row %s is missing: %s", config.suite, task.row, error)
        if not self.tasks:
            raise UserError(f"{config.data} holds none of the {len(selected)} rows of suite {config.suite}; see above")

    def _dataset(self, task: tasks.Task, split: str) -> EvalDataset:
        path = task.resolve_data_dir(self.config.data)
        name = task.row or task.name if task.dataset in ("medmnist", "microbench", "lc25000") else ""
        if not isinstance(path, str) and (task.dataset != "auto" or task.protocol == "vqa"):
            raise UserError(f"task {task.name} needs data in one folder or file; got {shown(path)}")
        key = path, split, task.dataset, name
        if key not in self._open:
            if isinstance(path, str) and task.protocol == "vqa":
                if self._filter != filters.ALL:
                    raise UserError(f"filter={self._filter!r} selects samples of shards, not questions; leave it out")
                self._open[key] = open_questions(path, split, task)
            else:
                classes = list(task.prompts.classes) if task.prompts else []
                if task.dataset == "dad" and task.prompts:
                    classes = [nouns[0] for nouns in task.prompts.classes.values()]
                self._open[key] = open_dataset(
                    path, split, task.dataset,
                    download_url=task.download_url, name=name, file=task.file, classes=classes, filter=self._filter,
                )  # fmt: skip
        return self._open[key]

    def run(self, model: Model) -> dict[str, Any]:
        """Evaluate one model. Return the dict that `evaluate` describes."""
        config = self.config
        device = pick_device(config.device)
        network, preprocess, tokenizer = load_model(model, device) if isinstance(model, str) else model
        network = network.to(device)
        folder = None if config.cache == "none" else Path(config.cache) if config.cache != "auto" else default_folder()
        embedder = Embedder(
            network,
            preprocess,
            tokenizer,
            device=device,
            precision=config.precision,
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            progress=config.progress and distributed.is_main(),
            image_conversion=config.image_conversion,
            on_bad_image=config.on_bad_image,
            cache=EmbeddingCache(folder),
            cache_dtype=config.keep,
        )
        description = _describe(network)
        columns = subgroups.columns(config.by)
        for _, data in self.tasks:  # before the first image is embedded
            for column in columns:
                subgroups.labels_of(data, column)
        results: dict[str, Any] = {}
        self.finished = results
        for task, data in self.tasks:
            readable = _Readable(embedder, data.split, by_decoding=task.protocol == "vqa")

            def open_split(split: str, task: tasks.Task = task) -> EvalDataset:
                return self._dataset(task, split)

            data = readable.part_of(data)
            inputs = Inputs(embedder, task, data, config, open_split, readable.part_of)
            for name, result in PROTOCOLS[task.protocol](inputs).items():
                if columns:
                    subgroups.add(result, data, columns)
                results[name] = result | {"task": describe(task, data)}
                if readable.skipped:
                    results[name]["skipped_images"] = readable.skipped
                self.data[name] = data
        return {
            "model": description | {"path": model if isinstance(model, str) else None},
            "tasks": results,
            **({"missing": self.missing} if config.suite else {}),
            "config": dataclasses.asdict(config),
            "environment": environment_report(device),
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }


def _has_captions(data: EvalDataset) -> bool:
    try:
        return data.captions() is not None
    except BadSample:  # the task itself skips the sample or stops
        return True


def _possible_tasks(data: EvalDataset, config: EvalConfig) -> list[str]:
    names = ["retrieval"] if _has_captions(data) else []
    if config.label or default_label_kinds(data) or not names:
        names.append("zero_shot")
    return names


def _describe(model: nn.Module) -> dict[str, Any]:
    parameter = getattr(model, "logit_scale", None)
    scale = None
    if isinstance(parameter, Tensor) and parameter.numel() == 1:
        scale = float(parameter.detach().exp())
        if not math.isfinite(scale):
            raise UserError(f"the model's logit_scale is {scale}, so its weights are damaged; use another checkpoint")
    return {
        "class": type(model).__name__,
        "num_parameters": sum(weight.numel() for weight in model.parameters()),
        "logit_scale": scale,
    }

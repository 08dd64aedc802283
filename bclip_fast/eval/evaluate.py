"""Evaluate models on tasks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bclip_fast import distributed
from bclip_fast.errors import UserError
from bclip_fast.hardware import environment_report, pick_device
from bclip_fast.pretrained.any_model import Model, load_model

from . import tasks
from .config import EvalConfig
from .datasets import EvalDataset, open_dataset
from .datasets.vqa import open_dataset as open_questions
from .embed import Embedder
from .embedding_cache import Cache, default_folder
from .labels import Inputs, default_kinds
from .protocols import PROTOCOLS, describe


def evaluate(model: Model, tasks: Sequence[str] = (), **settings: Any) -> dict[str, Any]:
    """A model on tasks.

    Args:
        model: what `load_model` takes, or (model, preprocess, tokenizer) of any CLIP-like model, ours or open_clip's.
        tasks: names as of `EvalConfig.task`.
        settings: the other fields of `EvalConfig`, `data` first of all.

    Returns:
        JSON-ready: `tasks` maps a task's name to its result, whose `figures` each hold name, value, chance,
        chance_is, unit, higher_is_better, num_samples and interval, whose `task` says what it is and what others
        published, and whose `samples` hold a column each of what every single sample got; beside it model, data,
        config and environment.

    Raises:
        UserError: data, split, label or prompt set that isn't there; a broken image; an embedding with NaN.
    """
    return Evaluation(EvalConfig(task=tuple(tasks), **settings)).run(model)


class Evaluation:
    """The data sets of all tasks, opened at once and once each, then any number of models on them.

    data: the data set of each result, filled by `run`.
    """

    def __init__(self, config: EvalConfig) -> None:
        self.config = config
        self.data: dict[str, EvalDataset] = {}
        self._open: dict[tuple[str, str, str, str], EvalDataset] = {}
        if config.task:
            chosen = [tasks.load(name) for name in dict.fromkeys(config.task)]
        else:
            chosen = [tasks.load(name) for name in _possible_tasks(open_dataset(config.data, config.split), config)]
        self.tasks = [(task, self._dataset(task, task.split or config.split)) for task in chosen]

    def _dataset(self, task: tasks.Task, split: str) -> EvalDataset:
        path, name = task.place(self.config.data), task.name if task.dataset == "medmnist" else ""
        key = path, split, task.dataset, name
        if key not in self._open:
            if task.protocol == "vqa":
                self._open[key] = open_questions(path, split, task)
            else:
                self._open[key] = open_dataset(path, split, task.dataset, where=task.where, name=name)
        return self._open[key]

    def run(self, given: Model) -> dict[str, Any]:
        """What `evaluate` returns."""
        config = self.config
        device = pick_device(config.device)
        model, preprocess, tokenizer = load_model(given, device) if isinstance(given, str) else given
        model = model.to(device)
        folder = None if config.cache == "none" else Path(config.cache) if config.cache != "auto" else default_folder()
        embedder = Embedder(
            model,
            preprocess,
            tokenizer,
            device=device,
            precision=config.precision,
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            progress=config.progress and distributed.is_main(),
            cache=Cache(folder),
            keep=config.keep,
        )
        described = _describe(model)
        results: dict[str, Any] = {}
        for task, data in self.tasks:
            inputs = Inputs(embedder, task, data, config, lambda split, task=task: self._dataset(task, split))  # type: ignore[misc]
            for name, result in PROTOCOLS[task.protocol](inputs).items():
                results[name] = result | {"task": describe(task, data)}
                self.data[name] = data
        return {
            "model": described | {"path": given if isinstance(given, str) else None},
            "tasks": results,
            "config": dataclasses.asdict(config),
            "environment": environment_report(device),
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }


def _possible_tasks(data: EvalDataset, config: EvalConfig) -> list[str]:
    names = ["retrieval"] if data.captions() is not None else []
    if config.label or default_kinds(data) or not names:
        names.append("zero_shot")
    return names


def _describe(model: nn.Module) -> dict[str, Any]:
    parameter = getattr(model, "logit_scale", None)
    scale = None
    if isinstance(parameter, Tensor) and parameter.numel() == 1:
        scale = float(parameter.detach().exp())
        if not math.isfinite(scale):
            raise UserError(f"the model's logit_scale is {scale}: the weights are broken")
    return {
        "class": type(model).__name__,
        "num_parameters": sum(weight.numel() for weight in model.parameters()),
        "logit_scale": scale,
    }

"""`bclip eval` and its Python twin `evaluate`."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn

from .. import distributed
from ..config import read_toml
from ..errors import UserError, first_line
from ..hardware import environment_report, pick_device
from ..html.page import format_figure, format_spread
from ..io.runs import METRICS
from . import report, tasks
from . import results as files
from .config import EvalConfig
from .datasets import EvalDataset, open_dataset
from .embed import Embedder
from .embedding_cache import Cache, default_folder
from .protocols import PROTOCOLS, Inputs, default_kinds, describe

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvalCommand(EvalConfig):
    """Evaluates a model; writes results.json, figures.csv, per-class.csv, samples/TASK.csv and report.html."""

    model: tyro.conf.Positional[str]
    """A run folder, a folder in open_clip's layout, hf-hub:ID, or open_clip:ARCHITECTURE/PRETRAINED."""
    out: str | None = None
    """Folder for the results; default: eval/DATA-SPLIT in the run, else runs/eval/MODEL/DATA-SPLIT."""


Model = str | tuple[nn.Module, Callable[[Any], Tensor], Callable[[list[str]], Tensor]]


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


def load_model(name: str, device: str | torch.device = "cpu") -> tuple[nn.Module, Any, Any]:
    """(model, preprocess, tokenizer) of a run folder, a folder in open_clip's layout, hf-hub:ID, or
    open_clip:ARCHITECTURE/PRETRAINED, which open_clip fetches; PRETRAINED may be a file. VQA runs load their head too.
    """
    from .. import pretrained
    from . import vqa

    if name.startswith("open_clip:"):
        import open_clip

        architecture, _, weights = name.removeprefix("open_clip:").partition("/")
        if architecture not in open_clip.list_models() or not weights:
            raise UserError(f"{name}: use open_clip:ARCHITECTURE/PRETRAINED with an architecture that open_clip lists")
        try:
            model, _, preprocess = open_clip.create_model_and_transforms(
                architecture, pretrained=weights, device=device
            )
        except Exception as error:  # a broken file leads torch's unpickler to any of them
            raise UserError(f"{name}: open_clip cannot load {weights}: {first_line(error)}") from error
        return model.eval(), preprocess, open_clip.get_tokenizer(architecture)
    if vqa.is_run(Path(name)):
        return vqa.load(Path(name), device)
    return pretrained.load(name, device=device)


def run(command: EvalCommand) -> None:
    """Loads the model, evaluates it, writes results.json, figures.csv, samples/ and report.html, prints the figures."""
    command = dataclasses.replace(command, data=command.data or _data_of_run(command.model))
    # The data are opened before the model is loaded: a wrong path should cost no time.
    evaluation = Evaluation(command)
    results = evaluation.run(command.model)
    if not distributed.is_main():
        return
    run_folder = Path(command.model) if (Path(command.model) / METRICS).is_file() else None
    out = Path(command.out) if command.out else _default_out(command, run_folder)
    files.write(out, results)
    report.write(out / "report.html", results, evaluation.data, run_folder=run_folder)
    _print(results)
    log.info("results in %s", out / "results.json")
    log.info("report in %s", out / "report.html")


def _data_of_run(model: str) -> str:
    """The shards that the run folder `model` was trained on."""
    try:
        return str(read_toml(Path(model) / "config.toml")["data"]["shards"])
    except (UserError, KeyError, TypeError) as error:
        raise UserError(f"{model} is not a run folder that says what it was trained on: give --data") from error


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
                from . import vqa

                self._open[key] = vqa.open_dataset(path, split, task)
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


def _default_out(command: EvalCommand, run_folder: Path | None) -> Path:
    name = f"{Path(command.data).resolve().stem}-{command.split}"
    if command.task and not set(command.task) <= set(tasks.PROTOCOLS):
        name = "-".join(Path(task).stem for task in command.task)
    if run_folder is not None:
        return run_folder / "eval" / name
    return Path("runs") / "eval" / re.sub(r"[^A-Za-z0-9._-]+", "-", command.model).strip("-.") / name


def _print(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    table = Table(Column("task", no_wrap=True), "figure", "value", "95 %", "chance", "samples")
    for task, result in results["tasks"].items():
        for figure in result["figures"]:
            value, chance = (format_figure(figure[key], figure["unit"]) for key in ("value", "chance"))
            spread = format_spread(figure)
            table.add_row(escape(task), figure["name"], value, spread, chance, f"{figure['num_samples']:,}")
    Console().print(table)

"""`bclip eval` and its Python twin `evaluate`."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import platform
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn

from .. import distributed
from ..errors import UserError
from . import report
from .datasets import EvalDataset, open_dataset
from .embed import Embedder, Precision
from .retrieval import Duplicates
from .tasks import TASKS, Inputs, default_kinds

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

log = logging.getLogger(__name__)

_VERSIONS = ("bclip_fast", "torch", "numpy", "pillow", "tokenizers", "deepspeed")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What to evaluate on, and how."""

    data: str = ""
    """Shards (folder with dataset.json), a folder with a folder of images per class, or a .csv file; a run's own shards
    unless given."""
    split: str = "val"
    """Split of the data."""
    task: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """retrieval or zero_shot; repeat it for several. None given: every task that the data allow."""
    label: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Label kind for zero_shot: a metadata field of shards, a CSV column, or `class`; repeat it for several."""
    prompts: str = "auto"
    """A prompt set of the paper (pcam, lc25000_lung, ...), a TOML file, or auto: the labels' own words."""
    duplicates: Duplicates = "strict"
    """In retrieval, whether captions of the same text count as `correct`, or only the pair's own does: `strict`."""
    device: str = "auto"
    """auto takes CUDA where it is."""
    precision: Precision = "fp32"
    """Number format of the towers; embeddings are compared in float32."""
    batch_size: int = 64
    num_workers: int = 2
    """Threads that decode and resize images."""
    num_gallery_queries: int = 6
    """Queries a direction shown in the report."""
    progress: bool = True

    def __post_init__(self) -> None:
        for task in self.task:
            if task not in TASKS:
                raise UserError(f"unknown task {task!r}: use {' or '.join(TASKS)}")
        if self.num_gallery_queries < 1:
            raise UserError(f"num_gallery_queries is {self.num_gallery_queries}: it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class EvalCommand(EvalConfig):
    """Evaluates a model and writes results.json and report.html."""

    model: tyro.conf.Positional[str]
    """A run folder, a folder in open_clip's layout, or hf-hub:ID."""
    out: str | None = None
    """Folder for results.json and report.html; default: eval/DATA-SPLIT in the run, else runs/eval/MODEL/DATA-SPLIT."""


def evaluate(
    model: nn.Module,
    preprocess: Callable[[Any], Tensor],
    tokenizer: Callable[[list[str]], Tensor],
    config: EvalConfig,
) -> dict[str, Any]:
    """Every task of `config` on `model`, which may be ours or open_clip's.

    Returns:
        JSON-ready: `tasks` maps a task's name to its result, whose `figures` each hold name, value, chance,
        chance_is, unit, higher_is_better and num_samples; beside it data, model, config and environment.

    Raises:
        UserError: data, split, label or prompt set that isn't there; a broken image; an embedding with NaN.
    """
    return _evaluate(model, preprocess, tokenizer, config, open_dataset(config.data, config.split))


def run(command: EvalCommand) -> None:
    """Loads the model, evaluates it, writes results.json and report.html, prints the figures."""
    from .. import pretrained

    command = dataclasses.replace(command, data=command.data or _data_of_run(command.model))
    # Before the model is loaded: a wrong path should cost no time.
    data = open_dataset(command.data, command.split)
    model, preprocess, tokenizer = pretrained.load(command.model, device=_device(command.device))
    results = _evaluate(model, preprocess, tokenizer, command, data)
    results["model"]["path"] = command.model
    if not distributed.is_main():
        return
    run_folder = Path(command.model) if (Path(command.model) / "metrics.jsonl").is_file() else None
    out = Path(command.out) if command.out else _default_out(command.model, run_folder, data)
    out.mkdir(parents=True, exist_ok=True)
    report.write_text(out / "results.json", json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    report.write(out / "report.html", results, data, run_folder=run_folder)
    _print(results)
    log.info("results in %s", out / "results.json")
    log.info("report in %s", out / "report.html")


def _data_of_run(model: str) -> str:
    """The shards that the run folder `model` was trained on."""
    try:
        return str(tomllib.loads((Path(model) / "config.toml").read_text(encoding="utf-8"))["data"]["shards"])
    except (OSError, KeyError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{model} is not a run folder that says what it was trained on: give --data") from error


def _evaluate(
    model: nn.Module,
    preprocess: Callable[[Any], Tensor],
    tokenizer: Callable[[list[str]], Tensor],
    config: EvalConfig,
    data: EvalDataset,
) -> dict[str, Any]:
    device = _device(config.device)
    model = model.to(device)
    embedder = Embedder(
        model,
        preprocess,
        tokenizer,
        device=device,
        precision=config.precision,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        progress=config.progress and distributed.is_main(),
    )
    inputs = Inputs(embedder, data, config.label, config.prompts, config.duplicates, config.num_gallery_queries)
    names = config.task or _possible_tasks(data, config)
    tasks: dict[str, Any] = {}
    for name in dict.fromkeys(names):
        tasks |= TASKS[name](inputs)
    settings = dataclasses.asdict(config)
    return {
        "model": _describe(model, inputs.images().shape[1]),
        "data": {
            "path": data.path,
            "split": data.split,
            "num_samples": len(data),
            "fingerprint": data.fingerprint,
        },
        "tasks": tasks,
        "config": settings,
        "environment": _environment(device),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _possible_tasks(data: EvalDataset, config: EvalConfig) -> list[str]:
    names = ["retrieval"] if data.captions() is not None else []
    if config.label or default_kinds(data) or not names:
        names.append("zero_shot")
    return names


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error


def _describe(model: nn.Module, embed_dim: int) -> dict[str, Any]:
    parameter = getattr(model, "logit_scale", None)
    scale = None
    if isinstance(parameter, Tensor) and parameter.numel() == 1:
        scale = float(parameter.detach().exp())
        if not math.isfinite(scale):
            raise UserError(f"the model's logit_scale is {scale}: the weights are broken")
    return {
        "class": type(model).__name__,
        "num_parameters": sum(weight.numel() for weight in model.parameters()),
        "embed_dim": embed_dim,
        "logit_scale": scale,
    }


def _environment(device: torch.device) -> dict[str, str]:
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for name in _VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    found["device"] = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    return found


def _default_out(model: str, run_folder: Path | None, data: EvalDataset) -> Path:
    name = f"{Path(data.path).resolve().stem}-{data.split}"
    if run_folder is not None:
        return run_folder / "eval" / name
    return Path("runs") / "eval" / re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-.") / name


def _print(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("task", "figure", "value", "chance", "samples")
    for task, result in results["tasks"].items():
        for figure in result["figures"]:
            value, chance = (report.format_figure(figure[key], figure["unit"]) for key in ("value", "chance"))
            table.add_row(escape(task), figure["name"], value, chance, f"{figure['num_samples']:,}")
    Console().print(table)

"""`bclip eval`: evaluate a model and write its results and report."""

from __future__ import annotations

import dataclasses
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from bclip_fast import distributed
from bclip_fast.config import read_toml
from bclip_fast.errors import UserError
from bclip_fast.html.page import format_score, format_spread
from bclip_fast.io.runs import METRICS

from . import report, results, tasks
from .config import EvalConfig
from .evaluate import Evaluation

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvalCommand(EvalConfig):
    """Evaluate a model, and write results.json, figures.csv, per-class.csv, samples/TASK.csv and report.html."""

    model: tyro.conf.Positional[str]
    """A run folder, a folder in open_clip's layout, hf-hub:ID, or open_clip:ARCHITECTURE/PRETRAINED."""
    out: str | None = None
    """Folder for the results. Default: eval/DATA-SPLIT in the run folder, or runs/eval/MODEL/DATA-SPLIT for other
    models."""


def run(command: EvalCommand) -> None:
    """Evaluate the model, write the result files and the report, and print the scores."""
    command = dataclasses.replace(command, data=command.data or _training_shards(command.model))
    # Open the data before the model is loaded, so that a wrong path fails at once.
    evaluation = Evaluation(command)
    evaluated = evaluation.run(command.model)
    if not distributed.is_main():
        return
    run_folder = Path(command.model) if (Path(command.model) / METRICS).is_file() else None
    out = Path(command.out) if command.out else _default_out(command, run_folder)
    results.write(out, evaluated)
    report.write(out / "report.html", evaluated, evaluation.data, run_folder=run_folder)
    _print(evaluated)
    log.info("results in %s", out / "results.json")
    log.info("report in %s", out / "report.html")


def _training_shards(model: str) -> str:
    """Return the path of the shards that the run in folder `model` was trained on."""
    try:
        return str(read_toml(Path(model) / "config.toml")["data"]["shards"])
    except (UserError, KeyError, TypeError) as error:
        raise UserError(f"{model} is not a run folder with data.shards in its config.toml; pass --data") from error


def _default_out(command: EvalCommand, run_folder: Path | None) -> Path:
    name = f"{Path(command.data).resolve().stem}-{command.split}"
    if command.task and not set(command.task) <= set(tasks.protocols()):
        name = "-".join(Path(task).stem for task in command.task)
    if run_folder is not None:
        return run_folder / "eval" / name
    return Path("runs") / "eval" / re.sub(r"[^A-Za-z0-9._-]+", "-", command.model).strip("-.") / name


def _print(evaluated: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    table = Table(Column("task", no_wrap=True), "metric", "score", "95 %", "chance", "samples")
    for task, result in evaluated["tasks"].items():
        for metric in result["figures"]:
            score, chance = (format_score(metric[key], metric["unit"]) for key in ("value", "chance"))
            spread = format_spread(metric)
            table.add_row(escape(task), metric["name"], score, spread, chance, f"{metric['num_samples']:,}")
    Console().print(table)

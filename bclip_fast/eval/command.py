"""`bclip eval`: evaluate a model and write its results and report."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from bclip_fast import distributed
from bclip_fast.config import read_toml
from bclip_fast.data.sources import Source, as_sources
from bclip_fast.errors import UserError
from bclip_fast.html.page import format_score, format_spread
from bclip_fast.io.file_names import file_name
from bclip_fast.io.hashing import sha256
from bclip_fast.io.runs import METRICS
from bclip_fast.pretrained.named_models import is_name

from . import report, results, suite_results, suites, tasks
from .config import EvalConfig
from .evaluate import Evaluation

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvalCommand(EvalConfig):
    """Evaluate a model, and write results.json, figures.csv, per-class.csv, samples/TASK.csv and report.html."""

    model: tyro.conf.Positional[str]
    """A run folder, a folder in the layout of open_clip or transformers, hf-hub:ID, open_clip:ARCHITECTURE/PRETRAINED,
    or a short name (medpmc, bmc, biomedclip, pmc, openclip, coca, medsiglip; NAME=FOLDER for local files)."""
    out: str | None = None
    """Folder for the results. Default: eval/DATA-SPLIT in the run folder, or runs/eval/MODEL/DATA-SPLIT for other
    models."""


def run(command: EvalCommand, *, search: str = "", steps: Sequence[tuple[str, str]] = ()) -> None:
    """Evaluate the model, write the result files and the report, and print the scores.

    `search` and `steps` are those of `report.write`.
    """
    if command.suite and not command.data:
        raise UserError(f"suite {command.suite!r} needs --data, the folder that holds the data of its rows")
    command = dataclasses.replace(command, data=command.data or _training_shards(command.model))
    # Open the data before the model is loaded, so that a wrong path fails at once.
    evaluation = Evaluation(command)
    try:
        evaluated = evaluation.run(command.model)
    except UserError:
        if evaluation.finished and distributed.is_main():
            _print(evaluation.finished)
        raise
    if not distributed.is_main():
        return
    if command.suite:
        suite_results.add(evaluated, suites.load(command.suite))
    run_folder = Path(command.model) if (Path(command.model) / METRICS).is_file() else None
    out = Path(command.out) if command.out else _default_out(command, run_folder)
    # A file that cannot be written must not lose the scores, and a closed pipe must not lose the files.
    try:
        _print(evaluated["tasks"])
        if command.suite:
            suite_results.print_means(evaluated["suite"])
    except (OSError, UnicodeError) as error:
        log.warning("the scores cannot be printed (%s); see %s", error, out / "figures.csv")
    results.write(out, evaluated)
    report.write(out / "report.html", evaluated, evaluation.data, run_folder=run_folder, search=search, steps=steps)
    log.info("results in %s", out / "results.json")
    log.info("report in %s", out / "report.html")


def _training_shards(model: str) -> str | tuple[Source, ...]:
    """Return the shards that the run in folder `model` was trained on."""
    try:
        return as_sources(read_toml(Path(model) / "config.toml")["data"]["shards"], "data.shards")
    except (UserError, KeyError, TypeError) as error:
        if not Path(model).exists() and not model.startswith(("hf-hub:", "open_clip:")) and not is_name(model):
            raise UserError(f"{model} does not exist; give a run, a folder with a model, or hf-hub:ORG/NAME") from error
        raise UserError(f"{model} is not a run folder with data.shards in its config.toml; pass --data") from error


def _default_out(command: EvalCommand, run_folder: Path | None) -> Path:
    """Return the folder of this model, data and tasks. Its name ends with a hash if others have the plain name."""
    data = command.data
    stem = Path(data).resolve().stem if isinstance(data, str) else "-".join(source.name for source in data)
    name = f"{stem}-{command.split}"
    if command.suite:
        name = f"{stem}-suite-{Path(command.suite).stem}"
    if command.task and not set(command.task) <= set(tasks.protocols()):
        name = "-".join(Path(task).stem for task in command.task)
    folder = run_folder / "eval" if run_folder is not None else Path("runs") / "eval" / file_name(command.model)
    out = folder / file_name(name)
    subject = _subject(command.model, command.data, command.split, command.task, command.suite, command.filter)
    try:
        content = json.loads((out / "results.json").read_text(encoding="utf-8"))
        config = content["config"]
        recorded = as_sources(config["data"], "data")
        chosen = config.get("suite", ""), config.get("filter", "")
        other = _subject(content["model"]["path"], recorded, config["split"], config["task"], *chosen)
    except FileNotFoundError:
        return out
    except (OSError, ValueError, LookupError, TypeError):
        other = None
    return out if other == subject else out.with_name(f"{out.name}-{sha256(repr(subject))[:12]}")


def _subject(
    model: str, data: str | tuple[Source, ...], split: str, tasks: Sequence[str], suite: str, filter: str
) -> tuple[object, ...]:
    """Return what the results of the default folder depend on. Paths are absolute."""
    paths = [model, *([data] if isinstance(data, str) else [source.path for source in data])]
    places = [name if "://" in name else str(Path(name).resolve()) for name in paths]
    return *places, split, *tasks, suite, *([filter] if filter else [])


def _print(finished: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    table = Table(Column("task", no_wrap=True), "metric", "score", "95 %", "chance", "samples")
    for task, result in finished.items():
        for metric in result["figures"]:
            score, chance = (format_score(metric[key], metric["unit"]) for key in ("value", "chance"))
            spread = format_spread(metric)
            table.add_row(escape(task), metric["name"], score, spread, chance, f"{metric['num_samples']:,}")
    Console().print(table)

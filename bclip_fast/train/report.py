"""`bclip train report RUN [RUN ...]`: curves, metrics, settings and events of runs on one page.

The page is one HTML file without scripts or network access. It shows metrics.jsonl, events.jsonl, bad_samples.jsonl and
config.toml of the run folders. You can write it while a run goes on.
"""

from __future__ import annotations

import functools
import logging
import re
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import tyro

from bclip_fast.config import read_toml
from bclip_fast.errors import UserError
from bclip_fast.html import chart
from bclip_fast.html.page import environment
from bclip_fast.io.atomic import write_text
from bclip_fast.io.runs import (
    EVENTS,
    MEMBER_SAMPLES,
    METRICS,
    VALIDATION,
    VALIDATION_EMA,
    chance_loss,
    is_finite,
    read_metrics,
)

from . import bad_samples
from .report_settings import flat, settings_rows

log = logging.getLogger(__name__)

# Chart titles by key of metrics.jsonl.
_CURVES = {
    "loss": "Loss",
    "contrastive_loss": "Contrastive term of the loss",
    "distill_loss": "Distillation term of the loss",
    "caption_loss": "Caption term of the loss",
    "lr": "Learning rate",
    "logit_scale": "Logit scale",
    "grad_norm": "Norm of the gradient",
    "shared_positives": "Pairs with more than one positive",
    "samples_per_second": "Samples a second",
    "tokens_per_second": "Tokens a second",
    "mfu": "MFU",
}
_NOISY = (
    "loss",
    "contrastive_loss",
    "caption_loss",
    "distill_loss",
    "grad_norm",
    "shared_positives",
    "samples_per_second",
    "tokens_per_second",
    "mfu",
)
# Parts of a step, in their order.
_PARTS = ("data_wait", "forward", "loss", "backward", "optimizer")
# End of the name of a validation metric. Before it stands the direction or the task.
_SHARE = re.compile(r" (R@\d+|(balanced )?accuracy|AUROC(, macro)?)$")
_EVENTS = {"start": "started", "resume": "resumed", "skip": "skipped", "stop": "stopped by a signal", "error": "ended"}
_PREFIXES = (VALIDATION, VALIDATION_EMA)
_LAST = 100
_MAX_EVENTS = 60


@dataclass(frozen=True, kw_only=True)
class TrainReportConfig:
    """Write a page about runs of `bclip train`."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run folders. Several runs share the charts, and their differing settings are listed first."""
    out: str = ""
    """File to write. By default report.html in the run folder, or runs/train-report.html for several runs."""


@dataclass
class Run:
    """The content of a run folder. steps and validations are the lines of metrics.jsonl, by kind."""

    name: str
    folder: Path
    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    events: list[dict[str, Any]]
    replaced: list[dict[str, Any]]
    settings: dict[str, Any]

    @classmethod
    def read(cls, folder: Path, name: str) -> Run:
        """Read a run folder.

        Raises:
            UserError: the folder has no metrics.jsonl, or a line is not JSON.
        """
        if not (folder / METRICS).is_file():
            raise UserError(f"{folder} is not a run of bclip train: metrics.jsonl is missing")
        lines = {}
        for file in (METRICS, EVENTS, bad_samples.NAME):
            records = read_metrics(folder / file) if (folder / file).is_file() else []
            lines[file] = [line for line in records if is_finite(line.get("step"))]
        metrics = lines[METRICS]
        steps = [line for line in metrics if "loss" in line]
        if not steps:
            raise UserError(f"{folder}: metrics.jsonl holds no step yet")
        validations = [line for line in metrics if "loss" not in line]
        settings = dict(flat(read_toml(folder / "config.toml")))
        return cls(name, folder, steps, validations, lines[EVENTS], lines[bad_samples.NAME], settings)

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """The steps and the finite values of a metric."""
        lines = self.validations if key.startswith(_PREFIXES) else self.steps
        points = [(line["step"], line[key]) for line in lines if is_finite(line.get(key))]
        return [step for step, _ in points], [value for _, value in points]

    def late(self, key: str) -> float | None:
        """The median of a metric over the last tenth of the run, but at most the last `_LAST` steps."""
        values = self.series(key)[1]
        values = values[-max(1, min(_LAST, len(values) // 10)) :]
        return statistics.median(values) if values else None


def run(config: TrainReportConfig) -> None:
    """Run `bclip train report`.

    Raises:
        UserError: a folder is not a run.
    """
    folders = [Path(name) for name in config.runs]
    if not folders:
        raise UserError("no run folder; write bclip train report RUN")
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    out = Path(config.out or (folders[0] / "report.html" if len(folders) == 1 else "runs/train-report.html"))
    write_text(out, render([Run.read(folder, name) for folder, name in zip(folders, names, strict=True)]))
    log.info("report in %s", out)


def render(runs: list[Run]) -> str:
    """The HTML page."""
    templates = environment()
    templates.filters["seconds"] = _seconds
    differing, same = settings_rows([run.settings for run in runs])
    return templates.get_template("train.html").render(
        runs=runs,
        facts=[_facts(run) for run in runs],
        figures=_figures(runs),
        curves=_curves(runs),
        validation_curves=_validation_curves(runs),
        split=_split(runs),
        parts=_PARTS,
        split_curve=_split_curve(runs[0]) if len(runs) == 1 else None,
        events=_events(runs),
        differing=differing,
        same=same,
    )


def _facts(run: Run) -> dict[str, str]:
    last = run.steps[-1]
    starts = [event for event in run.events if event["event"] in ("start", "resume")]
    ranks = dict.fromkeys(str(event.get("ranks", "?")) for event in starts)
    step_seconds = sum(line.get("step_seconds", 0.0) for line in run.steps)
    facts = {
        "Steps": f"{last['step']:,}",
        "Samples": f"{last['samples']:,}",
        "Epoch": str(last["epoch"]),
        "Time in steps": str(timedelta(seconds=round(step_seconds))),
    }
    return facts | ({"Ranks": ", then ".join(ranks)} if ranks else {})


def _figures(runs: list[Run]) -> list[dict[str, Any]]:
    """Rows of final metrics: a name, and one text per run."""
    rows: list[tuple[str, Callable[[Run], str | None]]] = [
        ("Loss", lambda run: _number(run.late("loss"))),
        ("Logit scale", lambda run: _number(run.late("logit_scale"))),
        ("Samples a second", lambda run: _number(run.late("samples_per_second"))),
        ("Tokens a second", lambda run: _number(run.late("tokens_per_second"))),
        ("MFU", lambda run: _share(run.late("mfu"))),
        ("Steps skipped", lambda run: _count(run.steps[-1].get("skipped"))),
        ("Damaged samples", lambda run: _count(run.steps[-1].get("bad_samples"))),
    ]
    members = dict.fromkeys(key for run in runs for key in run.steps[-1] if key.startswith(MEMBER_SAMPLES))
    rows += [
        (f"Samples of {key.removeprefix(MEMBER_SAMPLES)}", functools.partial(_member_samples, key=key))
        for key in members
    ]
    rows += [(_title(key), functools.partial(_last_value, key=key)) for key in _validation_keys(runs)]
    table = [{"name": name, "values": [value(run) for run in runs]} for name, value in rows]
    return [row for row in table if any(value is not None for value in row["values"])]


def _member_samples(run: Run, key: str) -> str | None:
    """The samples of a dataset of a mixture, and their share of the run's."""
    last = run.steps[-1]
    return f"{last[key]:,} ({_share(last[key] / last['samples'])})" if key in last else None


def _last_value(run: Run, key: str) -> str | None:
    values = run.series(key)[1]
    return _number(values[-1]) if values else None


def _curves(runs: list[Run]) -> list[dict[str, Any]]:
    curves = [_curve(runs, key, title) for key, title in _CURVES.items()]
    return [curve for curve in curves if curve]


def _curve(runs: list[Run], key: str, title: str) -> dict[str, Any] | None:
    series = {run.name if len(runs) > 1 else "": run.series(key) for run in runs}
    series = {name: each for name, each in series.items() if each[0]}
    if not series:
        return None
    chances = {chance_loss(run.folder) for run in runs} if key == "loss" else {None}
    reference = chances.pop() if len(chances) == 1 else None
    drawing = chart.line_chart(series, title=title, smooth=key in _NOISY, reference=reference)
    lines = [line for run in runs for line in run.steps if key in line]
    num_bad = sum(not is_finite(line[key]) for line in lines)
    last = chart.number(next(iter(series.values()))[1][-1]) if len(runs) == 1 else ""
    return {"title": title, "svg": drawing, "last": last, "num_bad": num_bad}


def _validation_keys(runs: list[Run]) -> list[str]:
    keys = dict.fromkeys(key for run in runs for line in run.validations for key in line)
    return [key for key in keys if key.startswith(_PREFIXES)]


def _validation_curves(runs: list[Run]) -> list[dict[str, Any]]:
    """One chart per metric. For a single run, the shares of a task or direction are in one chart."""
    keys = _validation_keys(runs)
    if len(runs) > 1:
        return [curve for key in keys if (curve := _curve(runs, key, _title(key)))]
    groups: dict[str, list[str]] = {}
    for key in keys:
        groups.setdefault(_SHARE.sub("", key), []).append(key)
    curves = []
    for stem, members in groups.items():
        series = {key.removeprefix(stem).strip(): runs[0].series(key) for key in members}
        series = {name: each for name, each in series.items() if each[0]}
        if series:
            last = chart.number(series[""][1][-1]) if list(series) == [""] else ""
            title = _title(stem)
            drawing = chart.line_chart(series, title=title)
            curves.append({"title": title, "svg": drawing, "num_bad": 0, "last": last})
    return curves


def _split(runs: list[Run]) -> list[dict[str, Any]]:
    """The median seconds of each part of a run's last steps, and their shares of the step."""
    rows = []
    for run in runs:
        total = run.late("step_seconds")
        parts = [run.late(f"{part}_seconds") for part in _PARTS]
        if total is None or None in parts:
            continue
        seconds = [part for part in parts if part is not None]
        scale = max(total, sum(seconds))
        rows.append({
            "name": run.name, "seconds": [*seconds, max(0.0, total - sum(seconds)), total],
            "shares": [part / scale for part in seconds], "communication": run.late("communication_seconds"),
        })  # fmt: skip
    return rows


def _split_curve(run: Run) -> Any:
    series = {part.replace("_", " "): run.series(f"{part}_seconds") for part in (*_PARTS, "communication")}
    series = {name: each for name, each in series.items() if each[0]}
    return chart.line_chart(series, title="Seconds of a step", smooth=True) if series else None


def _events(runs: list[Run]) -> list[dict[str, Any]]:
    """One block per run: rows of step, time and event. Frequent events are summarised in the notes."""
    blocks = []
    for run in runs:
        rows = [_event(event) for event in run.events if event["event"] != "checkpoint"]
        rows += [
            {"step": line["step"], "time": "", "what": f"sample {line['key']} replaced: {line['reason']}"}
            for line in run.replaced
        ]
        rows.sort(key=lambda row: row["step"])
        saved = [event["step"] for event in run.events if event["event"] == "checkpoint"]
        notes = [f"{len(saved)} checkpoints were written, the last after step {saved[-1]:,}."] if saved else []
        if len(rows) > _MAX_EVENTS:
            notes.append(f"The first {_MAX_EVENTS} of {len(rows):,} events are shown.")
        blocks.append({"name": run.name, "rows": rows[:_MAX_EVENTS], "notes": " ".join(notes)})
    return blocks


def _event(event: Mapping[str, Any]) -> dict[str, Any]:
    values = {key: "; ".join(value) if isinstance(value, list) else value for key, value in event.items()}
    facts = [f"{key} {value}" for key, value in values.items() if key not in ("step", "event", "time", "reason")]
    what = _EVENTS.get(event["event"], event["event"])
    reason = f": {event['reason']}" if "reason" in event else ""
    return {"step": event["step"], "time": event.get("time", ""), "what": ", ".join([what, *facts]) + reason}


def _title(key: str) -> str:
    suffix = " (average)" if key.startswith(VALIDATION_EMA) else ""
    return key.removeprefix(VALIDATION).removeprefix(VALIDATION_EMA).replace("_", " ") + suffix


def _number(value: float | None) -> str | None:
    return None if value is None else chart.number(value)


def _share(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f} %"


def _count(value: int | None) -> str | None:
    return f"{value:,}" if value else None


def _seconds(value: float | None) -> str:
    return "\u2013" if value is None else f"{value:.3g}"

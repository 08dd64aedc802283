"""The report: one HTML file that needs no network and no script, from the results and the run's metrics.

Captions, labels and keys come from data nobody vouches for: jinja2 escapes them all, pictures are decoded and
encoded anew, and a content security policy forbids the page to load or run anything.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from ..errors import UserError
from ..io.atomic import write_text
from . import chart
from .datasets import EvalDataset, open_image

log = logging.getLogger(__name__)

THUMBNAIL_SIZE = 224
_NUM_QUESTIONS = 8
_CURVES = {"loss": "Training loss", "lr": "Learning rate", "logit_scale": "Logit scale"}
_VALIDATION = "validation/"


def write(
    path: Path | str,
    results: dict[str, Any],
    data: Mapping[str, EvalDataset] | None = None,
    run_folder: Path | None = None,
) -> None:
    """Writes the report of `results`, as `evaluate` returns them, to `path`.

    Args:
        data: the data set of each task; pictures and captions come from them, without them there are none.
        run_folder: a training run; its metrics.jsonl gives the curves, its config.toml the batch size.

    Raises:
        UserError: metrics.jsonl holds a line that is not JSON; a gallery picture that cannot be decoded.
    """
    data = data or {}
    tasks = results["tasks"]
    names = {name: result["prompts"]["classes"] for name, result in tasks.items() if "prompts" in result}
    page = (
        environment()
        .get_template("report.html")
        .render(
            results=results,
            datasets=list(
                {row["fingerprint"]: row for row in (result["task"]["data"] for result in tasks.values())}.values()
            ),
            headline=_headline(results),
            published=_published(results),
            curves=_curves(run_folder) if run_folder else [],
            most_curves=chart.MAX_CURVES,
            roc={name: _roc(result, names.get(name, {})) for name, result in tasks.items()},
            questions=[
                _questions(result, data[name])
                for name, result in tasks.items()
                if "num_answers" in result and name in data
            ],
            gallery=next(
                (_gallery(tasks[name], each) for name, each in data.items() if "gallery" in tasks[name]), None
            ),
        )
    )
    write_text(Path(path), page)


def environment() -> jinja2.Environment:
    """The templates and the filters they use; everything is escaped."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("bclip_fast.eval"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"figure": format_figure, "spread": format_spread, "ratio": format_ratio, "number": chart.number}
    return made


def _roc(result: dict[str, Any], nouns: Mapping[str, Any]) -> Any:
    """The chart of a task's curves, classes called by their first noun; None where there are none."""
    curves = [{**curve, "class": nouns.get(curve["class"], [curve["class"]])[0]} for curve in result.get("roc", [])]
    return chart.roc_chart(curves, title=result["task"]["title"]) if curves else None


def _published(results: dict[str, Any]) -> list[dict[str, Any]]:
    """A block a task: ours first for every figure that someone published, then theirs."""
    blocks = []
    for result in results["tasks"].values():
        task, rows = result["task"], []
        for name in dict.fromkeys(row["figure"] for row in task["published"]):
            own = next((figure for figure in result["figures"] if figure["name"] == name), None)
            value = "not measured" if own is None else f"{100 * own['value']:.2f} %"
            model = results["model"]["path"] or results["model"]["class"]
            if own is not None:
                rows.append({"figure": name, "model": model, "value": value, "measured": True})
            rows += [
                {
                    "figure": name,
                    "model": row["model"],
                    "value": f"{row['value']:.2f} %",
                    "measured": False,
                    "source": row["source"],
                }
                for row in task["published"]
                if row["figure"] == name
            ]
        if rows:
            notes = [task["about"]] if task["about"] else []
            wanted, num = task["num_samples_published"], result["num_samples"]
            if wanted and wanted != num:
                notes.append(f"Published on {wanted:,} samples, measured on {num:,}: the figures do not compare.")
            blocks.append({"title": task["title"], "notes": " ".join(notes), "rows": rows})
    return blocks


def _questions(result: dict[str, Any], data: EvalDataset) -> dict[str, Any]:
    """Some questions with their pictures and answers, at even steps through the data."""
    samples = result["samples"]
    num = len(samples["key"])
    step = max(1, num // _NUM_QUESTIONS)
    rows = [
        {name: samples[name][i] for name in ("key", "question", "kind", "label", "prediction")}
        | {"right": samples["accuracy"][i] == 1, "picture": thumbnail(data.image(i), lambda: data.key(i))}  # noqa: B023
        for i in range(step // 2, num, step)[:_NUM_QUESTIONS]
    ]
    task = result["task"]
    keys = ("num_answers", "answerable")
    return {"title": task["title"], "about": task["about"], "rows": rows, **{key: result[key] for key in keys}}


def format_figure(value: float | None, unit: str) -> str:
    """A share as per cent with one decimal, a rank with one decimal where it has one, None as a dash."""
    if value is None:
        return "\u2013"
    if unit == "share":
        return f"{100 * value:.1f} %"
    return f"{value:,.0f}" if value == round(value) else f"{value:,.1f}"


def format_spread(figure: dict[str, Any]) -> str:
    """The 95 % interval as `27.3 to 30.1`, a deviation as `+-1.2`, a dash where there is neither."""
    scale, digits = (100, 1) if figure["unit"] == "share" else (1, 1)
    if figure.get("deviation") is not None:
        return f"\u00b1{scale * figure['deviation']:.{digits}f}"
    if figure["interval"] is None:
        return "\u2013"
    return " to ".join(f"{scale * end:,.{digits}f}" for end in figure["interval"])


def format_ratio(figure: dict[str, Any]) -> str:
    """How many times better than chance, as `4.20x`; a dash where chance is zero."""
    value, chance = figure["value"], figure["chance"]
    better, worse = (value, chance) if figure["higher_is_better"] else (chance, value)
    ratio = better / worse if worse else math.inf
    return f"{ratio:.2f}\u00d7" if ratio < 10 else f"{ratio:,.0f}\u00d7" if math.isfinite(ratio) else "\u2013"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a metrics.jsonl. A last line cut by a killed run is left out with a warning."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records = []
    for i, line in enumerate(lines):
        try:
            record = json.loads(line)
        except ValueError as error:
            if i == len(lines) - 1:
                log.warning("%s: the last line is cut and is left out", path)
                break
            raise UserError(f"{path}, line {i + 1}: not JSON ({error})") from error
        if isinstance(record, dict):
            records.append(record)
    return records


def _headline(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures shown large: recall at 5 both ways, accuracies, and what a task was published with."""
    tiles = []
    for result in results["tasks"].values():
        for figure in result["figures"]:
            if figure["name"].endswith("R@5") or figure["name"] in ("accuracy", result["task"]["metric"]):
                task, name = result["task"], figure["name"]
                if task["title"] == "zero shot":
                    name = f"{result['label'].replace('_', ' ')} accuracy"
                tiles.append({**figure, "kind": task["title"].replace("zero shot", "zero-shot"), "name": name})
    return tiles


def _curves(run_folder: Path) -> list[dict[str, Any]]:
    """A chart of each of `_CURVES` and of each validation figure that metrics.jsonl holds."""
    path = run_folder / "metrics.jsonl"
    if not path.is_file():
        return []
    records = [record for record in read_metrics(path) if is_finite(record.get("step"))]
    titles = dict(_CURVES)
    for key in sorted({key for record in records for key in record if key.startswith(_VALIDATION)}):
        titles[key] = "Validation: " + key.removeprefix(_VALIDATION).replace("_", " ")
    curves = []
    for key, title in titles.items():
        points = [(record["step"], record[key]) for record in records if is_finite(record.get(key))]
        if not points:
            continue
        num_bad = sum(isinstance(record.get(key), float) and not math.isfinite(record[key]) for record in records)
        steps, values = zip(*points, strict=True)
        reference = chance_loss(run_folder) if key == "loss" else None
        drawing = chart.line_chart({"": (steps, values)}, title=title, smooth=key == "loss", reference=reference)
        curves.append({"title": title, "svg": drawing, "last": values[-1], "num_bad": num_bad})
    return curves


def chance_loss(run_folder: Path) -> tuple[float, str] | None:
    """ln B, the contrastive loss of a model that maps everything to one point, where config.toml tells the batch B."""
    try:
        batch_size = tomllib.loads((run_folder / "config.toml").read_text(encoding="utf-8")).get("batch_size")
    except (OSError, ValueError):
        return None
    if not isinstance(batch_size, int) or batch_size < 2:
        return None
    return math.log(batch_size), f"chance, ln {batch_size:,}"


def is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _gallery(result: dict[str, Any], data: EvalDataset) -> dict[str, list[dict[str, Any]]] | None:
    """The retrieval gallery with captions and pictures put in for the sample numbers."""
    gallery = result["gallery"]
    captions = data.captions()
    if captions is None:
        return None
    pictures: dict[int, str] = {}

    def show(sample: int, picture: bool) -> dict[str, Any]:
        if picture and sample not in pictures:
            pictures[sample] = thumbnail(data.image(sample), lambda: data.key(sample))
        return {
            "key": data.key(sample),
            "caption": captions[sample],
            "picture": pictures.get(sample) if picture else None,
        }

    def fill(rows: list[dict[str, Any]], picture_query: bool) -> list[dict[str, Any]]:
        return [
            {
                **row,
                **show(row["sample"], picture_query),
                "found": any(hit["right"] for hit in row["hits"]),
                "answer": show(row["sample"], not picture_query),
                "hits": [{**hit, **show(hit["sample"], not picture_query)} for hit in row["hits"]],
            }
            for row in rows
        ]

    return {
        "text_to_image": fill(gallery["text_to_image"], False),
        "image_to_text": fill(gallery["image_to_text"], True),
    }


def thumbnail(data: bytes, name: Callable[[], str]) -> str:
    """A `data:` address of the picture as an RGB JPEG of at most `THUMBNAIL_SIZE` pixels a side, no metadata kept."""
    image = open_image(data, name).convert("RGB")
    image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")

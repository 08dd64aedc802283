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
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from ..errors import UserError
from . import chart
from .datasets import EvalDataset, open_image

log = logging.getLogger(__name__)

THUMBNAIL_SIZE = 224
_CURVES = {"loss": "Training loss", "lr": "Learning rate", "logit_scale": "Logit scale"}
_VALIDATION = "validation/"


def write(
    path: Path | str, results: dict[str, Any], data: EvalDataset | None = None, run_folder: Path | None = None
) -> None:
    """Writes the report of `results`, as `evaluate` returns them, to `path`.

    Args:
        data: the data set evaluated on; the gallery's pictures and captions come from it, without it there is none.
        run_folder: a training run; its metrics.jsonl gives the curves, its config.toml the batch size.

    Raises:
        UserError: metrics.jsonl holds a line that is not JSON; a gallery picture that cannot be decoded.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bclip_fast.eval"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = format_figure
    environment.filters["ratio"] = format_ratio
    environment.filters["number"] = chart.number
    page = environment.get_template("report.html").render(
        results=results,
        headline=_headline(results),
        curves=_curves(run_folder) if run_folder else [],
        gallery=_gallery(results, data) if data is not None else None,
    )
    write_text(Path(path), page)


def format_figure(value: float | None, unit: str) -> str:
    """A share as per cent with one decimal, a rank with one decimal where it has one, None as a dash."""
    if value is None:
        return "\u2013"
    if unit == "share":
        return f"{100 * value:.1f} %"
    return f"{value:,.0f}" if value == round(value) else f"{value:,.1f}"


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


def write_text(path: Path, text: str) -> None:
    """Writes the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _headline(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures shown large: recall at 5 both ways, and the accuracy of each label."""
    tiles = []
    for result in results["tasks"].values():
        for figure in result["figures"]:
            if figure["name"].endswith("R@5") or figure["name"] == "accuracy":
                kind, name = "retrieval", figure["name"]
                if "label" in result:
                    kind, name = "zero-shot", f"{result['label'].replace('_', ' ')} accuracy"
                tiles.append({**figure, "kind": kind, "name": name})
    return tiles


def _curves(run_folder: Path) -> list[dict[str, Any]]:
    """A chart of each of `_CURVES` and of each validation figure that metrics.jsonl holds."""
    path = run_folder / "metrics.jsonl"
    if not path.is_file():
        return []
    records = [record for record in read_metrics(path) if _is_finite(record.get("step"))]
    titles = dict(_CURVES)
    for key in sorted({key for record in records for key in record if key.startswith(_VALIDATION)}):
        titles[key] = "Validation: " + key.removeprefix(_VALIDATION).replace("_", " ")
    curves = []
    for key, title in titles.items():
        points = [(record["step"], record[key]) for record in records if _is_finite(record.get(key))]
        if not points:
            continue
        num_bad = sum(isinstance(record.get(key), float) and not math.isfinite(record[key]) for record in records)
        steps, values = zip(*points, strict=True)
        reference = _chance_loss(run_folder) if key == "loss" else None
        drawing = chart.line_chart(steps, values, title=title, smooth=key == "loss", reference=reference)
        curves.append({"title": title, "svg": drawing, "last": values[-1], "num_bad": num_bad})
    return curves


def _chance_loss(run_folder: Path) -> tuple[float, str] | None:
    """ln B, the contrastive loss of a model that maps everything to one point, where config.toml tells the batch B."""
    try:
        batch_size = tomllib.loads((run_folder / "config.toml").read_text(encoding="utf-8")).get("batch_size")
    except (OSError, ValueError):
        return None
    if not isinstance(batch_size, int) or batch_size < 2:
        return None
    return math.log(batch_size), f"chance, ln {batch_size:,}"


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _gallery(results: dict[str, Any], data: EvalDataset) -> dict[str, list[dict[str, Any]]] | None:
    """The retrieval gallery with captions and pictures put in for the sample numbers."""
    gallery = results["tasks"].get("retrieval", {}).get("gallery")
    captions = data.captions()
    if gallery is None or captions is None:
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

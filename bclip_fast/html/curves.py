"""Charts of the metrics of a training run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from bclip_fast.io.runs import METRICS, VALIDATION, chance_loss, is_finite, read_metrics

from . import chart

# Key of metrics.jsonl -> title of its chart.
_TITLES = {"loss": "Training loss", "lr": "Learning rate", "logit_scale": "Logit scale"}


def training_curves(run_folder: Path) -> list[dict[str, Any]]:
    """Draw a chart for each key of `_TITLES` and for each validation metric in metrics.jsonl.

    Raises:
        UserError: a line of metrics.jsonl is not JSON.
    """
    path = run_folder / METRICS
    if not path.is_file():
        return []
    records = [record for record in read_metrics(path) if is_finite(record.get("step"))]
    titles = dict(_TITLES)
    for key in sorted({key for record in records for key in record if key.startswith(VALIDATION)}):
        titles[key] = "Validation: " + key.removeprefix(VALIDATION).replace("_", " ")
    curves = []
    for key, title in titles.items():
        points = [(record["step"], record[key]) for record in records if is_finite(record.get(key))]
        if not points:
            continue
        num_bad = sum(isinstance(record.get(key), float) and not math.isfinite(record[key]) for record in records)
        steps, values = zip(*points, strict=True)
        reference = chance_loss(run_folder) if key == "loss" else None
        drawing = chart.line_chart({"": (steps, values)}, title=title, smooth=key == "loss", reference=reference)
        curves.append({"title": title, "svg": drawing, "last": chart.number(values[-1]), "num_bad": num_bad})
    return curves

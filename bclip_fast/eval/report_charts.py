"""Charts of the results of single protocols, for the report."""

from __future__ import annotations

from typing import Any

import numpy as np

from bclip_fast.html import chart


def of_result(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the charts of a result: title, svg, last, num_bad."""
    return _shots(result) if "few_shot" in result else []


def _shots(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Draw the mean accuracy of each classifier over the number of shots."""
    values: dict[str, dict[int, list[float]]] = {}
    for row in result["few_shot"]:
        values.setdefault(row["classifier"].replace("_", " "), {}).setdefault(row["shots"], []).append(row["accuracy"])
    series = {
        name: (list(map(float, by_shots)), [float(np.mean(scores)) for scores in by_shots.values()])
        for name, by_shots in values.items()
    }
    return [_entry("accuracy", series, x_label="shots")]


def _entry(title: str, series: dict[str, tuple[list[float], list[float]]], **settings: Any) -> dict[str, Any]:
    return {"title": title, "svg": chart.line_chart(series, title=title, **settings), "last": "", "num_bad": 0}

"""Charts of the results of single protocols, for the report."""

from __future__ import annotations

from typing import Any

import numpy as np

from bclip_fast.html import chart

_MAX_TABLES = 7


def of_result(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the charts of a result: title, svg, last, num_bad."""
    charts = _shots(result) if "few_shot" in result else []
    if "calibration" in result and len(result["calibration"]) <= _MAX_TABLES:
        charts.append(_calibration(result["calibration"]))
    if "decision_curve" in result:
        charts.append(_decision(result["decision_curve"]))
    return charts


def _calibration(tables: list[dict[str, Any]]) -> dict[str, Any]:
    """Draw the share of events over the mean probability of each bin. The diagonal is perfect calibration."""
    series: dict[str, tuple[list[float], list[float]]] = {"perfect": ([0.0, 1.0], [0.0, 1.0])}
    for table in tables:
        bins = table["bins"]
        series[table["of"]] = [row["mean_probability"] for row in bins], [row["share"] for row in bins]
    return _entry("reliability: share of events", series, x_label="probability")


def _decision(curve: dict[str, Any]) -> dict[str, Any]:
    """Draw the net benefit of the model, of treating all, and of treating none, where it is not far below 0."""
    lowest = -max(0.05, curve["prevalence"] / 4)
    series = {}
    for key, name in (("net_benefit", "model"), ("treat_all", "treat all"), ("treat_none", "treat none")):
        points = [(point["threshold"], point[key]) for point in curve["points"] if point[key] >= lowest]
        if points:
            series[name] = [x for x, _ in points], [y for _, y in points]
    return _entry(f"decision curve of {curve['class']}: net benefit", series, x_label="threshold")


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

"""Results in the folder of a training run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bclip_fast.io.runs import METRICS, read_metrics


def loss_curve(run: Path) -> list[float]:
    """Return the loss of each step."""
    return [record["loss"] for record in read_metrics(run / METRICS)]


def bad_sample_lines(run: Path) -> list[dict[str, Any]]:
    """Return the records of bad_samples.jsonl, or an empty list if the file is missing."""
    path = run / "bad_samples.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

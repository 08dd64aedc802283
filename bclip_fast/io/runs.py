"""Read what a training run leaves in its folder: metrics, events, configuration."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from bclip_fast.config import read_toml
from bclip_fast.errors import UserError

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
# Prefixes of the names of validation metrics in METRICS: of the model, and of its EMA.
VALIDATION = "validation/"
VALIDATION_EMA = "validation_ema/"
# Prefix of the names of the datasets of a mixture in METRICS.
MEMBER_SAMPLES = "samples/"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a metrics.jsonl, or of another file of a run. Skip an incomplete last line with a warning.

    Raises:
        UserError: another line is not JSON.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records = []
    for i, line in enumerate(lines):
        try:
            record = json.loads(line)
        except ValueError as error:
            if i == len(lines) - 1:
                log.warning("%s: skipping the incomplete last line", path)
                break
            raise UserError(f"{path}, line {i + 1}: not JSON ({error})") from error
        if isinstance(record, dict):
            records.append(record)
    return records


def chance_loss(run_folder: Path) -> tuple[float, str] | None:
    """ln B, the contrastive loss of a model that maps everything to one point, and its label. B is the batch size.

    None if config.toml doesn't name a batch size of at least 2, or names another loss.
    """
    try:
        config = read_toml(run_folder / "config.toml")
    except UserError:
        return None
    batch_size, loss = config.get("batch_size"), config.get("loss", {})
    if isinstance(loss, dict) and loss.get("kind", "clip") != "clip":
        return None
    if not isinstance(batch_size, int) or batch_size < 2:
        return None
    return math.log(batch_size), f"chance, ln {batch_size:,}"


def is_finite(value: Any) -> bool:
    """Return whether a value is a finite number. Booleans are not numbers."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

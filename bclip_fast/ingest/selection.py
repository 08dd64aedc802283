"""The filter that a dataset records as its selection: `--filter` of `bclip ingest build` and `bclip ingest label`."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

from bclip_fast.data import filters
from bclip_fast.data.shards.filtered import read_manifest
from bclip_fast.data.shards.format import description_text, read_description
from bclip_fast.data.storage import open_storage
from bclip_fast.errors import UserError
from bclip_fast.io.atomic import write_text

log = logging.getLogger(__name__)


def record_filter(root: Path, text: str) -> None:
    """Record a filter in dataset.json as the selection of a dataset, and log how many samples it selects.

    Raises:
        UserError: a column is missing, or no sample is selected.
    """
    storage = open_storage(root)
    description = read_description(storage)
    if text == filters.ALL:
        description.pop("filter", None)
    else:
        log_selection(root, text)
        description["filter"] = text
    write_text(root / "dataset.json", description_text(description), sync=True)


def log_selection(root: Path, text: str) -> None:
    """Log how many samples a filter selects, by split and by kind. Raises UserError, as `record_filter` does."""
    chosen = filters.parse(text)
    table = read_manifest(open_storage(root), chosen, further=("kind",))
    mask = chosen.mask(table)
    if not mask.any():
        parts = "; ".join(f"{part}: {count}" for part, count in chosen.counts(table))
        raise UserError(f"filter {text!r} selects none of the {len(table)} pairs of {root} ({parts})")
    selected = table.filter(mask)
    splits = Counter(selected["split"].to_pylist())
    shown = ", ".join(f"{count} {name}" for name, count in sorted(splits.items()))
    log.info("filter %s selects %s of %s pairs (%s)", text, len(selected), len(table), shown)
    if "kind" in selected.column_names:
        kinds = Counter(str(kind) for kind in selected["kind"].to_pylist())
        log.info("their kinds: %s", ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()))

"""The filter that a dataset records as its selection: `--filter` of `bclip ingest build` and `bclip ingest label`."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

from bclip_fast.data import filters
from bclip_fast.data.shards.filtered import nothing_selected, read_manifest
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
    splits: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    total = 0
    for table in read_manifest(open_storage(root), chosen, further=("kind",)):
        selected = table.filter(chosen.mask(table))
        total += len(table)
        splits.update(selected["split"].to_pylist())
        counts.update(dict(chosen.counts(table)))
        if "kind" in selected.column_names:
            kinds.update(str(kind) for kind in selected["kind"].to_pylist())
    if not splits:
        raise UserError(nothing_selected(chosen, f"{total} pairs of {root}", counts))
    shown = ", ".join(f"{count} {name}" for name, count in sorted(splits.items()))
    log.info("filter %s selects %s of %s pairs (%s)", text, splits.total(), total, shown)
    if kinds:
        log.info("their kinds: %s", ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()))

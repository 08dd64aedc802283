"""`bclip ingest report DIR`: describe a dataset in one HTML file, which needs neither network nor scripts.

Captions, labels and licences are untrusted text. html/page.py describes how a page stays harmless.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from bclip_fast.data.shards.format import read_description
from bclip_fast.data.storage import LocalStorage, ReadConfig
from bclip_fast.errors import UserError, first_line
from bclip_fast.html.page import environment, thumbnail
from bclip_fast.io.atomic import write_text

log = logging.getLogger(__name__)

_TOKEN_BIN = 32
_SIDE_BIN = 128
_LONGEST_CAPTION = 400
# Columns of `kinds` and `caption_facts` and their titles, and the words for an empty value.
_FACTS = {
    "kind": "Kinds of figures",
    "caption_language": "Languages of the captions",
    "caption_quality": "Marks of the captions",
}
_WITHOUT_VALUE = {"kind": "no kind", "caption_language": "not known", "caption_quality": "no mark"}


@dataclass(frozen=True)
class ReportConfig:
    """Write an HTML page about a dataset: counts, sizes, captions, rejects and a gallery."""

    dataset: tyro.conf.Positional[Path]
    """Folder that `bclip ingest build` wrote."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=("-o",))] = None
    """File to write. Default: DATASET/report.html."""
    gallery: int = 24
    """Number of random pairs to show."""
    seed: int = 0
    """Seed of the gallery's random choice."""


def run(config: ReportConfig) -> None:
    """Write the page. Raises UserError if the dataset is missing or damaged, or if ingest didn't build it."""
    import pyarrow as pa

    description = read_description(LocalStorage(config.dataset, ReadConfig()))
    if "ingest" not in description:
        raise UserError(f"{config.dataset}: was not built by `bclip ingest build`; only such datasets have a report")
    out = config.out or config.dataset / "report.html"
    try:
        text = page(config, description)
    except (pa.ArrowException, OSError, KeyError) as error:
        path = config.dataset / "manifest.parquet"
        raise UserError(f"{path} or a shard that it names can't be read: {first_line(error)}; copy it again") from None
    write_text(out, text)
    log.info("wrote %s", out)


def page(config: ReportConfig, description: dict[str, Any]) -> str:
    """Return the HTML. The manifest is read by row groups, so memory does not grow with its size."""
    import pyarrow.parquet as pq

    manifest = pq.ParquetFile(config.dataset / "manifest.parquet")
    names = set(manifest.schema_arrow.names)
    counted_columns = (
        "licence", "year", "source_format", "source_mode", "duplicate", "journal", *_FACTS,
    )  # fmt: skip
    values: dict[str, Counter[Any]] = {name: Counter() for name in counted_columns}
    tokens: Counter[int] = Counter()
    words: Counter[int] = Counter()
    sides: Counter[int] = Counter()
    totals: dict[str, int] = dict.fromkeys(("image bytes", "original bytes", "retracted", "panels", "with mentions"), 0)
    chosen = set(random.Random(config.seed).sample(range(manifest.metadata.num_rows), _gallery_size(config, manifest)))
    gallery, row_number = [], 0
    for group in range(manifest.num_row_groups):
        for row in manifest.read_row_group(group).to_pylist():
            for name, counter in values.items():
                counter[row.get(name) or _WITHOUT_VALUE.get(name, "not stated")] += 1
            words[len(row["caption"].split()) // _TOKEN_BIN] += 1
            if row.get("num_tokens") is not None:
                tokens[row["num_tokens"]] += 1
            sides[min(row["source_width"], row["source_height"]) // _SIDE_BIN] += 1
            totals["image bytes"] += row["num_image_bytes"]
            totals["original bytes"] += row["source_bytes"] if row.get("panel") is None else 0
            totals["retracted"] += bool(row.get("retracted"))
            totals["panels"] += row.get("panel") is not None
            totals["with mentions"] += row.get("mentions") not in (None, "[]")
            if row_number in chosen:
                gallery.append(row)
            row_number += 1
    values["duplicate"].pop("not stated", None)
    ingest = description["ingest"]
    summary = {"articles": ingest["articles"], "pairs": ingest["pairs"], **ingest["by_split"], **totals}
    captions, notes = _captions(tokens, words, has_tokens="num_tokens" in names)
    distributions = [
        ("Rejects by reason", Counter(ingest["rejects"]).most_common()),
        ("Licences", values["licence"].most_common()),
        ("Types of the originals", values["source_format"].most_common()),
        ("Their modes", values["source_mode"].most_common()),
        ("Years", sorted(values["year"].items(), key=lambda item: str(item[0]))),
        ("Journals", values["journal"].most_common(15)),
        ("Marked duplicates", values["duplicate"].most_common()),
        ("Shorter side of the originals, pixels", _binned(sides, _SIDE_BIN)),
        captions,
        *((title, values[name].most_common(15)) for name, title in _FACTS.items() if name in names),
    ]
    return (
        environment()
        .get_template("ingest.html")
        .render(
            name=config.dataset.resolve().name,
            fingerprint=description["fingerprint"],
            counts=_rows(summary.items()),
            distributions=[{"title": title, "rows": _rows(rows)} for title, rows in distributions],
            notes=notes,
            gallery=[_pair(config.dataset, row) for row in gallery],
            configuration=_rows(ingest["config"].items()),
        )
    )


def _gallery_size(config: ReportConfig, manifest: Any) -> int:
    return min(max(config.gallery, 0), manifest.metadata.num_rows)


def _captions(
    tokens: Counter[int], words: Counter[int], has_tokens: bool
) -> tuple[tuple[str, list[tuple[str, int]]], list[str]]:
    """Return the title and rows of the caption lengths, and notes about them."""
    if not has_tokens:
        notes = ["Tokens were not counted: build with --tokenizer."]
        return ("Caption length, words", _binned(words, _TOKEN_BIN)), notes
    total = tokens.total()
    shares = [(limit, sum(count for length, count in tokens.items() if length <= limit) / total) for limit in (77, 256)]
    bins: Counter[int] = Counter()
    for length, count in tokens.items():
        bins[length // _TOKEN_BIN] += count
    notes = [f"{share:.1%} of the captions fit in {limit} tokens." for limit, share in shares]
    return ("Caption length, tokens", _binned(bins, _TOKEN_BIN)), notes


def _binned(counter: Counter[int], width: int) -> list[tuple[str, int]]:
    return [(f"{bin * width} to {(bin + 1) * width - 1}", count) for bin, count in sorted(counter.items())]


def _rows(items: Iterable[tuple[Any, Any]]) -> list[dict[str, Any]]:
    """Return the rows of a table. percent: a number as a share of the largest number. 0 for other values."""
    items = list(items)
    numbers = [value for _, value in items if _is_number(value)]
    largest = max(numbers, default=1) or 1
    return [
        {
            "name": str(name),
            "value": f"{value:,}" if _is_number(value) else str(value),
            "percent": 100 * value / largest if _is_number(value) else 0.0,
        }
        for name, value in items
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _pair(root: Path, row: dict[str, Any]) -> dict[str, str]:
    """Return a pair for the gallery. Read its image from the shard."""
    with (root / f"{row['shard']}.tar").open("rb") as file:
        file.seek(row["offset"])
        data = file.read(row["num_image_bytes"])
    caption = row["caption"]
    if len(caption) > _LONGEST_CAPTION:
        caption = caption[:_LONGEST_CAPTION] + "..."
    image = thumbnail(data, lambda: row["key"])
    return {"key": row["key"], "label": row.get("label") or "", "caption": caption, "image": image}

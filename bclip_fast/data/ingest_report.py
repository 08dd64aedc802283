"""`bclip ingest report DIR`: one HTML file about a dataset, that needs no network and no script.

Captions, labels and licences come from data nobody vouches for: all text is escaped, pictures are decoded and encoded
anew, and a content security policy forbids the page to load or run anything.
"""

from __future__ import annotations

import base64
import html
import io
import logging
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from ..errors import UserError
from .files import LocalFiles, ReadConfig
from .shard_format import read_description

log = logging.getLogger(__name__)

_THUMBNAIL = 240
_TOKEN_BIN = 32
_SIDE_BIN = 128
_STYLE = """body{font:15px/1.45 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse}td,th{padding:.15rem .7rem .15rem 0;text-align:left;vertical-align:top}
td.n{text-align:right;font-variant-numeric:tabular-nums}td.b{width:22rem}td.b div{background:#4477aa;height:.8rem}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(15rem,1fr));gap:1rem}.gallery img{max-width:100%}
.gallery figcaption{font-size:.8rem}.columns{display:flex;flex-wrap:wrap;gap:0 3rem}"""


@dataclass(frozen=True)
class ReportConfig:
    dataset: tyro.conf.Positional[Path]
    """Folder written by `bclip ingest build`."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=("-o",))] = None
    """File to write; DATASET/report.html by default."""
    gallery: int = 24
    """Random pairs shown."""
    seed: int = 0
    """Of the gallery."""


def run(config: ReportConfig) -> None:
    """Write the page. Raises UserError: no dataset there, or not one that ingest built."""
    described = read_description(LocalFiles(config.dataset, ReadConfig()))
    if "ingest" not in described:
        raise UserError(f"{config.dataset}: was not built by `bclip ingest build`")
    out = config.out or config.dataset / "report.html"
    out.write_text(page(config, described), encoding="utf-8")
    log.info("wrote %s", out)


def page(config: ReportConfig, described: dict[str, Any]) -> str:
    """The HTML; the manifest is read by row groups, so memory does not grow with it."""
    import pyarrow.parquet as pq

    manifest = pq.ParquetFile(config.dataset / "manifest.parquet")
    names = set(manifest.schema_arrow.names)
    counted = ("licence", "year", "source_format", "source_mode", "duplicate", "journal")
    values: dict[str, Counter[Any]] = {name: Counter() for name in counted}
    tokens: Counter[int] = Counter()
    words: Counter[int] = Counter()
    sides: Counter[int] = Counter()
    kept: dict[str, int] = dict.fromkeys(("image bytes", "original bytes", "retracted", "panels", "with mentions"), 0)
    chosen = set(random.Random(config.seed).sample(range(manifest.metadata.num_rows), _num_shown(config, manifest)))
    gallery, row_number = [], 0
    for group in range(manifest.num_row_groups):
        for row in manifest.read_row_group(group).to_pylist():
            for name, counter in values.items():
                counter[row.get(name) or "not stated"] += 1
            words[len(row["caption"].split()) // _TOKEN_BIN] += 1
            if row.get("num_tokens") is not None:
                tokens[row["num_tokens"]] += 1
            sides[min(row["source_width"], row["source_height"]) // _SIDE_BIN] += 1
            kept["image bytes"] += row["num_image_bytes"]
            kept["original bytes"] += row["source_bytes"] if row.get("panel") is None else 0
            kept["retracted"] += bool(row.get("retracted"))
            kept["panels"] += row.get("panel") is not None
            kept["with mentions"] += row.get("mentions") not in (None, "[]")
            if row_number in chosen:
                gallery.append(row)
            row_number += 1
    values["duplicate"].pop("not stated", None)
    about = described["ingest"]
    summary = {"articles": about["articles"], "pairs": about["pairs"], **about["by_split"], **kept}
    parts = [
        f"<h1>{html.escape(config.dataset.resolve().name)}</h1>",
        _table("Counts", summary.items(), bars=False),
        '<div class="columns">',
        _table("Rejects by reason", Counter(about["rejects"]).most_common()),
        _table("Licences", values["licence"].most_common()),
        _table("Types of the originals", values["source_format"].most_common()),
        _table("Their modes", values["source_mode"].most_common()),
        _table("Years", sorted(values["year"].items(), key=lambda item: str(item[0]))),
        _table("Journals", values["journal"].most_common(15)),
        _table("Duplicates that are marked", values["duplicate"].most_common()),
        _table("Shorter side of the originals, pixels", _binned(sides, _SIDE_BIN)),
        _captions(tokens, words, has_tokens="num_tokens" in names),
        "</div>",
        f'<h2>{len(gallery)} random pairs</h2><div class="gallery">',
        *(_figure(config.dataset, row) for row in gallery),
        "</div><h2>Configuration</h2>",
        _table("", about["config"].items(), bars=False),
        f"<p>Fingerprint {html.escape(described['fingerprint'])}</p>",
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
    title = f"<title>{html.escape(config.dataset.resolve().name)}</title>"
    return (
        f"<!doctype html><html><head>{head}{title}<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _num_shown(config: ReportConfig, manifest: Any) -> int:
    return min(max(config.gallery, 0), manifest.metadata.num_rows)


def _captions(tokens: Counter[int], words: Counter[int], has_tokens: bool) -> str:
    if not has_tokens:
        note = "<p>Tokens were not counted: build with --tokenizer.</p>"
        return _table("Caption length, words", _binned(words, _TOKEN_BIN)) + note
    total = tokens.total()
    shares = [(limit, sum(count for length, count in tokens.items() if length <= limit) / total) for limit in (77, 256)]
    told = "".join(f"<p>{share:.1%} of the captions fit in {limit} tokens.</p>" for limit, share in shares)
    bins: Counter[int] = Counter()
    for length, count in tokens.items():
        bins[length // _TOKEN_BIN] += count
    return _table("Caption length, tokens", _binned(bins, _TOKEN_BIN)) + told


def _binned(counter: Counter[int], width: int) -> list[tuple[str, int]]:
    return [(f"{bin * width} to {(bin + 1) * width - 1}", count) for bin, count in sorted(counter.items())]


def _table(title: str, rows: Iterable[tuple[Any, Any]], bars: bool = True) -> str:
    rows = list(rows)
    largest = max((count for _, count in rows), default=1) if bars else 1
    lines = []
    for name, count in rows:
        bar = f'<td class="b"><div style="width:{100 * count / largest:.1f}%"></div></td>' if bars else ""
        shown = f"{count:,}" if isinstance(count, int) and not isinstance(count, bool) else str(count)
        lines.append(f'<tr><td>{html.escape(str(name))}</td><td class="n">{html.escape(shown)}</td>{bar}</tr>')
    return f"<div><h2>{html.escape(title)}</h2><table>{''.join(lines)}</table></div>"


def _figure(root: Path, row: dict[str, Any]) -> str:
    from PIL import Image

    with (root / f"{row['shard']}.tar").open("rb") as file:
        file.seek(row["offset"])
        data = file.read(row["num_image_bytes"])
    with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "JPEG", quality=80)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    caption = row["caption"] if len(row["caption"]) <= 400 else row["caption"][:400] + "..."
    told = f"<b>{html.escape(row['key'])}</b> {html.escape(row.get('label') or '')} {html.escape(caption)}"
    return f'<figure><img alt="" src="data:image/jpeg;base64,{encoded}"><figcaption>{told}</figcaption></figure>'

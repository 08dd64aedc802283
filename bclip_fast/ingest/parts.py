"""The parts of an ingest: the files with the results of one package, their writer and their reader.

A part is two files. `<number>.images` holds the JPEGs one after another. `<number>.rows` is renamed into place last.
Its lines start with a letter, and tabs separate the fields (JSON never contains a tab):

    A  [identity, file]                                                 an article, to which the next pairs belong
    P  suffix, bytes of the caption, bytes of the metadata, offset and bytes of the image, CRC-32 of the image,
       SHA-256 of the source, perceptual hash, {"caption", "meta", "mentions", "licence_text", "facts"}, and, if the
       build keeps them, the texts in addition to the caption
    R  [article, figure, file, reason]                                  a reject
    E  CRC-32 of all previous lines                                     the end

The writer does not flush to disk. These checksums detect a part that a power failure damaged, and the next run writes
it again.
"""

from __future__ import annotations

import dataclasses
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bclip_fast.data.shards.format import to_json
from bclip_fast.errors import UserError
from bclip_fast.io.atomic import replacing
from bclip_fast.io.hashing import sha256

from .sanitize import SanitizedImage

SPLITS = ("train", "val", "test")
# Start of a line of each kind.
ARTICLE, PAIR, REJECT, END = b"A\t", b"P\t", b"R\t", b"E\t"
_MAX_END_BYTES = len(END + b"4294967295\n")


@dataclass(frozen=True)
class Reject:
    """A figure, file or article that gave no pair. `reason`: its text before a colon is the kind of reject."""

    article: str
    figure: str
    file: str
    reason: str


@dataclass(frozen=True)
class Pair:
    """An image with its caption.

    Attributes:
        suffix: end of the key, unique within the article.
        mentions: paragraphs of the article that refer to the figure.
        texts: texts in addition to the caption, by kind. None: the build doesn't keep them.
        licence_text: words of the licence, if they state terms. Only the manifest has them.
        facts: facts about the caption (`caption_facts`). Only the manifest has them.
    """

    suffix: str
    image: SanitizedImage
    caption: str
    meta: dict[str, Any]
    mentions: tuple[str, ...] = ()
    licence_text: str = ""
    texts: dict[str, list[str]] | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ArticleStart:
    """The start of an article's pairs. `identity`: its PMCID, else its DOI, PMID or file name."""

    identity: str
    file: str


Event = ArticleStart | Pair | Reject


def part_paths(folder: str | Path, number: int) -> tuple[Path, Path]:
    """Return the `.images` and `.rows` files of a part."""
    stem = Path(folder) / f"{number // 1000:06d}" / f"{number:09d}"
    return stem.with_suffix(".images"), stem.with_suffix(".rows")


def write_part(folder: str, number: int, events: Iterator[Event]) -> None:
    """Write a part atomically."""
    images_path, rows_path = part_paths(folder, number)
    images_path.parent.mkdir(parents=True, exist_ok=True)
    # The images are renamed before the rows: the rows file says that both are complete.
    with (
        replacing(rows_path) as rows_partial,
        replacing(images_path) as images_partial,
        images_partial.open("wb") as images,
        rows_partial.open("wb") as rows,
    ):
        checksum = 0
        for event in events:
            line = _line(event, images.tell())
            checksum = zlib.crc32(line, checksum)
            rows.write(line)
            if isinstance(event, Pair):
                images.write(event.image.data)
        rows.write(END + b"%d\n" % checksum)


def _line(event: Event, image_offset: int) -> bytes:
    if isinstance(event, ArticleStart):
        start, text = ARTICLE, to_json(dataclasses.astuple(event))
    elif isinstance(event, Reject):
        start, text = REJECT, to_json(dataclasses.astuple(event))
    else:
        fields = [event.suffix, len(event.caption.encode()), len(to_json(event.meta).encode())]
        fields += [image_offset, len(event.image.data)]
        fields += [zlib.crc32(event.image.data), event.meta["source_sha256"], event.image.phash]
        body = {"caption": event.caption, "meta": event.meta, "mentions": event.mentions}
        optional = {"licence_text": event.licence_text, "facts": event.facts}
        fields.append(to_json({**body, **{name: value for name, value in optional.items() if value}}))
        if event.texts is not None:
            fields.append(to_json(event.texts))
        start, text = PAIR, "\t".join(map(str, fields))
    return start + text.encode() + b"\n"


class PairLine(NamedTuple):
    """The fields of a P line. `body`, `texts`: JSON. Without texts, `texts` is empty."""

    suffix: str
    caption_bytes: int
    meta_bytes: int
    image_offset: int
    image_bytes: int
    image_crc: int
    source_sha256: str
    phash: str
    body: bytes
    texts: bytes


def parse_article(line: bytes) -> ArticleStart:
    """Parse an A line."""
    return ArticleStart(*json.loads(line[len(ARTICLE) :]))


def parse_pair(line: bytes) -> PairLine:
    """Parse a P line."""
    _, suffix, caption, meta, offset, image, crc, source, phash, body, *texts = line.rstrip(b"\n").split(b"\t")
    numbers = int(caption), int(meta), int(offset), int(image), int(crc)
    return PairLine(suffix.decode(), *numbers, source.decode(), phash.decode(), body, b"".join(texts))


def is_complete(path: Path) -> bool:
    """Return whether the last line of a rows file has the checksum of the lines before it."""
    checksum, tail = 0, b""
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            tail += block
            checksum = zlib.crc32(tail[:-_MAX_END_BYTES], checksum)
            tail = tail[-_MAX_END_BYTES:]
    end = tail.rfind(END)
    return end >= 0 and tail[end:] == END + b"%d\n" % zlib.crc32(tail[:end], checksum)


def read_line(work: Path, record: np.ndarray) -> bytes:
    """Read the line of a part that a record of the plan refers to."""
    with part_paths(work / "parts", int(record["part"]))[1].open("rb") as file:
        file.seek(int(record["line"]))
        return file.read(int(record["line_bytes"]))


def read_pair(work: Path, record: np.ndarray) -> dict[str, Any]:
    """Read a pair of the plan.

    Returns:
        `caption`, `meta`, `mentions`, `licence_text`, `facts` and `texts` (all optional), `key`, `crc` of its image.
    """
    line = parse_pair(read_line(work, record))
    body: dict[str, Any] = json.loads(line.body)
    if line.texts:
        body["texts"] = json.loads(line.texts)
    return {**body, "key": pair_key(body["meta"]["article"], line.suffix), "crc": line.image_crc}


def read_image(work: Path, record: np.ndarray, crc: int) -> bytes:
    """Read the image of a record of the plan. Raises UserError if its CRC-32 is not `crc`."""
    with part_paths(work / "parts", int(record["part"]))[0].open("rb") as file:
        file.seek(int(record["place"]))
        data = file.read(int(record["image_bytes"]))
    if zlib.crc32(data) != crc:
        raise discard_damaged(work, int(record["part"]))
    return data


def discard_damaged(work: Path, part: int) -> UserError:
    """Delete a damaged part, so that the next run writes it again with the same bytes. Return the error to raise."""
    part_paths(work / "parts", part)[1].unlink(missing_ok=True)
    return UserError(f"part {part} was damaged on the disk (a power failure?); run it again: the others are kept")


def part_rejects(work: Path, num_parts: int) -> Iterator[Reject]:
    """Yield the rejects of all parts, then those of the plan."""
    for part in range(num_parts):
        with part_paths(work / "parts", part)[1].open("rb") as lines:
            yield from (Reject(*json.loads(line[2:])) for line in lines if line.startswith(REJECT))
    with (work / "rejects.jsonl").open(encoding="utf-8") as rows:
        yield from (Reject(*json.loads(row)) for row in rows)


def pair_key(identity: str, suffix: str) -> str:
    """Return the key of a pair: short ASCII without dots. Ids other than PMCIDs are shortened and get a hash."""
    if not re.fullmatch(r"PMC\d{1,12}", identity):
        digest = sha256(identity)[:8]
        identity = re.sub(r"[^A-Za-z0-9]+", "-", identity).strip("-")[-48:].lstrip("-") + f"-{digest}"
    return f"{identity}_{suffix}"

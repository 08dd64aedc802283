"""The parts of an ingest: what the work of one package leaves on disk, its writer and its reader.

A part is two files: `<number>.images`, the JPEGs one after another, and `<number>.rows`, renamed into place last, whose
lines are, by their first letter (fields are separated by tabs, JSON never holds one):

    A  [identity, file]                                                 an article; the pairs that follow are its own
    P  suffix, bytes of caption, bytes of metadata, place and bytes of the image, their CRC-32, SHA-256 of the source,
       perceptual hash, and {"caption", "meta", "mentions"}
    R  [article, figure, file, reason]                                  what is no pair
    E  CRC-32 of all lines before                                       the end

Nothing waits for the disk: what a power failure leaves half on it is found by these sums, and done again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bclip_fast.data.shards.format import to_json
from bclip_fast.errors import UserError
from bclip_fast.io.atomic import replacing

from .sanitize import SanitizedImage

SPLITS = ("train", "val", "test")
# How a line begins.
ARTICLE, PAIR, REJECT, END = b"A\t", b"P\t", b"R\t", b"E\t"
_LONGEST_END = len(END + b"4294967295\n")


@dataclass(frozen=True)
class Reject:
    """What did not become a pair. The part of `reason` before a colon is its kind."""

    article: str
    figure: str
    file: str
    reason: str


@dataclass(frozen=True)
class Pair:
    """An image with its caption; `suffix` distinguishes it within its article, `mentions` are paragraphs about it."""

    suffix: str
    image: SanitizedImage
    caption: str
    meta: dict[str, Any]
    mentions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Begin:
    """An article begins; it is known by `identity`: PMCID, else DOI, PMID, or its file."""

    identity: str
    file: str


def part_paths(folder: str | Path, number: int) -> tuple[Path, Path]:
    """`.images` and `.rows` of a part."""
    stem = Path(folder) / f"{number // 1000:06d}" / f"{number:09d}"
    return stem.with_suffix(".images"), stem.with_suffix(".rows")


def write_rows(folder: str, number: int, events: Iterator[Begin | Pair | Reject]) -> None:
    images_path, rows_path = part_paths(folder, number)
    images_path.parent.mkdir(parents=True, exist_ok=True)
    # A worker of a killed run may live for a moment, so the names are this process's own. Images are renamed before
    # rows: the rows file says that both are complete.
    with (
        replacing(rows_path, shared=True) as rows_partial,
        replacing(images_path, shared=True) as images_partial,
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


def _line(event: Begin | Pair | Reject, place: int) -> bytes:
    if isinstance(event, Begin):
        start, text = ARTICLE, to_json(dataclasses.astuple(event))
    elif isinstance(event, Reject):
        start, text = REJECT, to_json(dataclasses.astuple(event))
    else:
        sizes = len(event.caption.encode()), len(to_json(event.meta).encode())
        hashes = zlib.crc32(event.image.data), event.meta["source_sha256"], event.image.phash
        body = to_json({"caption": event.caption, "meta": event.meta, "mentions": event.mentions})
        start, text = PAIR, "\t".join(map(str, (event.suffix, *sizes, place, len(event.image.data), *hashes, body)))
    return start + text.encode() + b"\n"


class PairLine(NamedTuple):
    """The fields of a P line. `place`: first byte of the image in the .images file. `body`: JSON."""

    suffix: str
    caption_bytes: int
    meta_bytes: int
    place: int
    image_bytes: int
    image_crc: int
    source_sha256: str
    phash: str
    body: bytes


def parse_begin(line: bytes) -> Begin:
    """The article that an A line begins."""
    return Begin(*json.loads(line[len(ARTICLE) :]))


def parse_pair(line: bytes) -> PairLine:
    _, suffix, caption, meta, place, image, crc, source, phash, body = line.split(b"\t", 9)
    sizes = int(caption), int(meta), int(place), int(image), int(crc)
    return PairLine(suffix.decode(), *sizes, source.decode(), phash.decode(), body)


def is_whole(path: Path) -> bool:
    """Whether the last line of a part is the sum of those before."""
    checksum, tail = 0, b""
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            tail += block
            checksum = zlib.crc32(tail[:-_LONGEST_END], checksum)
            tail = tail[-_LONGEST_END:]
    end = tail.rfind(END)
    return end >= 0 and tail[end:] == END + b"%d\n" % zlib.crc32(tail[:end], checksum)


def read_line(work: Path, record: np.ndarray) -> bytes:
    """The line of a part that a record of the plan points to."""
    with part_paths(work / "parts", int(record["part"]))[1].open("rb") as file:
        file.seek(int(record["line"]))
        return file.read(int(record["line_bytes"]))


def read_pair(work: Path, record: np.ndarray) -> dict[str, Any]:
    """`caption`, `meta`, `mentions`, `key` and `crc` (of the image) of a pair of the plan."""
    line = parse_pair(read_line(work, record))
    body: dict[str, Any] = json.loads(line.body)
    return {**body, "key": pair_key(body["meta"]["article"], line.suffix), "crc": line.image_crc}


def read_image(work: Path, record: np.ndarray, crc: int) -> bytes:
    with part_paths(work / "parts", int(record["part"]))[0].open("rb") as file:
        file.seek(int(record["place"]))
        data = file.read(int(record["image_bytes"]))
    if zlib.crc32(data) != crc:
        raise damaged(work, int(record["part"]))
    return data


def damaged(work: Path, part: int) -> UserError:
    """The part is taken away, so that the next run does it again, with the same bytes."""
    part_paths(work / "parts", part)[1].unlink(missing_ok=True)
    return UserError(f"part {part} was damaged on the disk (a power failure?); run it again: the others are kept")


def part_rejects(work: Path, num_parts: int) -> Iterator[Reject]:
    """The rejects of all parts, then the plan's own."""
    for part in range(num_parts):
        with part_paths(work / "parts", part)[1].open("rb") as lines:
            yield from (Reject(*json.loads(line[2:])) for line in lines if line.startswith(REJECT))
    with (work / "rejects.jsonl").open(encoding="utf-8") as rows:
        yield from (Reject(*json.loads(row)) for row in rows)


def pair_key(identity: str, suffix: str) -> str:
    if not re.fullmatch(r"PMC\d{1,12}", identity):
        digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
        identity = re.sub(r"[^A-Za-z0-9]+", "-", identity).strip("-")[-48:].lstrip("-") + f"-{digest}"
    return f"{identity}_{suffix}"

"""`bclip ingest verify DIR`: re-read a dataset and say what is wrong."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from bclip_fast.data.shards import verify as shards
from bclip_fast.errors import first_line

from .duplicates import near_pairs
from .parts import SPLITS


@dataclass(frozen=True)
class VerifyConfig:
    dataset: tyro.conf.Positional[Path]
    """Folder written by `bclip ingest build`."""


def run(config: VerifyConfig) -> int:
    """Print the problems, one a line; 1 if there are any. Raises UserError: no dataset there at all."""
    problems = verify(config.dataset)
    for problem in problems:
        print(problem)
    print(f"{config.dataset}: {f'{len(problems)} problems' if problems else 'all is well'}")
    return int(bool(problems))


def verify(root: Path) -> list[str]:
    """Of any dataset what `shards.verify` finds; of one that ingest built also: an article in two splits, images of val
    or test that resemble one of a split they are kept apart from, counts that differ from dataset.json."""
    problems = shards.verify(root)
    told = json.loads((root / "dataset.json").read_bytes()).get("ingest")
    if told is None or any(problem.startswith("manifest.parquet") for problem in problems):
        return problems
    return problems + _verify_ingest(root, told)


def _verify_ingest(root: Path, told: dict[str, Any]) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(root / "manifest.parquet", columns=["article", "split", "phash", "source_sha256"])
        rejects = pq.read_table(root / "rejects.parquet", columns=["reason"])["reason"].to_pylist()
    except (OSError, pa.ArrowException) as error:
        return [f"manifest.parquet or rejects.parquet: cannot be read: {first_line(error)}"]
    articles, splits, phashes, sources = (column.to_pylist() for column in table.columns)
    problems = []
    home: dict[str, str] = {}
    for article, split in zip(articles, splits, strict=True):
        if home.setdefault(article, split) != split:
            problems.append(f"article {article}: in split {home[article]} and in {split}")
    kinds = Counter(reason.partition(":")[0] for reason in rejects)
    if told["rejects"] != dict(kinds):
        problems.append("rejects.parquet: its reasons are not those that dataset.json counts")
    if (told["pairs"], told["by_split"]) != (len(splits), dict(Counter(splits))):
        problems.append("manifest.parquet: its pairs are not those that dataset.json counts")
    return sorted(set(problems)) + _leaks(splits, phashes, sources)


def _leaks(splits: list[str], phashes: list[str], sources: list[str]) -> list[str]:
    try:
        hashes = np.frombuffer(bytes.fromhex("".join(phashes)), "<u8").reshape(len(splits), 4)
        numbers = np.array([SPLITS.index(split) for split in splits])
    except (ValueError, TypeError):
        return ["manifest.parquet: a perceptual hash or a split is none"]
    _, first, look = np.unique(np.ascontiguousarray(hashes).view("V32").ravel(), return_index=True, return_inverse=True)
    present = np.zeros((len(first), len(SPLITS)), bool)
    present[look, numbers] = True
    left, right = near_pairs(hashes[first])
    seen = present.sum(axis=1) > 1
    crossing = (present[left] | present[right]).sum(axis=1) > 1
    by_source: dict[str, str] = {}
    same = sum(by_source.setdefault(source, split) != split for source, split in zip(sources, splits, strict=True))
    count = int(seen.sum() + crossing.sum()) + same
    return [f"manifest.parquet: {count} images resemble one of another split"] if count else []

"""`bclip ingest verify DIR`: read a dataset again and list its problems."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from bclip_fast.data.shards import verify as shards
from bclip_fast.data.shards.tar_dataset import verify_tars
from bclip_fast.data.shards.tar_paths import has_tar_files, is_tar_path
from bclip_fast.errors import UserError, first_line
from bclip_fast.io import stand_ins

from .duplicates import near_pairs
from .parts import SPLITS

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class VerifyConfig:
    """Re-read a dataset and list its problems."""

    dataset: tyro.conf.Positional[str]
    """Folder that `bclip ingest build` wrote, or tar files in WebDataset's layout: a folder, a file or a pattern."""
    caption_key: str = ""
    """Key of the caption in the JSON of tar files in WebDataset's layout. If empty, the caption is the .txt, or without
    one the JSON's key `caption`."""
    add_checksums: bool = False
    """First add checksums to a dataset of an earlier release, which has none."""
    json: bool = False
    """Print a JSON object with the list of problems."""


def run(config: VerifyConfig) -> int:
    """Print the problems, one a line. Return 1 if there are any, else 0. Raises UserError if the dataset is missing."""
    dataset = str(config.dataset)
    is_tar = is_tar_path(dataset) or has_tar_files(Path(dataset))
    if config.caption_key and not is_tar:
        raise UserError(f"caption_key={config.caption_key} is only for tar files of others, not for {dataset}")
    if config.add_checksums and is_tar:
        raise UserError(f"add_checksums needs a dataset of bclip ingest build, and {dataset} isn't one")
    if config.add_checksums and not shards.add_checksums(dataset):
        log.info("%s has checksums already", dataset)
    problems = (
        verify_tars(dataset, config.caption_key, progress=True) if is_tar else verify(Path(dataset), progress=True)
    )
    if config.json:
        print(json.dumps({"dataset": dataset, "problems": problems}))
        return int(bool(problems))
    for problem in problems:
        print(problem)
    print(f"{dataset}: {f'{len(problems)} problems' if problems else 'no problems found'}")
    return int(bool(problems))


def verify(root: Path, *, progress: bool = False) -> list[str]:
    """Return the problems of a dataset, one line each. `progress` shows the progress, in samples.

    For every dataset, these are the problems that `shards.verify` reports. For a dataset that ingest built, they also
    include articles in two splits, similar images in different splits, and counts that differ from dataset.json.
    """
    problems = shards.verify(root, progress=progress)
    recorded = json.loads((root / "dataset.json").read_bytes()).get("ingest")
    if recorded is None or any(problem.startswith("manifest.parquet") for problem in problems):
        return problems
    return problems + _verify_ingest(root, recorded)


def _verify_ingest(root: Path, recorded: dict[str, Any]) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(root / "manifest.parquet", columns=["article", "split", "phash", "source_sha256"])
        rejects = pq.read_table(root / "rejects.parquet", columns=["reason"])["reason"].to_pylist()
    except (OSError, pa.ArrowException) as error:
        for name in ("manifest.parquet", "rejects.parquet"):
            if reason := stand_ins.of_file(root / name):
                return [f"{name} {reason}"]
        return [f"manifest.parquet or rejects.parquet: cannot be read: {first_line(error)}"]
    articles, splits, phashes, sources = (column.to_pylist() for column in table.columns)
    problems = []
    split_of: dict[str, str] = {}
    for article, split in zip(articles, splits, strict=True):
        if split_of.setdefault(article, split) != split:
            problems.append(f"article {article}: in split {split_of[article]} and in {split}")
    kinds = Counter(reason.partition(":")[0] for reason in rejects)
    if recorded["rejects"] != dict(kinds):
        problems.append("rejects.parquet: the counts of its reasons differ from dataset.json")
    if (recorded["pairs"], recorded["by_split"]) != (len(splits), dict(Counter(splits))):
        problems.append("manifest.parquet: the number of pairs in a split differs from dataset.json")
    return sorted(set(problems)) + _leaks(splits, phashes, sources)


def _leaks(splits: list[str], phashes: list[str], sources: list[str]) -> list[str]:
    try:
        hashes = np.frombuffer(bytes.fromhex("".join(phashes)), "<u8").reshape(len(splits), 4)
        numbers = np.array([SPLITS.index(split) for split in splits])
    except (ValueError, TypeError):
        return ["manifest.parquet: a row has an invalid perceptual hash or split"]
    _, first, hash_ids = np.unique(
        np.ascontiguousarray(hashes).view("V32").ravel(), return_index=True, return_inverse=True
    )
    present = np.zeros((len(first), len(SPLITS)), bool)
    present[hash_ids, numbers] = True
    left, right = near_pairs(hashes[first])
    is_shared = present.sum(axis=1) > 1
    is_crossing = (present[left] | present[right]).sum(axis=1) > 1
    by_source: dict[str, str] = {}
    num_equal = sum(by_source.setdefault(source, split) != split for source, split in zip(sources, splits, strict=True))
    count = int(is_shared.sum() + is_crossing.sum()) + num_equal
    return [f"manifest.parquet: {count} cases of similar images in different splits"] if count else []

"""What a dataset folder looks like: samples, the index of a shard, the description of it all.

{split}-{n:06d}.tar          ustar; a sample is `key.jpg`, `key.txt`, `key.json`, in this order
{split}-{n:06d}.index.json   key, byte offset and size of each member; SHA-256 of the tar
manifest.parquet             one row a sample: where it lies, its caption, its metadata
dataset.json                 splits, counts, hashes, fingerprint; written last
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bclip_fast.data.storage import Files, LocalFiles, ReadError
from bclip_fast.errors import UserError
from bclip_fast.io.hashing import sha256

FORMAT_VERSION = 1
MEMBERS = ("jpg", "txt", "json")
BLOCK = 512


@dataclass(frozen=True)
class Sample:
    """An image (bytes of a baseline RGB JPEG) and its caption. `key`: 1 to 90 of A-Z a-z 0-9 _ -"""

    key: str
    image: bytes
    caption: str
    meta: dict[str, Any] = field(default_factory=dict)


def fingerprint_of(name: str, shards: list[dict[str, Any]]) -> str:
    lines = [name, *(f"{shard['name']} {shard['sha256']}" for shard in shards)]
    return sha256("\n".join(lines))


def to_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True)
class Index:
    offsets: np.ndarray  # (samples, 3) int64, bytes from the start of the tar; columns as MEMBERS
    sizes: np.ndarray  # (samples, 3) int64, bytes


def _read_json(files: Files, name: str, what: str) -> Any:
    try:
        return files.json(name)
    except FileNotFoundError:
        raise UserError(f"{files.path(name)}: missing; {what}") from None
    except ReadError as error:
        raise ReadError(f"{error}; {what}") from None


def read_description(files: Files) -> dict[str, Any]:
    if isinstance(files, LocalFiles) and not files.root.is_dir():
        raise UserError(f"{files.root}: no such folder; give a dataset written by `bclip ingest build`")
    what = "a finished dataset has one: build it (again)"
    description = _read_json(files, "dataset.json", what)
    if not isinstance(description, dict) or description.get("format") != "bclip_fast.shards":
        raise UserError(f"{files.path('dataset.json')}: not the description of a dataset")
    if description.get("version") != FORMAT_VERSION:
        raise UserError(
            f"{files.path('dataset.json')}: format version {description.get('version')}, this release reads "
            f"{FORMAT_VERSION}; build the dataset again"
        )
    return description


def read_index(files: Files, shard: dict[str, Any]) -> tuple[list[str], Index]:
    name = f"{shard['name']}.index.json"
    path = files.path(name)
    index = _read_json(files, name, "the index of a shard is needed; build the dataset again")
    try:
        if (index["name"], index["sha256"]) != (shard["name"], shard["sha256"]):
            raise UserError(f"{path}: belongs to another shard than dataset.json names")
        keys = [entry["key"] for entry in index["samples"]]
        places = np.array(
            [[entry[member] for member in MEMBERS] for entry in index["samples"]], dtype=np.int64
        ).reshape(len(keys), len(MEMBERS), 2)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: corrupt index ({error!r}); build the dataset again") from None
    offsets, sizes = places[..., 0], places[..., 1]
    starts = np.concatenate([offsets.reshape(-1) - BLOCK, [shard["num_bytes"]]])
    ends = (offsets + sizes).reshape(-1)
    if len(keys) != shard["samples"] or (sizes < 0).any() or (starts[0] < 0) or (ends > starts[1:]).any():
        raise UserError(f"{path}: corrupt index; build the dataset again")
    return keys, Index(offsets, sizes)

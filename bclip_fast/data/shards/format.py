"""The format of a dataset folder.

{split}-{n:06d}.tar          ustar archive with `key.jpg`, `key.txt` and `key.json` of each sample, in this order
{split}-{n:06d}.index.json   key of each sample, with the byte offset, size and CRC-32C of its members, and the SHA-256
                             of the tar
manifest.parquet             one row for each sample: its shard and position, caption and metadata
dataset.json                 splits, counts, hashes, fingerprint (written last)
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bclip_fast.data.storage import LocalStorage, ReadError, Storage
from bclip_fast.errors import UserError
from bclip_fast.io.hashing import sha256

FORMAT_VERSION = 1
# The value of `checksum` in dataset.json, and the name of the checksums in an index. Earlier releases ignore both.
CHECKSUM = "crc32c"
MEMBERS = ("jpg", "txt", "json")
BLOCK = 512


@dataclass(frozen=True)
class Sample:
    """An image with its caption.

    key: 1 to 90 characters of A-Z a-z 0-9 _ -. Tar files of others may have any printable text.
    image: bytes of a baseline RGB JPEG, or from tar files of others, any format that `data.image_files` reads.
    """

    key: str
    image: bytes
    caption: str
    meta: dict[str, Any] = field(default_factory=dict)


def fingerprint_of(name: str, shards: list[dict[str, Any]]) -> str:
    """Return the fingerprint of a split (of the dataset, if `name` is empty): a hash of its shards' hashes."""
    lines = [name, *(f"{shard['name']} {shard['sha256']}" for shard in shards)]
    return sha256("\n".join(lines))


def to_json(value: Any) -> str:
    """Return canonical JSON: sorted keys, no white space. Raises ValueError for NaN and infinity."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True)
class Index:
    """The members of a shard. The columns are those of MEMBERS.

    Attributes:
        offsets: (samples, 3) int64, in bytes from the start of the tar.
        sizes: (samples, 3) int64, in bytes.
        checksums: (samples, 3) uint32, CRC-32C. None: an earlier release wrote the shard.
    """

    offsets: np.ndarray
    sizes: np.ndarray
    checksums: np.ndarray | None = None


class MissingDescription(UserError):
    """The folder has no dataset.json."""


def _read_json(storage: Storage, name: str, remedy: str) -> Any:
    try:
        return storage.json(name)
    except FileNotFoundError:
        raise UserError(f"{storage.path(name)} is missing; {remedy}") from None
    except ReadError as error:
        raise ReadError(f"{error}; {remedy}") from None


def read_description(storage: Storage) -> dict[str, Any]:
    """Read and check dataset.json. Raises UserError."""
    if isinstance(storage, LocalStorage) and not storage.root.is_dir():
        raise UserError(f"{storage.root}: no such folder; give a dataset that `bclip ingest build` wrote")
    try:
        description = _read_json(storage, "dataset.json", "the dataset is not finished; build it again")
    except ReadError:
        raise
    except UserError as error:
        raise MissingDescription(str(error)) from None
    if not isinstance(description, dict) or description.get("format") != "bclip_fast.shards":
        raise UserError(f"{storage.path('dataset.json')} does not describe a dataset; give another folder")
    if description.get("version") != FORMAT_VERSION:
        raise UserError(
            f"{storage.path('dataset.json')} has format version {description.get('version')}, but this release reads "
            f"version {FORMAT_VERSION}; build the dataset again"
        )
    if description.get("checksum", CHECKSUM) != CHECKSUM:
        raise UserError(
            f"{storage.path('dataset.json')} has checksum={description['checksum']!r}, but this release checks "
            f"{CHECKSUM!r}; update bclip_fast or build the dataset again"
        )
    return description


def read_index(storage: Storage, shard: dict[str, Any], has_checksums: bool) -> tuple[list[str], Index]:
    """Read and check the index file of a shard. Return its keys and the index. Raises UserError.

    has_checksums: whether dataset.json says that every index has checksums.
    """
    name = f"{shard['name']}.index.json"
    path = storage.path(name)
    index = _read_json(storage, name, "every shard needs its index; build the dataset again")
    try:
        if (index["name"], index["sha256"]) != (shard["name"], shard["sha256"]):
            raise UserError(f"{path}: name or hash differ from dataset.json; copy it again or build the dataset again")
        keys = [entry["key"] for entry in index["samples"]]
        members = np.array(
            [[entry[member] for member in MEMBERS] for entry in index["samples"]], dtype=np.int64
        ).reshape(len(keys), len(MEMBERS), 2)
        checksums = None
        if has_checksums:
            checksums = np.array([entry[CHECKSUM] for entry in index["samples"]], dtype=np.uint32)
            checksums = checksums.reshape(len(keys), len(MEMBERS))
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: corrupt index ({error!r}); build the dataset again") from None
    offsets, sizes = members[..., 0], members[..., 1]
    starts = np.concatenate([offsets.reshape(-1) - BLOCK, [shard["num_bytes"]]])
    ends = (offsets + sizes).reshape(-1)
    if len(keys) != shard["samples"] or (sizes < 0).any() or (starts[0] < 0) or (ends > starts[1:]).any():
        raise UserError(f"{path}: corrupt index; build the dataset again")
    return keys, Index(offsets, sizes, checksums)


def index_text(shard: dict[str, Any], samples: list[dict[str, Any]]) -> str:
    """Return the text of an index file. shard: the shard's entry in dataset.json. samples: a dict for each sample."""
    head = to_json({"version": FORMAT_VERSION, **shard, "samples": None})
    lines = ",\n".join(map(to_json, samples))
    return head.replace('"samples":null', f'"samples":[\n{lines}\n]')


def description_text(description: dict[str, Any]) -> str:
    """Return the text of dataset.json."""
    return json.dumps(description, indent=1, sort_keys=True, allow_nan=False) + "\n"

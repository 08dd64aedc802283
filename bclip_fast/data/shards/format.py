"""The format of a dataset folder.

{split}-{n:06d}.tar          ustar archive with `key.jpg`, `key.txt` and `key.json` of each sample, in this order
{split}-{n:06d}.index.json   key of each sample, with the byte offset, size and CRC-32C of its members, and the SHA-256
                             of the tar
manifest.parquet             one row for each sample: its shard and position, caption and metadata
dataset.json                 splits, counts, hashes, fingerprint (written last)

A dataset of version 2 also has `key.texts.json` after them: further texts about the image, by kind. Its indices list
the bytes of each text. A dataset without such texts keeps version 1, which earlier releases read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bclip_fast.data.storage import LocalStorage, ReadError, Storage
from bclip_fast.errors import UserError
from bclip_fast.io.hashing import sha256

# The value of `checksum` in dataset.json, and the name of the checksums in an index. Earlier releases ignore both.
CHECKSUM = "crc32c"
TEXTS = "texts.json"
# The members of a sample, by the version of the dataset.
MEMBERS = {1: ("jpg", "txt", "json"), 2: ("jpg", "txt", "json", TEXTS)}
# The kinds of texts about an image. Every sample has a caption. The others are optional, and may have several texts.
CAPTION = "caption"
KINDS = (CAPTION, "mention", "panel", "title")
BLOCK = 512


@dataclass(frozen=True)
class Sample:
    """An image with its caption.

    Attributes:
        key: 1 to 90 characters of A-Z a-z 0-9 _ -. Tar files of others may have any printable text.
        image: bytes of a baseline RGB JPEG, or from tar files of others, any format that `data.image_files` reads.
        texts: texts in addition to the caption, by their kind, one of KINDS without the caption.
    """

    key: str
    image: bytes
    caption: str
    meta: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, list[str]] = field(default_factory=dict)


def fingerprint_of(name: str, shards: list[dict[str, Any]]) -> str:
    """Return the fingerprint of a split (of the dataset, if `name` is empty): a hash of its shards' hashes."""
    lines = [name, *(f"{shard['name']} {shard['sha256']}" for shard in shards)]
    return sha256("\n".join(lines))


def to_json(value: Any) -> str:
    """Return canonical JSON: sorted keys, no white space. Raises ValueError for NaN and infinity."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True)
class Index:
    """The M members of the samples of a shard. The columns are those of MEMBERS. A sample has any number of texts.

    Attributes:
        offsets: (samples, M) int64, in bytes from the start of the tar.
        sizes: (samples, M) int64, in bytes.
        checksums: (samples, M) uint32, CRC-32C. None: an earlier release wrote the shard.
        text_starts: (samples + 1,) int64. The texts of sample i without its caption are `text_starts[i]` to
            `text_starts[i + 1]` - 1. None: the dataset has only captions.
        text_kinds: (texts,) uint8, the position of the kind in KINDS.
        text_bytes: (texts,) uint32.
    """

    offsets: np.ndarray
    sizes: np.ndarray
    checksums: np.ndarray | None = None
    text_starts: np.ndarray | None = None
    text_kinds: np.ndarray | None = None
    text_bytes: np.ndarray | None = None

    def text_bytes_of(self, position: int) -> dict[str, list[int]]:
        """Return the sizes of the texts of a sample without its caption, by kind."""
        sizes: dict[str, list[int]] = {}
        if self.text_starts is not None and self.text_kinds is not None and self.text_bytes is not None:
            texts = slice(self.text_starts[position], self.text_starts[position + 1])
            for kind, size in zip(self.text_kinds[texts].tolist(), self.text_bytes[texts].tolist(), strict=True):
                sizes.setdefault(KINDS[kind], []).append(size)
        return sizes


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
    if description.get("version") not in MEMBERS:
        raise UserError(
            f"{storage.path('dataset.json')} has format version {description.get('version')}, but this release reads "
            f"versions {' and '.join(map(str, MEMBERS))}; update bclip_fast or build the dataset again"
        )
    if description.get("checksum", CHECKSUM) != CHECKSUM:
        raise UserError(
            f"{storage.path('dataset.json')} has checksum={description['checksum']!r}, but this release checks "
            f"{CHECKSUM!r}; update bclip_fast or build the dataset again"
        )
    return description


def read_index(
    storage: Storage, shard: dict[str, Any], has_checksums: bool, version: int = 1
) -> tuple[list[str], Index]:
    """Read and check the index file of a shard. Return its keys and the index. Raises UserError.

    Args:
        has_checksums: whether dataset.json says that every index has checksums.
        version: format version that dataset.json states.
    """
    name = f"{shard['name']}.index.json"
    path = storage.path(name)
    index = _read_json(storage, name, "every shard needs its index; build the dataset again")
    try:
        if (index["name"], index["sha256"]) != (shard["name"], shard["sha256"]):
            raise UserError(f"{path}: name or hash differ from dataset.json; copy it again or build the dataset again")
        names, entries = MEMBERS[version], index["samples"]
        keys = [entry["key"] for entry in entries]
        members = np.array([[entry[member] for member in names] for entry in entries], dtype=np.int64)
        members = members.reshape(len(keys), len(names), 2)
        checksums = None
        if has_checksums:
            checksums = np.array([entry[CHECKSUM] for entry in entries], dtype=np.uint32)
            checksums = checksums.reshape(len(keys), len(names))
        texts = _text_sizes([entry["texts"] for entry in entries]) if TEXTS in names else ()
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: corrupt index ({error!r}); build the dataset again") from None
    offsets, sizes = members[..., 0], members[..., 1]
    starts = np.concatenate([offsets.reshape(-1) - BLOCK, [shard["num_bytes"]]])
    ends = (offsets + sizes).reshape(-1)
    if len(keys) != shard["samples"] or (sizes < 0).any() or (starts[0] < 0) or (ends > starts[1:]).any():
        raise UserError(f"{path}: corrupt index; build the dataset again")
    return keys, Index(offsets, sizes, checksums, *texts)


def _text_sizes(texts: list[dict[str, list[int]]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return `text_starts`, `text_kinds` and `text_bytes` of an Index. texts: bytes of the texts by sample and kind."""
    kinds = [[KINDS.index(kind) for kind in KINDS for _ in sizes.get(kind, ())] for sizes in texts]
    num_bytes = [size for sizes in texts for kind in KINDS for size in sizes.get(kind, ())]
    starts = np.cumsum([0, *map(len, kinds)])
    return starts, np.array([kind for row in kinds for kind in row], np.uint8), np.array(num_bytes, np.uint32)


def index_text(shard: dict[str, Any], samples: list[dict[str, Any]], version: int) -> str:
    """Return the text of an index file. shard: the shard's entry in dataset.json. samples: a dict for each sample."""
    head = to_json({"version": version, **shard, "samples": None})
    lines = ",\n".join(map(to_json, samples))
    return head.replace('"samples":null', f'"samples":[\n{lines}\n]')


def description_text(description: dict[str, Any]) -> str:
    """Return the text of dataset.json."""
    return json.dumps(description, indent=1, sort_keys=True, allow_nan=False) + "\n"

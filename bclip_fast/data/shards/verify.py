"""Read a dataset again and list its problems."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

from bclip_fast.data.image_files import decode_as_loaders
from bclip_fast.data.storage import LocalStorage, ReadConfig
from bclip_fast.errors import UserError, first_line
from bclip_fast.io import stand_ins
from bclip_fast.io.atomic import write_text
from bclip_fast.io.folders import Listing
from bclip_fast.io.hashing import sha256_of_file
from bclip_fast.io.progress import track

from .checksum import crc32c
from .format import (
    CHECKSUM,
    MEMBERS,
    TEXTS,
    Index,
    description_text,
    fingerprint_of,
    index_text,
    read_description,
    read_index,
)


def verify(root: Path | str, *, progress: bool = False) -> list[str]:
    """Read everything again: hashes, every member of every tar, every image, index and manifest.

    Args:
        progress: show the progress, in samples.

    Returns:
        The problems, one line each.

    Raises:
        UserError: the dataset is missing.
    """
    root = Path(root)
    storage = LocalStorage(root, ReadConfig())
    description = read_description(storage)
    problems: list[str] = []
    rows: list[tuple[str, str, str, int]] = []
    expected = {"dataset.json", "manifest.parquet"}
    all_shards = []
    total = sum(part["samples"] for part in description["splits"].values())
    with track("samples", total, show=progress, transient=True) as advance:
        for split, part in sorted(description["splits"].items()):
            all_shards += part["files"]
            if part["fingerprint"] != fingerprint_of(split, part["files"]):
                problems.append(f"dataset.json: the fingerprint of split {split} is wrong")
            if part["samples"] != sum(shard["samples"] for shard in part["files"]):
                problems.append(f"dataset.json: the number of samples of split {split} is wrong")
            for shard in part["files"]:
                expected |= {f"{shard['name']}.tar", f"{shard['name']}.index.json"}
                keys: list[str] = []
                try:
                    keys, index = read_index(storage, shard, "checksum" in description, description["version"])
                    members = MEMBERS[description["version"]]
                    problems += _verify_shard(root / f"{shard['name']}.tar", shard, keys, index, members)
                except UserError as error:
                    problems.append(str(error))
                rows += [(key, split, shard["name"], position) for position, key in enumerate(keys)]
                advance(shard["samples"])
    if description["fingerprint"] != fingerprint_of("", all_shards):
        problems.append("dataset.json: the fingerprint is wrong")
    if len({row[0] for row in rows}) != len(rows):
        problems.append("some keys occur several times")
    problems += _verify_manifest(root / "manifest.parquet", rows)
    names = [path.name for path in Listing(root).files(root)]
    files = {name for name in names if name.endswith((".tar", ".index.json"))}
    problems += [f"{name}: dataset.json does not list it" for name in sorted(files - expected)]
    return problems


def _verify_shard(
    path: Path, shard: dict[str, Any], keys: list[str], index: Index, member_names: tuple[str, ...]
) -> list[str]:
    if not path.is_file():
        return [f"{path.name}: missing"]
    problems = []
    if sha256_of_file(path) != shard["sha256"]:
        problems.append(f"{path.name}: its SHA-256 differs from dataset.json")
    members = [
        (f"{key}.{member}", int(offset), int(size))
        for key, offsets, sizes in zip(keys, index.offsets, index.sizes, strict=True)
        for member, offset, size in zip(member_names, offsets, sizes, strict=True)
    ]
    has_texts: Counter[str] = Counter()
    checksums = None if index.checksums is None else index.checksums.reshape(-1).tolist()
    num_read = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for info, member in zip(tar, members, strict=False):
                if (info.name, info.offset_data, info.size) != member:
                    return [*problems, f"{path.name}: {info.name} is not at the offset in the index"]
                content = tar.extractfile(info)
                if content is None:
                    return [*problems, f"{path.name}: {info.name} is not a file"]
                data = content.read()
                if checksums is not None and crc32c(data) != checksums[num_read]:
                    problems.append(f"{path.name}: {info.name}: its CRC-32C differs from the index")
                sizes = index.text_bytes_of(num_read // len(member_names)) if info.name.endswith(TEXTS) else None
                if reason := _content_problem(info.name, data, sizes):
                    problems.append(f"{path.name}: {info.name}: {reason}")
                has_texts.update(list(sizes or ()))
                num_read += 1
            if num_read == len(members) and tar.next() is not None:
                problems.append(f"{path.name}: has more members than the index")
    except (tarfile.TarError, OSError) as error:
        if reason := stand_ins.of_file(path):
            return [f"{path.name} {reason}"]
        return [*problems, f"{path.name}: cannot be read: {error}"]
    if num_read != len(members):
        problems.append(f"{path.name}: has {num_read} members, but its index has {len(members)}")
    elif has_texts != Counter(shard.get("texts", {})):
        problems.append(f"{path.name}: the numbers of its texts differ from dataset.json")
    return problems


def _content_problem(name: str, data: bytes, text_bytes: dict[str, list[int]] | None) -> str | None:
    """Say what is wrong with a member. text_bytes: the sizes of its texts in the index, if it holds texts."""
    from PIL import Image

    try:
        if name.endswith(".jpg"):
            decode_as_loaders(data)  # the decoder of the loaders, which refuses a missing end
            with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
                return None if image.mode == "RGB" else f"mode {image.mode}, not RGB"
        if name.endswith(".txt"):
            return None if data.decode().strip() else "empty caption"
        if text_bytes is not None:
            texts = {kind: [len(text.encode()) for text in each] for kind, each in json.loads(data).items()}
            return None if texts == text_bytes else "its texts differ from the index"
        return None if isinstance(json.loads(data), dict) else "not a JSON object"
    except (OSError, ValueError, SyntaxError, AttributeError, TypeError, Image.DecompressionBombError) as error:
        return f"cannot be decoded: {error}"


def _verify_manifest(path: Path, rows: list[tuple[str, str, str, int]]) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, columns=["key", "split", "shard", "position"])
    except (OSError, pa.ArrowException) as error:
        if reason := stand_ins.of_file(path):
            return [f"{path.name} {reason}"]
        return [f"{path.name}: cannot be read: {first_line(error)}"]
    manifest_rows = sorted(zip(*(column.to_pylist() for column in table.columns), strict=True))
    return [] if manifest_rows == sorted(rows) else [f"{path.name}: its rows differ from the shards"]


def add_checksums(root: Path | str) -> bool:
    """Write checksums into the index files of a dataset that an earlier release wrote.

    The tar files and the fingerprint stay the same. If this is interrupted, call it again.

    Returns:
        Whether the dataset had no checksums.

    Raises:
        UserError: the dataset is missing, or a shard or index is damaged.
    """
    root = Path(root)
    storage = LocalStorage(root, ReadConfig())
    description = read_description(storage)
    if "checksum" in description:
        return False
    for part in description["splits"].values():
        for shard in part["files"]:
            add_to_index(root, shard)
    write_text(root / "dataset.json", description_text({**description, "checksum": CHECKSUM}), sync=True)
    return True


def add_to_index(root: Path, shard: dict[str, Any]) -> None:
    """Write checksums into the index of one shard. shard: its entry in dataset.json. Raises UserError if it differs."""
    storage = LocalStorage(root, ReadConfig())
    path, name = root / f"{shard['name']}.tar", f"{shard['name']}.index.json"
    version = storage.json(name)["version"]
    _, index = read_index(storage, shard, False, version)
    if not path.is_file() or sha256_of_file(path) != shard["sha256"]:
        raise UserError(f"{path} is missing, or its SHA-256 differs from its index; copy it again")
    entries = storage.json(name)["samples"]
    for entry, offsets, sizes in zip(entries, index.offsets.tolist(), index.sizes.tolist(), strict=True):
        entry[CHECKSUM] = [
            crc32c(storage.read(path.name, offset, offset + size)) for offset, size in zip(offsets, sizes, strict=True)
        ]
    write_text(root / name, index_text(shard, entries, version), sync=True)

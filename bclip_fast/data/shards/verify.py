"""Re-read a dataset and list its problems."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from bclip_fast.data.storage import LocalFiles, ReadConfig
from bclip_fast.errors import UserError, first_line
from bclip_fast.io.hashing import sha256_of_file

from .format import MEMBERS, Index, fingerprint_of, read_description, read_index


def verify(root: Path | str) -> list[str]:
    """Re-read everything: hashes, every member of every tar, every image, index and manifest.

    Returns the problems found, one line each; empty when all is well. UserError when there is no
    dataset at all.
    """
    root = Path(root)
    files = LocalFiles(root, ReadConfig())
    description = read_description(files)
    problems: list[str] = []
    rows: list[tuple[str, str, str, int]] = []
    expected = {"dataset.json", "manifest.parquet"}
    everything = []
    for split, part in sorted(description["splits"].items()):
        everything += part["files"]
        if part["fingerprint"] != fingerprint_of(split, part["files"]):
            problems.append(f"dataset.json: the fingerprint of split {split} is wrong")
        if part["samples"] != sum(shard["samples"] for shard in part["files"]):
            problems.append(f"dataset.json: the number of samples of split {split} is wrong")
        for shard in part["files"]:
            expected |= {f"{shard['name']}.tar", f"{shard['name']}.index.json"}
            keys: list[str] = []
            try:
                keys, index = read_index(files, shard)
                problems += _verify_shard(root / f"{shard['name']}.tar", shard, keys, index)
            except UserError as error:
                problems.append(str(error))
            rows += [(key, split, shard["name"], place) for place, key in enumerate(keys)]
    if description["fingerprint"] != fingerprint_of("", everything):
        problems.append("dataset.json: the fingerprint is wrong")
    if len({row[0] for row in rows}) != len(rows):
        problems.append("keys are repeated")
    problems += _verify_manifest(root / "manifest.parquet", rows)
    strangers = {path.name for pattern in ("*.tar", "*.index.json") for path in root.glob(pattern)}
    problems += [f"{name}: not named in dataset.json" for name in sorted(strangers - expected)]
    return problems


def _verify_shard(path: Path, shard: dict[str, Any], keys: list[str], index: Index) -> list[str]:
    if not path.is_file():
        return [f"{path.name}: missing"]
    problems = []
    if sha256_of_file(path) != shard["sha256"]:
        problems.append(f"{path.name}: its SHA-256 is not that of dataset.json")
    wanted = [
        (f"{key}.{member}", int(offset), int(size))
        for key, offsets, sizes in zip(keys, index.offsets, index.sizes, strict=True)
        for member, offset, size in zip(MEMBERS, offsets, sizes, strict=True)
    ]
    found = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for info, place in zip(tar, wanted, strict=False):
                if (info.name, info.offset_data, info.size) != place:
                    return [*problems, f"{path.name}: {info.name} is not where the index says"]
                content = tar.extractfile(info)
                if content is None:
                    return [*problems, f"{path.name}: {info.name} is not a file"]
                if reason := _content_problem(info.name, content.read()):
                    problems.append(f"{path.name}: {info.name}: {reason}")
                found += 1
            if found == len(wanted) and tar.next() is not None:
                problems.append(f"{path.name}: holds more than the index says")
    except (tarfile.TarError, OSError) as error:
        return [*problems, f"{path.name}: cannot be read: {error}"]
    if found != len(wanted):
        problems.append(f"{path.name}: {found} members, the index has {len(wanted)}")
    return problems


def _content_problem(name: str, data: bytes) -> str | None:
    from PIL import Image

    try:
        if name.endswith(".jpg"):
            with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
                image.load()
                return None if image.mode == "RGB" else f"mode {image.mode}, not RGB"
        if name.endswith(".txt"):
            return None if data.decode().strip() else "empty caption"
        return None if isinstance(json.loads(data), dict) else "not a JSON object"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return f"cannot be decoded: {error}"


def _verify_manifest(path: Path, rows: list[tuple[str, str, str, int]]) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, columns=["key", "split", "shard", "position"])
    except (OSError, pa.ArrowException) as error:
        return [f"{path.name}: cannot be read: {first_line(error)}"]
    found = sorted(zip(*(column.to_pylist() for column in table.columns), strict=True))
    return [] if found == sorted(rows) else [f"{path.name}: its rows are not those of the shards"]

"""Write the shards of a plan, and rejects.parquet."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from bclip_fast.data.shards.format import CHECKSUM, to_json
from bclip_fast.data.shards.manifest import ManifestRows
from bclip_fast.data.shards.writer import ShardFile
from bclip_fast.io.atomic import write_text

from . import executors
from .assign import Shard, key_of
from .parts import Reject, read_image, read_pair

_REJECTS_PER_ROW_GROUP = 65536


@dataclass(frozen=True)
class ShardTask:
    """The task to write a shard from the work folder, in a format version."""

    work: str
    shard: Shard
    version: int = 1


def write_shard(task: ShardTask) -> None:
    """Write a tar, its index, and its manifest rows. Write work/shards/NAME.json last: it marks them complete."""
    work, shard = Path(task.work), task.shard
    plan = np.load(work / "plan.npy", mmap_mode="r")
    # A process of a killed run may still be alive, so each process uses its own folder.
    with executors.scratch_folder(work / "shards") as scratch:
        rows = ManifestRows(scratch / f"{shard.name}.rows")
        tar = ShardFile(scratch, shard.split, shard.number, task.version)
        for record in plan[shard.start : shard.end]:
            pair = read_pair(work, record)
            meta = pair["meta"]
            extra: dict[str, Any] = {name: pair[name] for name in ("mentions", "licence_text") if name in pair}
            extra |= pair.get("facts", {})
            if record["original"] >= 0:
                extra["duplicate_of"] = key_of(work, plan[record["original"]])
                extra["duplicate"] = "near" if record["near"] else "exact"
            texts = pair.get("texts", {}) if task.version > 1 else None
            if texts:
                extra["texts"] = texts
            image = read_image(work, record, pair["crc"])
            row = tar.add(pair["key"], shard.split, pair["caption"], image, to_json(meta), texts)
            rows.add(row, meta, extra)
        description, types = tar.finish(), rows.close()
        for suffix, folder in ((".tar", work.parent), (".index.json", work.parent), (".rows", work / "shards")):
            (scratch / f"{shard.name}{suffix}").replace(folder / f"{shard.name}{suffix}")
        result = {"description": description, "types": types, "checksum": CHECKSUM}
        write_text(work / f"shards/{shard.name}.json", to_json(result))


def write_rejects(path: Path, rejects: Iterator[Reject]) -> Counter[str]:
    """Write the rejects as a table. Return the number of rejects of each kind."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds: Counter[str] = Counter()
    schema = pa.schema([(item.name, pa.string()) for item in dataclasses.fields(Reject)])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while chunk := list(islice(rejects, _REJECTS_PER_ROW_GROUP)):
            kinds.update(reject.reason.partition(":")[0] for reject in chunk)
            writer.write_table(pa.Table.from_pylist([dataclasses.asdict(reject) for reject in chunk], schema=schema))
    return kinds

"""Indexes of synthetic embeddings: time to build, size, memory, time of a query, and recall@10.

    python -m benchmarks.search_scale [--vectors 1000000] [--dim 512] [--index faiss_flat:int8 ...]

The vectors are unit rows around 1,000 centres, in parts as `bclip embed` writes them. Each index is built, written,
mapped and searched in a separate process, which has its own peak of memory. It prints a line of JSON for each.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from bclip_fast.io.system import peak_memory
from bclip_fast.search import index_files, stores
from bclip_fast.search.parts import Parts
from bclip_fast.search.recall import recall_at_10

INDEXES = (
    "faiss_flat:fp32", "faiss_flat:fp16", "faiss_flat:int8", "faiss_flat:ubinary", "ivfpq:ubinary", "ivf:int8",
)  # fmt: skip
_PART, _CENTRES, _SPREAD = 16384, 1000, 1.5


def main() -> None:
    """Write the parts, then measure each index."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--index", nargs="*", default=list(INDEXES), help="index:store, of bclip embed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        parts = Parts(Path(folder), "synthetic", args.vectors, _PART)
        start = time.perf_counter()
        parts.open()
        centres = torch.randn(_CENTRES, args.dim, generator=torch.Generator().manual_seed(0))
        for number in range(len(parts.ranges)):
            parts.write(number, _vectors(centres, len(parts.ranges[number]), number))
        print(json.dumps({"parts": len(parts.ranges), "seconds": round(time.perf_counter() - start, 1)}), flush=True)
        context = multiprocessing.get_context("spawn")
        for name in args.index:
            process = context.Process(target=_measure, args=(folder, name, args.vectors, args.dim))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"{name} ended with exit status {process.exitcode}")
        parts.close(delete=True)


def _vectors(centres: torch.Tensor, num: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1 + seed)
    chosen = torch.randint(len(centres), (num,), generator=generator)
    return F.normalize(centres[chosen] + _SPREAD * torch.randn(num, centres.shape[1], generator=generator), dim=1)


def _measure(folder: str, name: str, num: int, dim: int) -> None:
    kind: Any
    store: Any
    kind, store = name.split(":")
    parts = Parts(Path(folder), "synthetic", num, _PART)
    start = time.perf_counter()
    ranges = np.stack([np.full(dim, np.inf, np.float32), np.full(dim, -np.inf, np.float32)])
    for _, rows in parts.blocks():
        ranges[0], ranges[1] = np.minimum(ranges[0], rows.min(0)), np.maximum(ranges[1], rows.max(0))
    chosen = index_files.spread(num, stores.num_training_rows(kind, num))
    index = stores.new_index(kind, store, num, index_files.rows_of(parts, chosen, dim), ranges)
    trained = time.perf_counter()
    for _, rows in parts.blocks():
        stores.add(index, rows)
    path = Path(folder) / f"{kind}-{store}.faiss"
    with path.open("wb") as file:
        stores.write(index, file)
    built, peak = time.perf_counter(), peak_memory()
    del index
    mapped = stores.read(path)
    own = index_files.spread(num, 200)
    queries = index_files.rows_of(parts, own, dim)
    stores.search(mapped, queries[:1], 10)  # maps the pages
    times = []
    for query in queries[:50]:
        before = time.perf_counter()
        stores.search(mapped, query[None], 10)
        times.append(time.perf_counter() - before)
    result = {
        "index": kind, "store": store, "vectors": num, "dim": dim, "train_s": round(trained - start, 1),
        "add_s": round(built - trained, 1), "file_MB": round(path.stat().st_size / 1e6, 1),
        "peak_memory_MB": round(peak / 1e6), "query_ms": round(1e3 * float(np.median(times)), 2),
        "recall_at_10": round(recall_at_10(mapped, queries, (rows for _, rows in parts.blocks()), own), 4),
    }  # fmt: skip
    path.unlink()
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()

"""`bclip embed --plan N`: disk space, memory and time of indexes of N images, before any is made."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from bclip_fast.eval.datasets import EvalDataset
from bclip_fast.eval.datasets.subset import SubsetDataset
from bclip_fast.eval.embed import Embedder

from . import stores

if TYPE_CHECKING:
    from .index import EmbedConfig

ROWS: tuple[tuple[stores.Kind, stores.Store], ...] = (
    ("faiss_flat", "fp32"), ("faiss_flat", "fp16"), ("faiss_flat", "int8"), ("faiss_flat", "ubinary"),
    ("hnsw", "fp32"), ("ivf", "int8"), ("ivfpq", "ubinary"),
)  # fmt: skip
"""The indexes that the plan compares."""
_NUM_SAMPLES = 200


class Sizes(NamedTuple):
    """Bytes of an index of a number of images.

    index_file, table_file: index.faiss and embeddings.parquet. parts: parts on disk until the index is written.
    building: memory of rank 0 while it writes the index. serving: memory that `bclip serve` must hold. The pages of
    index.faiss come in addition, as far as the memory allows.
    """

    index_file: float
    table_file: float
    parts: float
    building: float
    serving: float


def sizes(kind: stores.Kind, store: stores.Store, num: int, dim: int, text_bytes: float, part_size: int) -> Sizes:
    """Return the sizes of an index. text_bytes: bytes of key, caption and licence fields of an image."""
    lists = stores.num_lists(num) * dim * 4 if kind in ("ivf", "ivfpq") else 0
    index = num * stores.bytes_per_row(kind, store, dim) + lists
    texts = num * (text_bytes + 8)
    building = index + texts + 4 * dim * (stores.num_training_rows(kind, num) + 2 * part_size)
    return Sizes(index, num * dim * stores.BITS[store] / 8 + texts, 4 * dim * num, building, texts)


def print_plan(config: EmbedConfig) -> None:
    """Print the plan of `bclip embed`. It embeds up to two batches of the data to measure the rate.

    Raises:
        UserError: the model or the data cannot be read.
    """
    from rich.console import Console
    from rich.table import Table

    from .index import build_embedder, open_images

    data = open_images(config.data, config.split)
    num = config.plan or len(data)
    embedder = build_embedder(
        config.model, config, config.batch_size, num_workers=config.num_workers,
        image_conversion=config.image_conversion, on_bad_image=config.on_bad_image,
    )  # fmt: skip
    rate, dim = _rate(embedder, data)
    text_bytes = _text_bytes(data)
    table = Table("index", "store", "index.faiss", "embeddings.parquet", "memory to write", "memory to serve")
    for kind, store in ROWS:
        if store == "ubinary" and dim % 8:
            continue
        size = sizes(kind, store, num, dim, text_bytes, config.part_size)
        shown = (size.index_file, size.table_file, size.building, size.serving)
        table.add_row(kind, store, *(f"{number / 1e9:.3g} GB" for number in shown))
    console = Console()
    console.print(
        f"{num:,} images, {dim} dimensions, about {text_bytes:.0f} bytes of text per image\n"
        f"embedding: {num / rate / 3600:.3g} hours at {rate:.3g} images/s, measured here on one rank\n"
        f"parts: {-(-num // config.part_size):,} of {config.part_size} images, {4e-9 * dim * num:.3g} GB of disk until "
        "the index is written",
        highlight=False,
    )
    console.print(table)
    console.print(
        "Serving maps index.faiss: a query of faiss_flat reads all of it, so it should fit into memory too.",
        highlight=False,
    )


def _rate(embedder: Embedder, data: EvalDataset) -> tuple[float, int]:
    """Return images per second of the second batch, and the dimension. The first batch warms up."""
    size = min(embedder.batch_size, max(1, len(data) // 2))
    embedder.uncached_images(SubsetDataset(data, range(size)))
    second = SubsetDataset(data, range(min(size, len(data) - 1), min(2 * size, len(data))))
    start = time.perf_counter()
    rows = embedder.uncached_images(second).cpu()
    return len(second) / (time.perf_counter() - start), rows.shape[1]


def _text_bytes(data: EvalDataset) -> float:
    """Return the mean bytes of an image's texts, from evenly spaced samples."""
    from .index_files import FIELDS

    step = max(1, len(data) // _NUM_SAMPLES)
    sample = SubsetDataset(data, range(0, len(data), step))
    texts = [sample.key(i) for i in range(len(sample))] + (sample.captions() or [])
    for field in FIELDS:
        texts += [text or "" for text in (sample.labels(field) if field in data.label_kinds else [])]
    return sum(len(text.encode(errors="replace")) + 4 for text in texts) / len(sample)

"""Stored forms of embeddings: codes, scores against brute force, mapped files, and the recall that the log prints."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from clusters import vectors
from colours import COLOURS, jitter, jpeg

from bclip_fast.errors import UserError
from bclip_fast.search import embed_plan, stores
from bclip_fast.search.index import EmbedConfig, embed
from bclip_fast.search.index_files import INDEX, METADATA, ROWS
from bclip_fast.search.recall import recall_at_10
from bclip_fast.search.searcher import OpenConfig, Searcher


def ranges_of(rows: np.ndarray) -> np.ndarray:
    return np.stack([rows.min(0), rows.max(0)])


def filled(kind: stores.Kind, store: stores.Store, rows: np.ndarray) -> Any:
    sample = rows[: stores.num_training_rows(kind, len(rows))]
    index = stores.new_index(kind, store, len(rows), sample, ranges_of(rows))
    stores.add(index, rows)
    return index


def decoded(store: stores.Store, rows: np.ndarray) -> np.ndarray:
    """Return the vectors that the codes stand for."""
    ranges, codes = ranges_of(rows), stores.encode(rows, store, ranges_of(rows))
    if store == "int8":
        return (codes.astype(np.float32) + 128.5) / 255 * (ranges[1] - ranges[0]) + ranges[0]
    if store == "ubinary":
        return (np.unpackbits(codes, axis=1).astype(np.float32) * 2 - 1) / rows.shape[1] ** 0.5
    return codes.astype(np.float32)


@pytest.mark.parametrize("store", ["fp32", "fp16", "int8", "ubinary"])
def test_flat_index_of_each_store_scores_the_decoded_vectors(store: stores.Store) -> None:
    rows, queries = vectors(300, 64), vectors(5, 64, seed=1)
    index = filled("faiss_flat", store, rows)
    scores, found = stores.search(index, queries, 10)
    exact = queries @ decoded(store, rows).T
    np.testing.assert_allclose(scores, np.take_along_axis(exact, found, 1), atol=2e-4)
    assert (np.diff(scores, axis=1) <= 1e-6).all()
    if store != "ubinary":  # which scores only the candidates of Hamming distance
        np.testing.assert_allclose(scores, -np.sort(-exact, axis=1)[:, :10], atol=2e-4)


def test_codes_are_those_of_sentence_transformers_and_of_faiss() -> None:
    rows = vectors(500, 64)
    ranges = ranges_of(rows)
    codes = stores.encode(rows, "int8", ranges)
    # quantize_embeddings(precision="int8"), version 5.
    theirs = ((rows - ranges[0]) / ((ranges[1] - ranges[0]) / 255) - 128).astype(np.int8)
    difference = theirs.astype(int) - codes
    assert set(np.unique(difference)) <= {-1, 0, 1}
    assert (difference < 0).mean() < 0.01, "their division rounds a few values below the step"
    assert codes.min() == -128 and codes.max() == 127
    index = filled("faiss_flat", "int8", rows)
    held = faiss.vector_to_array(index.codes).reshape(500, 64)
    np.testing.assert_array_equal(held, (codes.astype(np.int16) + 128).astype(np.uint8))
    # quantize_embeddings(precision="ubinary").
    np.testing.assert_array_equal(stores.encode(rows, "ubinary", ranges), np.packbits(rows > 0, axis=1))


def test_int8_codes_of_values_outside_the_ranges_are_the_ends() -> None:
    codes = stores.encode(
        np.array([[-9.0, 9.0, 0.5]], np.float32), "int8", np.array([[0, 0, 0.5], [1, 1, 0.5]], np.float32)
    )
    assert codes.tolist() == [[-128, 127, -128]]


@pytest.mark.parametrize(
    ("kind", "store", "least"),
    [
        ("faiss_flat", "fp32", 1.0), ("faiss_flat", "fp16", 0.99), ("faiss_flat", "int8", 0.95),
        ("faiss_flat", "ubinary", 0.2), ("hnsw", "fp16", 0.95), ("ivf", "int8", 0.95), ("ivfpq", "fp32", 0.3),
    ],
)  # fmt: skip
def test_recall_of_each_index_equals_brute_force(kind: stores.Kind, store: stores.Store, least: float) -> None:
    rows = vectors(3000, 64)
    index, chosen = filled(kind, store, rows), np.arange(0, 3000, 60)
    recall = recall_at_10(index, rows[chosen], np.split(rows, [700, 701, 2000]), chosen)
    similarity = rows[chosen] @ rows.T
    similarity[np.arange(50), chosen] = -2
    exact = np.argsort(-similarity, axis=1)[:, :10]
    found = stores.search(index, rows[chosen], 11)[1]
    names = [[row for row in line if row != own][:10] for line, own in zip(found.tolist(), chosen, strict=True)]
    expected = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(names, exact.tolist(), strict=True)])
    assert recall == pytest.approx(expected, abs=0.003)
    assert least <= recall <= 1


def test_recall_counts_equal_images_and_few_images() -> None:
    rows = np.repeat(vectors(3, 8), 12, axis=0)
    assert recall_at_10(filled("faiss_flat", "fp32", rows), rows, [rows], np.arange(36)) == 1
    assert recall_at_10(filled("faiss_flat", "fp32", -rows), rows, [rows]) == 0
    assert recall_at_10(filled("faiss_flat", "fp32", rows[:2]), rows[:2], [rows[:2]], np.arange(2)) == 1


@pytest.mark.parametrize(("kind", "store"), [("faiss_flat", "fp32"), ("faiss_flat", "ubinary"), ("ivfpq", "ubinary")])
def test_stored_index_is_mapped_and_gives_the_same_hits(kind: stores.Kind, store: stores.Store, tmp_path: Path) -> None:
    rows = vectors(1000, 64)
    index = filled(kind, store, rows)
    with (tmp_path / INDEX).open("wb") as file:
        stores.write(index, file)
    mapped = stores.read(tmp_path / INDEX)
    for ours, theirs in zip(stores.search(mapped, rows[:9], 7), stores.search(index, rows[:9], 7), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    if sys.platform == "linux" and hasattr(faiss, "IO_FLAG_MMAP_IFC"):
        assert str(tmp_path / INDEX) in Path("/proc/self/maps").read_text()
    size = stores.bytes_per_row(kind, store, 64) * 1000
    assert size <= (tmp_path / INDEX).stat().st_size < size + 200_000


@pytest.mark.parametrize(("kind", "store"), [row for row in embed_plan.ROWS if row[0] != "hnsw"])
def test_planned_sizes_are_those_of_the_written_index(kind: stores.Kind, store: stores.Store, tmp_path: Path) -> None:
    rows = vectors(3000, 64)
    with (tmp_path / INDEX).open("wb") as file:
        stores.write(filled(kind, store, rows), file)
    planned = embed_plan.sizes(kind, store, 3000, 64, 0, 2048)
    codebooks = 4 * 256 * 64 if kind == "ivfpq" else 0
    assert planned.index_file + codebooks == pytest.approx((tmp_path / INDEX).stat().st_size, rel=0.03)
    assert planned.table_file == stores.encode(rows, store, ranges_of(rows)).nbytes + 8 * 3000


@pytest.mark.parametrize(
    ("kind", "store", "num", "dim", "message"),
    [
        ("faiss_flat", "ubinary", 9, 3, "packs 8 dimensions into a byte, but the model has 3; use --store int8"),
        ("hnsw", "ubinary", 9, 8, "index hnsw does not hold ubinary embeddings; use --index faiss_flat"),
        ("ivfpq", "fp32", 255, 8, "needs at least 256 images, the data have 255; use --index faiss_flat"),
    ],
)
def test_index_that_the_data_cannot_have_raises(
    kind: stores.Kind, store: stores.Store, num: int, dim: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        stores.check(kind, store, num, dim)


class _EightDimensions(torch.nn.Module):
    """Embeds images and texts by their means, in 8 dimensions of both signs."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = torch.nn.Parameter(torch.tensor(1.0))
        self.register_buffer("mixing", torch.randn(3, 8, generator=torch.Generator().manual_seed(0)))

    def encode_image(self, image: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        return F.normalize((image.mean((2, 3)) - 0.3) @ self.mixing, dim=1)

    def encode_text(self, text: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        return F.normalize((text[:, :3].float() / 255 - 0.3) @ self.mixing, dim=1)


@pytest.mark.parametrize(
    ("kind", "store", "dtype", "width"),
    [
        ("faiss_flat", "fp16", "float16", 8), ("faiss_flat", "int8", "int8", 8), ("faiss_flat", "ubinary", "uint8", 1),
        ("ivfpq", "fp32", "float32", 8),
    ],
)  # fmt: skip
def test_embed_in_each_store_finds_images_and_logs_the_recall(
    kind: stores.Kind, store: stores.Store, dtype: str, width: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from colours import preprocess, tokenizer, write_shards

    num = 300 if kind == "ivfpq" else 40
    shards = write_shards(tmp_path / "shards", num, lambda i, name: f"a {name} square", lambda i, name: {})
    model = _EightDimensions(), preprocess, tokenizer
    config = EmbedConfig(
        model="m", data=str(shards), out=str(tmp_path / "i"), index=kind, store=store, part_size=32, progress=False
    )
    with caplog.at_level("INFO"):
        out = embed(config, model)
    assert "recall@10 against exact search in fp32" in caplog.text
    table = pq.read_table(out / ROWS)
    codes = np.stack(table["embedding"].to_numpy())
    assert (str(codes.dtype), codes.shape) == (dtype, (num, width))
    metadata = json.loads(table.schema.metadata[METADATA])
    assert set(metadata["recall_at_10"]) == {"images", "captions"}
    assert all(0 < recall <= 1 for recall in metadata["recall_at_10"].values())
    searcher = Searcher(OpenConfig(folder=str(out)), model)
    hits = searcher.image(jpeg(jitter(COLOURS["red"], 0)), 5)
    assert "red" in (hits[0].caption or "")
    assert "blue" in (searcher.image(jpeg(COLOURS["blue"]), 5)[0].caption or "")

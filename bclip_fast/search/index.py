"""`bclip embed`: write an index of images, for queries in words or by an image.

    bclip embed RUN --data shards/ --split train --out indexes/train
    bclip search indexes/train "pleural effusion" -k 10 --gallery hits.html

An index is a folder with two files. index.faiss holds the embeddings for faiss. embeddings.parquet has one row per
image: its embedding and key, and the caption, licence and article if the data have them. Its metadata describe the
model and the data. They also hold the SHA-256 of index.faiss, so that files of two indexes cannot be mixed.

faiss does not check its files. Trust an index from another person as much as a program from that person.
"""

from __future__ import annotations

import io
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from bclip_fast.data.image_files import ImageConversion
from bclip_fast.data.shards.tar_paths import has_tar_files, is_tar_path
from bclip_fast.data.sources import Source, Sources, absolute, as_sources, refuse_weights
from bclip_fast.errors import UserError, first_line
from bclip_fast.eval.datasets import EvalDataset, open_dataset
from bclip_fast.eval.datasets.pairs import PairDataset
from bclip_fast.eval.datasets.subset import SubsetDataset
from bclip_fast.eval.embed import Embedder, OnBadImage, Precision, log_skipped
from bclip_fast.eval.embedding_key import PROBE_TEXT
from bclip_fast.eval.faiss_index import build_index
from bclip_fast.hardware import pick_device
from bclip_fast.io.atomic import replacing_files
from bclip_fast.io.hashing import sha256_of_file
from bclip_fast.pretrained.any_model import Model, load_model

log = logging.getLogger(__name__)

ROWS, INDEX = "embeddings.parquet", "index.faiss"
FIELDS = ("licence", "licence_url", "pmcid", "doi", "title", "citation")
METADATA = b"bclip_fast"
"""Key of our JSON in the metadata of `ROWS`."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Device and number format of a model."""

    device: str = "auto"
    """Device of the model. auto: a CUDA GPU if there is one, else the CPU."""
    precision: Precision = "fp32"
    """Number format of the towers. auto: bf16 if the device multiplies it in hardware, else fp32."""


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(ModelSettings):
    """Embed the images of a folder or of shards into a searchable index."""

    model: tyro.conf.Positional[str]
    """A run folder, a folder in the layout of open_clip or transformers, hf-hub:ID, or
    open_clip:ARCHITECTURE/PRETRAINED."""
    data: Sources
    """Shards, a .csv, a folder of images with .txt files, or any folder of images."""
    split: str = "val"
    """Split of the shards, or of a .csv with a split column."""
    out: str = "runs/index"
    """Folder of the index. An existing index is replaced."""
    index: Literal["faiss_flat", "hnsw", "ivf"] = "faiss_flat"
    """faiss_flat is exact. hnsw and ivf are approximate, and faster from about 100,000 images on."""
    batch_size: int = 64
    """Images per batch of the image tower."""
    num_workers: int = 2
    """Threads that decode and resize images."""
    image_conversion: ImageConversion = "standard"
    """How image files become pixels. standard: the rules of docs/images.md. open_clip: as open_clip does."""
    on_bad_image: OnBadImage = "skip"
    """What follows when an image cannot be decoded. skip: the index leaves it out, and the log names it. stop: an
    error that names it."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", as_sources(self.data, "data"))
        refuse_weights(self.data, "bclip embed")


def embed(config: EmbedConfig, model: Model | None = None) -> Path:
    """Write an index and return its folder.

    All embeddings are in memory together: N x D float32, 1.5 GB for 726,000 images with D = 512. faiss needs the same
    amount again.

    Args:
        model: replaces the model that `config` names.

    Raises:
        UserError: missing data, a damaged image, an embedding with NaN, or a folder that cannot be written.
    """
    import faiss
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = open_images(config.data, config.split)
    embedder = build_embedder(
        model or config.model,
        config,
        config.batch_size,
        num_workers=config.num_workers,
        progress=config.progress,
        image_conversion=config.image_conversion,
        on_bad_image=config.on_bad_image,
    )
    total = len(data)
    rows = embedder.uncached_images(data).cpu()
    data, reasons = embedder.readable(data, rows)
    kept = data.rows if isinstance(data, SubsetDataset) else list(range(total))
    rows = rows[kept]
    out = Path(config.out)
    metadata: dict[str, Any] = {
        "model": str(Path(config.model).resolve()) if Path(config.model).exists() else config.model,
        "data": absolute(config.data),
        "split": config.split,
        "index": config.index,
        "precision": embedder.precision,
        "device": embedder.device.type,
        "image_conversion": embedder.image_conversion,
        "num_images": total,
    }
    probe = {"probe": embed_probe(embedder).tolist()}
    num, dim = rows.shape
    columns: dict[str, Any] = {"key": pa.array([data.key(i) for i in range(num)]), "row": pa.array(kept, pa.int64())}
    unknown: list[str | None] = [None] * num
    columns["caption"] = pa.array(data.captions() or unknown, pa.string())
    for field in FIELDS:
        columns[field] = pa.array(data.labels(field) if field in data.label_kinds else unknown, pa.string())
    columns["embedding"] = pa.FixedSizeListArray.from_arrays(pa.array(rows.numpy().ravel()), dim)
    try:
        with replacing_files(out) as partial:
            # faiss ignores a disk that becomes full when it closes a file, so Python's file takes its bytes.
            with (partial / INDEX).open("wb") as file:
                faiss.write_index(build_index(rows, config.index), faiss.PyCallbackIOWriter(file.write))  # type: ignore[attr-defined]
            metadata |= {"sha256": sha256_of_file(partial / INDEX)} | probe
            table = pa.table(columns).replace_schema_metadata({METADATA: json.dumps(metadata)})
            pq.write_table(table, partial / ROWS)
    except OSError as error:
        raise UserError(f"the index {out} cannot be written: {error.strerror or first_line(error)}") from error
    log_skipped(reasons, total - num, total)
    log.info("%d images in %s", num, out)
    return out


def run_embed(config: EmbedConfig) -> None:
    """Run the command."""
    embed(config)


def open_images(path: str | tuple[Source, ...], split: str) -> EvalDataset:
    """Open data as `bclip embed` does: any folder of images will do, even without captions and labels."""
    if isinstance(path, tuple):
        return open_dataset(path, split)
    folder = Path(path)
    is_shards = is_tar_path(path) or (folder / "dataset.json").is_file() or has_tar_files(folder)
    is_plain = "://" not in path and folder.is_dir() and not is_shards
    return open_dataset(path, split, "pictures" if is_plain and not PairDataset.matches(folder) else "auto")


def build_embedder(model: Model, settings: ModelSettings, batch_size: int, **options: Any) -> Embedder:
    """Load the model if it is a name, and build its embedder. `options` go to `Embedder`."""
    device = pick_device(settings.device)
    network, preprocess, tokenizer = load_model(model, device) if isinstance(model, str) else model
    options |= {"precision": settings.precision, "batch_size": batch_size}
    return Embedder(network.to(device), preprocess, tokenizer, device=device, **options)


def embed_probe(embedder: Embedder) -> Tensor:
    """Embed fixed texts and images, (8, D) float32, to recognise the model later.

    They take different ways through the code. Among them are a text beyond the context length, a Chinese text, and
    images of 16 bits, of a palette, of 1 bit and of a narrow shape. Earlier indexes have the first two rows.
    """
    from PIL import Image

    # Reddish patches instead of noise, which a resize makes grey, so that the channel order and the crop matter.
    patches = np.random.default_rng(0).integers(0, 256, (6, 8, 3)) * (1.0, 0.7, 0.4)
    pixels = patches.astype(np.uint8).repeat(40, 0).repeat(40, 1)
    image = Image.fromarray(pixels)
    deep = Image.fromarray(pixels[..., 0].astype(np.uint16) * 200)
    images = [image, deep, image.quantize(16), image.convert("1"), image.crop((0, 0, 20, 240))]
    texts = embedder.texts([PROBE_TEXT, PROBE_TEXT * 100, "\u80ba\u90e8 X\u5149\u7247"])
    rows = []
    for probe in images:
        probe.save(buffer := io.BytesIO(), "PNG")
        rows.append(embedder.image(buffer.getvalue(), "probe"))
    return torch.cat([texts[:1], rows[0], texts[1:], *rows[1:]]).cpu()

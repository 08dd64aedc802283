"""`bclip embed`: write an index of images, for queries in words or by an image.

    bclip embed RUN --data shards/ --split train --out indexes/train
    bclip search indexes/train "pleural effusion" -k 10 --gallery hits.html

An index is a folder with two files. index.faiss holds the embeddings for faiss (`stores`). embeddings.parquet has one
row per image: its embedding and key, and the caption, licence and article if the data have them. Its metadata describe
the model and the data. They also hold the SHA-256 of index.faiss, so that files of two indexes cannot be mixed.

faiss does not check its files. Trust an index from another person as much as a program from that person.
"""

from __future__ import annotations

import atexit
import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor

from bclip_fast import distributed
from bclip_fast.data.image_files import ImageConversion
from bclip_fast.data.shards.tar_paths import has_tar_files, is_tar_path
from bclip_fast.data.sources import Source, Sources, absolute, as_sources, refuse_weights
from bclip_fast.errors import UserError, first_line
from bclip_fast.eval.datasets import EvalDataset, open_dataset
from bclip_fast.eval.datasets.pairs import PairDataset
from bclip_fast.eval.datasets.subset import SubsetDataset
from bclip_fast.eval.embed import Embedder, OnBadImage, Precision
from bclip_fast.eval.embedding_key import PROBE_TEXT
from bclip_fast.hardware import pick_device
from bclip_fast.io.hashing import sha256
from bclip_fast.io.progress import track
from bclip_fast.pretrained.any_model import Model, load_model

from . import stores
from .index_files import write_index
from .parts import Parts


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
    index: stores.Kind = "faiss_flat"
    """faiss_flat compares all images. hnsw, ivf and ivfpq are approximate, and faster from about 100,000 images on.
    ivfpq searches codes with a byte for 8 dimensions, for each store."""
    store: stores.Store = "fp32"
    """Number format of the stored embeddings. int8 and ubinary, as in sentence-transformers, take a quarter and 1/32 of
    fp32's space. The log gives their recall."""
    part_size: int = 2048
    """Images per part. A killed command repeats at most one part per rank."""
    plan: int | None = None
    """Print disk space, memory and time for this number of images, and embed none. 0: the number in the data."""
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
        if self.part_size < 1 or (self.plan or 0) < 0:
            raise UserError(f"part_size={self.part_size} must be at least 1, and plan={self.plan} at least 0")


def embed(config: EmbedConfig, model: Model | None = None) -> Path:
    """Write an index and return its folder. All ranks of a process group share the work.

    Embeddings go to disk in parts of `part_size` images. The same command after a kill goes on from the complete parts
    and writes the same bytes, on any number of ranks. The memory holds the index (`stores.bytes_per_row`), one part,
    the training rows, and the captions.

    Args:
        model: replaces the model that `config` names.

    Raises:
        UserError: missing data, a damaged image, an embedding with NaN, or a folder that cannot be written. Or the data
            cannot have such an index, or the ranks have different models or packages.
    """
    data = open_images(config.data, config.split)
    embedder = build_embedder(
        model or config.model,
        config,
        config.batch_size,
        num_workers=config.num_workers,
        image_conversion=config.image_conversion,
        on_bad_image=config.on_bad_image,
    )
    out = Path(config.out)
    probe = embed_probe(embedder)
    stores.check(config.index, config.store, len(data), probe.shape[1])
    parts = Parts(out, _identity(embedder, data, config), len(data), config.part_size)
    with _writing(out):
        is_complete = False
        try:
            missing = distributed.run_on_rank0(parts.open)
            _embed_parts(embedder, data, parts, missing, config.progress)
            distributed.barrier()
            if distributed.is_main():
                metadata = {
                    "model": str(Path(config.model).resolve()) if Path(config.model).exists() else config.model,
                    "data": absolute(config.data),
                    "split": config.split,
                    "precision": embedder.precision,
                    "device": embedder.device.type,
                    "image_conversion": embedder.image_conversion,
                    "probe": probe.tolist(),
                }
                write_index(out, config.index, config.store, embedder, data, parts, metadata)
            is_complete = True
        finally:
            if distributed.is_main():
                parts.close(delete=is_complete)
        distributed.barrier()
    return out


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"the index {out} cannot be written: {error.strerror or first_line(error)}") from error


def _identity(embedder: Embedder, data: EvalDataset, config: EmbedConfig) -> str:
    """Return the hash of all that decides the parts. Raises UserError if the ranks' hashes differ."""
    fingerprint = distributed.run_on_rank0(lambda: _fingerprint(data))
    settings = str(len(data)), str(config.part_size), config.on_bad_image
    identity = sha256(chr(0).join([*embedder.image_key(fingerprint), *settings]))
    identities = distributed.all_gather_object(identity)
    if others := [str(rank) for rank, other in enumerate(identities) if other != identities[0]]:
        raise UserError(
            f"ranks {', '.join(others)} have another model, other data, packages or instruction sets than rank 0; "
            "start all ranks with the same files and packages, on processors of one kind"
        )
    return identity


def _fingerprint(data: EvalDataset) -> str:
    """Return the hash of the data. An image file that cannot be read counts by its name."""
    try:
        return data.fingerprint
    except UserError:
        contents = []
        for i in range(len(data)):
            try:
                contents.append(f"{data.key(i)}\0{sha256(data.image(i))}\n")
            except UserError:
                contents.append(f"{data.key(i)}\n")
        return sha256("".join(contents))


def _embed_parts(embedder: Embedder, data: EvalDataset, parts: Parts, missing: list[int], progress: bool) -> None:
    """Embed the missing parts of this rank. The progress bar of rank 0 counts the images of all ranks."""
    total = sum(len(parts.ranges[number]) for number in missing)
    done = 0
    with track("embed images", total, show=progress and distributed.is_main() and total > embedder.batch_size) as bar:

        def advance(num: int = 1, what: str | None = None) -> None:
            nonlocal done
            done += num
            bar(num)

        for turn in distributed.turns(len(missing)):
            # Other ranks took the parts before this one.
            advance(max(0, sum(len(parts.ranges[number]) for number in missing[:turn]) - done))
            images = parts.ranges[missing[turn]]
            parts.write(missing[turn], embedder.uncached_images(SubsetDataset(data, images), advance=advance))


def run_embed(config: EmbedConfig) -> None:
    """Run the command, on all ranks if torchrun or srun started it."""
    if config.plan is not None:
        from .embed_plan import print_plan

        print_plan(config)
        return
    distributed.init()
    atexit.register(distributed.shutdown)
    with distributed.explain_lost_ranks("The same command goes on from the complete parts"):
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

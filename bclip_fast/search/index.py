"""`bclip embed` and `bclip search`: an index of pictures, asked in words or with a picture.

    bclip embed RUN --data shards/ --split train --out indexes/train
    bclip search indexes/train "pleural effusion" -k 10 --gallery hits.html

An index is a folder of two files. index.faiss holds the embeddings as faiss searches them; embeddings.parquet a row a
picture: key, caption, licence and article as far as the data tell, and the embedding. Its metadata say of which model
and data it is, and name the SHA-256 of the other, so that halves of two indexes are never taken for one.

faiss reads its files without suspicion: an index from a stranger deserves as much trust as a program of theirs.
"""

from __future__ import annotations

import functools
import json
import logging
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

import numpy as np
import torch
import tyro
from torch import Tensor

from bclip_fast.data.images import IMAGE_SUFFIXES
from bclip_fast.errors import UserError, first_line
from bclip_fast.eval import faiss_index
from bclip_fast.eval.datasets import EvalDataset, open_dataset
from bclip_fast.eval.datasets.pairs import PairDataset
from bclip_fast.eval.embed import Embedder, Precision
from bclip_fast.hardware import pick_device
from bclip_fast.html import page as html_page
from bclip_fast.io.atomic import replacing, write_text
from bclip_fast.io.hashing import sha256_of_file
from bclip_fast.pretrained.any_model import Model, load_model

log = logging.getLogger(__name__)

ROWS, INDEX = "embeddings.parquet", "index.faiss"
FIELDS = ("licence", "licence_url", "pmcid", "doi", "title", "citation")
MAX_HITS, MAX_QUERY = 200, 4000
_METADATA = b"bclip_fast"
_PROBE = "Chest X-ray, \u03b1-SMA \u00d7400; p<0.05 (A\u2013C)."
# How far a probe's cosine may be from 1: other machines round otherwise, and half precision rounds more.
_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2, "fp16": 1e-2}


@dataclass(frozen=True, kw_only=True)
class _Run:
    device: str = "auto"
    """auto takes CUDA where it is."""
    precision: Precision = "fp32"
    """Number format of the towers. auto: bf16 where the device multiplies it in hardware, else fp32."""


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(_Run):
    """Embeds the pictures of a folder or of shards into an index to search."""

    model: tyro.conf.Positional[str]
    """A run folder, a folder in open_clip's layout, hf-hub:ID, or open_clip:ARCHITECTURE/PRETRAINED."""
    data: str
    """Shards, a .csv, a folder of images beside .txt files, or any folder of images."""
    split: str = "val"
    """Split of shards, or of a .csv with such a column."""
    out: str = "runs/index"
    """Folder of the index; an index that is there is replaced."""
    index: Literal["faiss_flat", "hnsw", "ivf"] = "faiss_flat"
    """faiss_flat is exact; hnsw and ivf are approximate and faster from some 100,000 pictures on."""
    batch_size: int = 64
    num_workers: int = 2
    """Threads that decode and resize images."""
    progress: bool = True


@dataclass(frozen=True, kw_only=True)
class OpenConfig(_Run):
    """An index, and where its model and pictures lie if they were moved."""

    folder: tyro.conf.Positional[str]
    """A folder written by bclip embed."""
    model: str | None = None
    data: str | None = None


@dataclass(frozen=True, kw_only=True)
class SearchConfig(OpenConfig):
    """Finds the pictures of an index that are nearest to a text or a picture."""

    query: tyro.conf.Positional[str]
    """Words, or the path of a picture."""
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 10
    """Number of hits."""
    gallery: str | None = None
    """An HTML page to write, with the pictures in it."""


def embed(config: EmbedConfig, model: Model | None = None) -> Path:
    """Writes an index and returns its folder. `model`: in place of the one that `config` names.

    Holds all embeddings at once: N x D float32, 1.5 GB for 726,000 of D = 512, and as much again for faiss.

    Raises:
        UserError: data that aren't there, a broken picture, an embedding with NaN, a folder that can't be written.
    """
    import faiss
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = _open_data(config.data, config.split)
    embedder = _embedder(
        model or config.model, config, config.batch_size, num_workers=config.num_workers, progress=config.progress
    )
    rows = embedder.uncached_images(data).cpu()
    out = Path(config.out)
    try:
        with replacing(out / INDEX, shared=True) as partial:
            faiss.write_index(faiss_index.build(rows, config.index), str(partial))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{out} takes no index: {first_line(error)}") from error
    about = {
        "model": str(Path(config.model).resolve()) if Path(config.model).exists() else config.model,
        "data": config.data if "://" in config.data else str(Path(config.data).resolve()),
        "split": config.split,
        "index": config.index,
        "precision": embedder.precision,
        "sha256": sha256_of_file(out / INDEX),
        "probe": _probe(embedder).tolist(),
    }
    num, dim = rows.shape
    columns: dict[str, Any] = {"key": pa.array([data.key(i) for i in range(num)])}
    unknown: list[str | None] = [None] * num
    columns["caption"] = pa.array(data.captions() or unknown, pa.string())
    for field in FIELDS:
        columns[field] = pa.array(data.labels(field) if field in data.label_kinds else unknown, pa.string())
    columns["embedding"] = pa.FixedSizeListArray.from_arrays(pa.array(rows.numpy().ravel()), dim)
    table = pa.table(columns).replace_schema_metadata({_METADATA: json.dumps(about)})
    try:
        with replacing(out / ROWS, shared=True) as partial:
            pq.write_table(table, partial)
    except OSError as error:
        raise UserError(f"{out} takes no embeddings: {error}") from error
    log.info("%d pictures in %s", num, out)
    return out


def run_embed(config: EmbedConfig) -> None:
    """The command."""
    embed(config)


@dataclass(frozen=True)
class Hit:
    """score: cosine of picture and query; fields: all of `FIELDS`, empty where the data do not tell."""

    row: int
    score: float
    key: str
    caption: str | None
    fields: dict[str, str]

    @property
    def article(self) -> str | None:
        """The article's address, made of its number: what the data say is never a link by itself."""
        if re.fullmatch(r"PMC\d{1,12}", number := self.fields["pmcid"]):
            return f"https://pmc.ncbi.nlm.nih.gov/articles/{number}/"
        if re.fullmatch(r"10\.\d{4,9}/\S{1,300}", doi := self.fields["doi"]):
            return f"https://doi.org/{quote(doi, safe='/')}"
        return None

    @property
    def licence_url(self) -> str | None:
        """Of Creative Commons alone."""
        url = self.fields["licence_url"]
        return url if re.fullmatch(r"https?://creativecommons\.org/[\w./-]{1,100}", url) else None


class Searcher:
    """An index with its model, ready for queries from several threads.

    Args:
        config: the index's folder; where it names a model or data, in place of those that the index was made with.
        model: what `config.model` would be, loaded already.

    Raises:
        UserError: a folder that isn't an index or is damaged, a model that isn't the one it was made with.
    """

    def __init__(self, config: OpenConfig, model: Model | None = None) -> None:
        import faiss
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.folder = Path(config.folder)
        wrong = f"{self.folder} is not a whole index of bclip embed"
        try:
            schema = pq.read_schema(self.folder / ROWS)
            self.about: dict[str, Any] = json.loads((schema.metadata or {})[_METADATA])
            self._rows = pq.read_table(self.folder / ROWS, columns=["key", "caption", *FIELDS])
            if sha256_of_file(self.folder / INDEX) != self.about["sha256"]:
                raise UserError(f"{wrong}: {ROWS} was written with another {INDEX}; embed again")
            self._index = faiss.read_index(str(self.folder / INDEX))
            probe = torch.tensor(self.about["probe"])
        except (OSError, pa.ArrowException, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise UserError(f"{wrong} ({' '.join(str(error).split())[:200]})") from error
        if self._index.ntotal != self._rows.num_rows or probe.shape != (2, self._index.d):
            raise UserError(f"{wrong}: {self._index.ntotal} embeddings of {self._rows.num_rows} pictures; embed again")
        self._data_path = config.data or self.about["data"]
        self._lock = threading.Lock()
        self.embedder = _embedder(model or config.model or self.about["model"], config, 1)
        found = _probe(self.embedder)
        tolerance = max(_TOLERANCE[self.embedder.precision], _TOLERANCE.get(self.about["precision"], 0))
        if found.shape != probe.shape or float((found * probe).sum(1).min()) < 1 - tolerance:
            raise UserError(
                f"{self.folder} was made with another model than this: give the same --model or embed again"
            )

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def text(self, query: str, k: int = 10) -> list[Hit]:
        """The k pictures nearest to words, best first. Raises UserError: no words, or k not in 1 to `MAX_HITS`."""
        if not query.strip() or len(query) > MAX_QUERY:
            raise UserError(f"a query has 1 to {MAX_QUERY} characters, this one {len(query.strip())}")
        with self._lock:
            return self._nearest(self.embedder.texts([query]), k)

    def picture(self, content: bytes, k: int = 10, name: str = "query") -> list[Hit]:
        """The k pictures nearest to an encoded picture. Raises UserError: it can't be decoded; k as for `text`."""
        with self._lock:
            return self._nearest(self.embedder.picture(content, name), k)

    def _nearest(self, query: Tensor, k: int) -> list[Hit]:
        if not 1 <= k <= MAX_HITS:
            raise UserError(f"k is {k}: it must be 1 to {MAX_HITS}")
        vector = np.ascontiguousarray(query.cpu().float().numpy())
        scores, rows = self._index.search(vector, min(k, len(self)))
        # HNSW and IVF fill up with -1 where they find fewer.
        return [
            self._hit(row, score) for row, score in zip(rows[0].tolist(), scores[0].tolist(), strict=True) if row >= 0
        ]

    def _hit(self, row: int, score: float) -> Hit:
        record = self._rows.slice(row, 1).to_pylist()[0]
        return Hit(row, score, record["key"], record["caption"], {f: record[f] or "" for f in FIELDS})

    @functools.cached_property
    def _data(self) -> EvalDataset:
        data = _open_data(self._data_path, self.about["split"])
        if len(data) != len(self):
            raise UserError(f"{self._data_path} has {len(data)} pictures, {self.folder} {len(self)}: embed again")
        return data

    def thumbnail(self, hit: Hit) -> str:
        """A `data:` address of the hit's picture, decoded and encoded anew.

        Raises UserError: the data were moved or changed, or the picture can't be decoded.
        """
        with self._lock:
            data = self._data
        if data.key(hit.row) != hit.key:
            raise UserError(f"{self._data_path}: picture {hit.row} is {data.key(hit.row)}, not {hit.key}: embed again")
        return html_page.thumbnail(data.image(hit.row), lambda: hit.key)


def run(config: SearchConfig) -> None:
    """The command: prints the hits and writes the gallery."""
    path = Path(config.query)
    is_picture = path.suffix.lower() in IMAGE_SUFFIXES
    try:
        content = path.read_bytes() if is_picture else b""
    except OSError as error:
        raise UserError(f"picture {path} cannot be read: {error.strerror}") from error
    searcher = Searcher(config)
    hits = searcher.picture(content, config.k, str(path)) if is_picture else searcher.text(config.query, config.k)
    _print(hits)
    if config.gallery:
        write_text(Path(config.gallery), page(searcher, hits, query=config.query))
        log.info("gallery in %s", config.gallery)


def page(searcher: Searcher, hits: list[Hit], *, query: str = "", error: str = "", form: int = 0) -> str:
    """HTML with the hits. `form`: with forms that ask for so many hits; 0: without, for a file."""
    shown = [{"hit": hit, **_picture(searcher, hit)} for hit in hits]
    template = html_page.environment().get_template("search.html")
    return template.render(searcher=searcher, shown=shown, query=query, error=error, form=form, max_hits=MAX_HITS)


def _picture(searcher: Searcher, hit: Hit) -> dict[str, str | None]:
    try:
        return {"picture": searcher.thumbnail(hit), "problem": None}
    except UserError as error:  # one picture that is gone costs its place, which says so, not the page
        return {"picture": None, "problem": str(error)}


def _print(hits: list[Hit]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    table = Table("#", "cosine", Column("picture", overflow="fold"), "caption", "licence", "article")
    for i, hit in enumerate(hits, 1):
        caption = " ".join((hit.caption or "").split())
        cells = (hit.key, caption[:160], hit.fields["licence"], hit.article or "")
        table.add_row(str(i), f"{hit.score:.3f}", *map(escape, cells))
    Console().print(table)


def _open_data(path: str, split: str) -> EvalDataset:
    place = Path(path)
    plain = "://" not in path and place.is_dir() and not (place / "dataset.json").is_file()
    return open_dataset(path, split, "pictures" if plain and not PairDataset.is_one(place) else "auto")


def _embedder(model: Model, config: _Run, batch_size: int, **options: Any) -> Embedder:
    device = pick_device(config.device)
    loaded, preprocess, tokenizer = load_model(model, device) if isinstance(model, str) else model
    options |= {"precision": config.precision, "batch_size": batch_size}
    return Embedder(loaded.to(device), preprocess, tokenizer, device=device, **options)


def _probe(embedder: Embedder) -> Tensor:
    """(2, D) float32: what the model makes of one text and one picture, by which it is known again."""
    import io

    from PIL import Image

    # Reddish patches and not noise, which a resize makes grey: the order of channels and the crop show.
    patches = np.random.default_rng(0).integers(0, 256, (6, 8, 3)) * (1.0, 0.7, 0.4)
    Image.fromarray(patches.astype(np.uint8).repeat(40, 0).repeat(40, 1)).save(buffer := io.BytesIO(), "PNG")
    return torch.cat([embedder.texts([_PROBE]), embedder.picture(buffer.getvalue(), "probe")]).cpu()

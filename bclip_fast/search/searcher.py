"""`bclip search`: find the images of an index that are nearest to a text or an image."""

from __future__ import annotations

import functools
import json
import logging
import re
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import numpy as np
import torch
import tyro
from markupsafe import Markup
from torch import Tensor

from bclip_fast.data.image_files import IMAGE_SUFFIXES
from bclip_fast.data.sources import as_sources, shown
from bclip_fast.errors import UserError
from bclip_fast.eval import spot_check
from bclip_fast.eval.datasets import EvalDataset
from bclip_fast.html import page as html_page
from bclip_fast.io import stand_ins
from bclip_fast.io.atomic import settle, write_text
from bclip_fast.io.hashing import sha256_of_file
from bclip_fast.pretrained.any_model import Model

from . import stores
from .cache import BoundedCache
from .index import ModelSettings, build_embedder, embed_probe, open_images
from .index_files import FIELDS, INDEX, METADATA, ROWS

log = logging.getLogger(__name__)

MAX_HITS, MAX_QUERY = 200, 4000
THUMBNAIL_BYTES = 256 << 20
"""Default bound on the thumbnails in memory."""
_KEPT_QUERIES, _KEPT_HITS = 1024, 20_000


@dataclass(frozen=True, kw_only=True)
class OpenConfig(ModelSettings):
    """An index, and the new places of its model and images if they were moved."""

    folder: tyro.conf.Positional[str]
    """A folder that bclip embed wrote."""
    model: str | None = None
    """The model, if it was moved. Default: the path or name in the index."""
    data: str | None = None
    """The images, if they were moved. Default: the path in the index."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig(OpenConfig):
    """Find the images of an index that are nearest to a text or an image."""

    query: tyro.conf.Positional[str]
    """Words, or the path of an image."""
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 10
    """Number of hits."""
    gallery: str | None = None
    """HTML page to write, with the images of the hits."""
    json: bool = False
    """Print a JSON object for each hit, best first, one a line, in place of the table."""


@dataclass(frozen=True)
class Hit:
    """An image near a query.

    row: number of the sample in the data. score: cosine of image and query. fields: all of `FIELDS`. Unknown ones are
    empty.
    """

    row: int
    score: float
    key: str
    caption: str | None
    fields: dict[str, str]

    @property
    def article(self) -> str | None:
        """URL of the article, built from its number. The data's own text never becomes a link."""
        if re.fullmatch(r"PMC\d{1,12}", number := self.fields["pmcid"]):
            return f"https://pmc.ncbi.nlm.nih.gov/articles/{number}/"
        if re.fullmatch(r"10\.\d{4,9}/\S{1,300}", doi := self.fields["doi"]):
            return f"https://doi.org/{quote(doi, safe='/')}"
        return None

    @property
    def licence_url(self) -> str | None:
        """URL of the licence, if it is a Creative Commons licence."""
        url = self.fields["licence_url"]
        return url if re.fullmatch(r"https?://creativecommons\.org/[\w./-]{1,100}", url) else None

    def as_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object, with `article`."""
        return {**asdict(self), "article": self.article}


class Searcher:
    """An index with its model. Several threads may query it.

    It keeps the embeddings and hits of the last texts, and the thumbnails that were used last. index.faiss is mapped
    into memory.
    """

    def __init__(
        self, config: OpenConfig, model: Model | None = None, *, thumbnail_bytes: int = THUMBNAIL_BYTES
    ) -> None:
        """Open an index.

        Args:
            config: the index's folder. Its model and data replace those that the index names.
            model: replaces `config.model`.
            thumbnail_bytes: bound on the thumbnails in memory. 0 keeps none.

        Raises:
            UserError: a folder that is not a complete index, or a model other than the index's.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.folder = Path(config.folder)
        problem = f"{self.folder} is not a complete index of bclip embed"
        settle(self.folder)
        try:
            schema = pq.read_schema(self.folder / ROWS)
            self.metadata: dict[str, Any] = json.loads((schema.metadata or {})[METADATA])
            # Indexes before version 0.1.0 have no column `row`: they hold every image of the data.
            extra = [name for name in ("row",) if name in schema.names]
            rows = pq.read_table(self.folder / ROWS, columns=["key", "caption", *FIELDS, *extra])
            self._rows = rows.combine_chunks()
            if sha256_of_file(self.folder / INDEX) != self.metadata["sha256"]:
                raise UserError(f"{problem}: {ROWS} was written with another {INDEX}; run bclip embed again")
            self._index = stores.read(self.folder / INDEX)
            expected_probe = torch.tensor(self.metadata["probe"])
            # Earlier indexes have two probes, and do not name the device.
            made_with = self.metadata["precision"], torch.device(self.metadata.get("device", "cuda"))
            tolerance = spot_check.tolerance(made_with[0], "fp32", made_with[1])
        except (OSError, pa.ArrowException, ValueError, KeyError, TypeError, RuntimeError) as error:
            for name in (ROWS, INDEX):
                stand_ins.refuse(self.folder / name)
            raise UserError(f"{problem} ({' '.join(str(error).split())[:200]})") from error
        if self._index.ntotal != self._rows.num_rows or expected_probe.shape[1:] != (self._index.d,):
            raise UserError(
                f"{problem}: it has {self._index.ntotal} embeddings for {self._rows.num_rows} images; "
                "run bclip embed again"
            )
        self._sources = config.data or as_sources(self.metadata["data"], f"data of {self.folder}")
        self._lock = threading.Lock()
        self._queries = BoundedCache[np.ndarray](_KEPT_QUERIES, lambda _: 1)
        self._hits = BoundedCache[list[Hit]](_KEPT_HITS, len)
        self._thumbnails = BoundedCache[str](thumbnail_bytes, len)
        conversion = self.metadata.get("image_conversion", "standard")
        self.embedder = build_embedder(
            model or config.model or self.metadata["model"], config, 1, image_conversion=conversion
        )
        probe = embed_probe(self.embedder)[: len(expected_probe)]
        tolerance = max(tolerance, spot_check.tolerance(self.embedder.precision, "fp32", self.embedder.device))
        if probe.shape != expected_probe.shape or spot_check.largest_distance(probe, expected_probe)[0] > tolerance:
            raise UserError(f"{self.folder} was made with another model; pass its --model or run bclip embed again")

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def text(self, query: str, k: int = 10) -> list[Hit]:
        """Return the k images nearest to a text, best first. Raises UserError for an empty text or a wrong k."""
        if not query.strip() or len(query) > MAX_QUERY:
            raise UserError(f"a query must have 1 to {MAX_QUERY} characters, this one has {len(query.strip())}")
        _check_number(k)

        def embed() -> np.ndarray:
            with self._lock:
                return self._vector(self.embedder.texts([query]))

        return list(self._hits.get((query, k), lambda: self._nearest(self._queries.get(query, embed), k)))

    def image(self, content: bytes, k: int = 10, name: str = "query") -> list[Hit]:
        """Return the k images nearest to an encoded image. Raises UserError for a damaged image or a wrong k."""
        _check_number(k)
        with self._lock:
            vector = self._vector(self.embedder.image(content, name))
        return self._nearest(vector, k)

    def _vector(self, query: Tensor) -> np.ndarray:
        return np.ascontiguousarray(query.cpu().float().numpy())

    def _nearest(self, vector: np.ndarray, k: int) -> list[Hit]:
        scores, places = stores.search(self._index, vector, k)
        # HNSW and IVF return -1 for each missing neighbour.
        found = places[0] >= 0
        records = self._rows.take(places[0][found]).to_pylist()
        return [
            Hit(
                record.get("row", place), score, record["key"], record["caption"],
                {field: record[field] or "" for field in FIELDS},
            )
            for record, place, score in zip(records, places[0][found].tolist(), scores[0][found].tolist(), strict=True)
        ]  # fmt: skip

    @functools.cached_property
    def _data(self) -> EvalDataset:
        data = open_images(self._sources, self.metadata["split"])
        if len(data) != (num_images := self.metadata.get("num_images", len(self))):
            raise UserError(
                f"{shown(self._sources)} has {len(data)} images, but {self.folder} is of {num_images}; "
                "run bclip embed again"
            )
        return data

    def thumbnail(self, hit: Hit) -> str:
        """Return a `data:` URL of the hit's image, decoded and encoded again. Later calls take it from memory.

        Raises:
            UserError: the data were moved or changed, or the image cannot be decoded.
        """
        return self._thumbnails.get((hit.row, hit.key), lambda: self._make_thumbnail(hit))

    def _make_thumbnail(self, hit: Hit) -> str:
        with self._lock:
            data = self._data
        if data.key(hit.row) != hit.key:
            raise UserError(
                f"{shown(self._sources)}: image {hit.row} is {data.key(hit.row)}, not {hit.key}; run bclip embed again"
            )
        return html_page.thumbnail(data.image(hit.row), lambda: hit.key)


def run(config: SearchConfig) -> None:
    """Run the command: print the hits and write the gallery."""
    path = Path(config.query)
    is_image = path.suffix.lower() in IMAGE_SUFFIXES or _is_file(path)
    try:
        content = path.read_bytes() if is_image else b""
    except OSError as error:
        raise UserError(f"image {path} cannot be read: {error.strerror}") from error
    searcher = Searcher(config)
    hits = searcher.image(content, config.k, str(path)) if is_image else searcher.text(config.query, config.k)
    if config.json:
        for hit in hits:
            print(json.dumps(hit.as_json()))
    else:
        _print(hits)
    if config.gallery:
        write_text(Path(config.gallery), page(searcher, hits, query=config.query))
        log.info("gallery in %s", config.gallery)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a long text is no valid path
        return False


def page(searcher: Searcher, hits: list[Hit], *, query: str = "", error: str = "", form: int = 0) -> str:
    """Return an HTML page with the hits.

    form: number of hits in the page's query forms. 0 leaves the forms out, for a file.
    """
    rows = [{"hit": hit, **_thumbnail(searcher, hit)} for hit in hits]
    template = _template()
    return template.render(searcher=searcher, rows=rows, query=query, error=error, form=form, max_hits=MAX_HITS)


@functools.cache
def _template() -> Any:
    return html_page.environment().get_template("search.html")


def _check_number(k: int) -> None:
    if not 1 <= k <= MAX_HITS:
        raise UserError(f"k={k} must be 1 to {MAX_HITS}")


def _thumbnail(searcher: Searcher, hit: Hit) -> dict[str, str | None]:
    try:
        # Base64 has nothing to escape.
        return {"image": Markup(searcher.thumbnail(hit)), "problem": None}
    except UserError as error:  # show the problem in place of this image, and the other images as usual
        return {"image": None, "problem": str(error)}


def _print(hits: list[Hit]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    table = Table("#", "cosine", Column("image", overflow="fold"), "caption", "licence", "article")
    for i, hit in enumerate(hits, 1):
        caption = " ".join((hit.caption or "").split())
        cells = (hit.key, caption[:160], hit.fields["licence"], hit.article or "")
        table.add_row(str(i), f"{hit.score:.3f}", *map(escape, cells))
    Console().print(table)

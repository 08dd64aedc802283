"""The options of `bclip ingest build`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from bclip_fast.data import filters
from bclip_fast.errors import UserError
from bclip_fast.io import system
from bclip_fast.io.file_names import printable

from .extract import Options
from .pmc import Rules
from .sanitize import JPEG_QUALITY


@dataclass(frozen=True)
class IngestConfig:
    """Convert JATS articles and their images to WebDataset shards of figure-caption pairs."""

    source: tyro.conf.Positional[str]
    """Folder of articles, mirror, or address of a bucket. A folder holds `*.nxml` or `*.xml` files with their images,
    or `.tar`, `.tar.gz`, `.tgz` packages of them. `bclip ingest fetch` writes a mirror. An address starts with
    `https://` or `s3://`, such as `https://pmc-oa-opendata.s3.amazonaws.com`."""
    out: Annotated[Path, tyro.conf.arg(aliases=("-o",))]
    """Folder to write: shards, indices, manifest.parquet, rejects.parquet, dataset.json. During the run, another
    folder next to it holds a copy of the pairs."""
    ids: Path | None = None
    """Only for a mirror or bucket: file that lists the articles to use, one id a line, PMC123 or PMC123.2."""
    inventory: str = ""
    """Only for a bucket: its inventory, a `.csv` or `.csv.gz` file, or `latest`."""
    prefix: str = ""
    """Only for a mirror or bucket: use the articles whose id starts with this prefix, such as PMC100."""
    license: Literal["commercial", "noncommercial", "all"] = "all"
    """Licences to accept. commercial: CC0, CC BY, -SA, -ND. noncommercial: also CC BY-NC, -SA, -ND. all: any."""
    keep_retracted: bool = False
    """Keep retracted articles. The manifest marks them."""
    max_short_side: int = 384
    """Limit for the shorter side of an image, in pixels. Larger images are reduced. 0: no limit."""
    jpeg_quality: int = JPEG_QUALITY
    """JPEG quality (1 to 100) of images that need a new encoding."""
    panels: bool = False
    """Also pair the panels of composite figures with their parts of the caption. Printed letters, gaps and caption must
    agree on a panel."""
    panel_model: str = ""
    """With --panels: a DAB-DETR of transformers that finds panels, hf-hub:ORG/NAME[@REVISION] or a folder, such as
    hf-hub:vector-institute/pmc-18m-dab-detr. Its boxes go through the same comparison with the caption."""
    panel_batch_size: int = 0
    """Images in a batch of the panel model. 0: 16 on a GPU, 1 on a CPU."""
    panel_score: float = 0.5
    """Least score, from 0 to 1, of the panel model's boxes."""
    kinds: bool = False
    """Also write the kind of each figure and panel (ct, chart, ...) into the manifest, as `bclip ingest label` does."""
    filter: str = ""
    """Record this expression as the selection of the dataset, such as "kind in ['ct', 'mr'] and p > 0.5". Training then
    takes the selected pairs only (docs/data.md). Nothing is deleted."""
    texts: bool = True
    """Keep further texts about each image, from which training can draw (data.captions): the sentences that cite the
    figure, the panels' parts of the caption, and the article's title. Shards with them have format version 2."""
    tokenizer: Path | None = None
    """`vocab.txt` or `tokenizer.json` for counting tokens. Without it, the manifest has no token counts."""
    val_fraction: float = 0.001
    """Fraction of the articles in split `val`. The defaults are the paper's proportions."""
    test_fraction: float = 0.05
    """Fraction of the articles in split `test`. Other splits exclude images that resemble a test image."""
    seed: int = 0
    """Seed of splits and order. Both depend only on this number and the articles' ids."""
    engine: Literal["local", "ray"] = "local"
    """local: processes of this machine. ray: a Ray cluster whose nodes share OUT's folder. RAY_ADDRESS names the
    cluster. Without it, a cluster starts on this machine."""
    workers: int = 0
    """Number of processes. 0: one for each CPU core. 1: this process, so a crash of an image decoder ends the run."""
    connections: int = 8
    """Number of requests to a bucket at the same time, over all workers."""
    max_shard_megabytes: int = 256
    """Size limit of a shard, in MiB."""
    overwrite: bool = False
    """Replace a finished dataset in OUT."""
    allow_changes: bool = False
    """Continue an unfinished build of another version of bclip_fast or its packages. Its finished parts are kept."""

    def __post_init__(self) -> None:
        checks = {
            "max_short_side": (self.max_short_side >= 0, "at least 0"),
            "jpeg_quality": (1 <= self.jpeg_quality <= 100, "from 1 to 100"),
            "panel_batch_size": (0 <= self.panel_batch_size <= 1024, "from 0 to 1024"),
            "panel_score": (0 <= self.panel_score <= 1, "from 0 to 1"),
            "val_fraction": (0 <= self.val_fraction <= 1, "from 0 to 1"),
            "test_fraction": (0 <= self.test_fraction <= 1 - self.val_fraction, "from 0 to 1 - val_fraction"),
            "workers": (self.workers >= 0, "at least 0"),
            "connections": (self.connections >= 1, "at least 1"),
            "max_shard_megabytes": (self.max_shard_megabytes >= 1, "at least 1"),
        }
        if self.filter:
            columns = filters.parse(self.filter).columns
            if not self.kinds and (needed := [name for name in columns if name in ("kind", "kind_p", "kind_by")]):
                raise UserError(f"filter {self.filter!r} reads the column {needed[0]}, which needs --kinds; add it")
        for name, (is_valid, valid_range) in checks.items():
            if not is_valid:
                raise UserError(f"{name}={getattr(self, name)} is out of range; it must be {valid_range}")

        if self.panel_model and not self.panels:
            raise UserError(f"panel_model={self.panel_model} needs --panels; add it, or remove panel_model")

    def options(self) -> Options:
        """Return the options of the extraction. The workers share the connections."""
        connections = max(1, self.connections // max(1, self.workers or system.num_cores()))
        rules = Rules(self.license, self.keep_retracted)
        tokenizer = str(self.tokenizer or "")
        return Options(
            rules,
            self.max_short_side,
            self.jpeg_quality,
            self.panels,
            self.texts,
            tokenizer,
            connections,
            kinds=self.kinds,
        )

    @property
    def version(self) -> int:
        """Format version of the shards."""
        return 2 if self.texts else 1

    def signature(self) -> dict[str, Any]:
        """Return the options that affect the bytes of the dataset, as dataset.json records them."""
        has_no_effect = ("out", "engine", "workers", "connections", "overwrite", "allow_changes", "filter")
        values = {name: value for name, value in vars(self).items() if name not in has_no_effect}
        if not self.panel_model:
            # As earlier versions recorded the options.
            for name in ("panel_model", "panel_batch_size", "panel_score"):
                del values[name]
        if not self.kinds:
            del values["kinds"]
        if not self.texts:
            del values["texts"]  # as earlier versions, which knew no texts, recorded the options
        return {
            name: printable(str(value)) if isinstance(value, (str, Path)) else value for name, value in values.items()
        }

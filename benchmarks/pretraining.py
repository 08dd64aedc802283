"""Shards for a pretraining that two cores can run: python -m bclip_fast.benchmarks.pretraining DATA SHARDS

They hold the articles of DATA/pmc_articles with the panels of their figures, and the chest X-rays of DATA/pairs with
their notes. A fifth of the articles is for validation. Everything else is for training. Train on the shards with:

    torchrun --nproc-per-node 2 -m -- bclip_fast.cli train pmc_small.toml --data.shards SHARDS
    bclip train report runs/pmc_small
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from bclip_fast.data.shards.format import Sample
from bclip_fast.data.shards.reader import ShardDataset
from bclip_fast.data.shards.writer import ShardWriter
from bclip_fast.ingest.build import build
from bclip_fast.ingest.config import IngestConfig
from bclip_fast.ingest.sanitize import sanitize


def main(data: Path, out: Path) -> None:
    """Write the shards of `data` to `out`."""
    with tempfile.TemporaryDirectory() as folder, ShardWriter(out) as writer:
        articles = Path(folder) / "articles"
        config = IngestConfig(source=str(data / "pmc_articles"), out=articles, panels=True, val_fraction=0.2,
                              test_fraction=0.0)  # fmt: skip
        build(config)
        for split in ("train", "val"):
            for sample in ShardDataset(articles, split):
                writer.write(sample, split)
        pairs_folder = data / "pairs"
        for number, pair in enumerate(json.loads((pairs_folder / "covid_cxr_ccby" / "pairs.json").read_text())):
            image = sanitize((pairs_folder / pair["image"]).read_bytes())
            meta = {"licence": pair["licence"], "doi": pair["doi"]}
            writer.write(Sample(f"cxr-{number:03d}", image.data, pair["text"], meta), "train")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))

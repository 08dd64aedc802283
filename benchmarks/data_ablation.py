"""Compare training data on held-out articles: python -m benchmarks.data_ablation ARTICLES -o FOLDER

It builds one dataset with panels, kinds and mentions from ARTICLES, a folder or a mirror. Then it trains the model of
`bclip quickstart` from random weights on each selection of the data, once for each seed. All runs make the same number
of optimiser steps. A seed decides the initial weights and the order. Every run is tested on the complete figures of the
same held-out articles.

The command skips finished runs and continues a stopped one. Each call appends the rows of the runs that it finishes to
benchmarks/results/data_ablation.jsonl, and prints the tables of all runs in FOLDER.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import tyro

from bclip_fast.data import filters
from bclip_fast.data.texts import CaptionWeights
from bclip_fast.errors import UserError
from bclip_fast.ingest import kinds
from bclip_fast.ingest.build import build
from bclip_fast.ingest.config import IngestConfig
from bclip_fast.io.atomic import write_text
from bclip_fast.train.config import DataConfig
from bclip_fast.train.trainer import train

from . import data_ablation_table, recipes
from .measure import append, cpu_seconds, environment

log = logging.getLogger(__name__)

RESULTS = Path(__file__).parent / "results" / "data_ablation.jsonl"
Name = Literal["whole", "panels", "kinds", "mentions", "deduplicated"]
_WHOLE = "panel == None"
_UNIQUE = "duplicate_of == None"


@dataclass(frozen=True)
class AblationConfig:
    """Train on each selection of the data, and evaluate."""

    articles: tyro.conf.Positional[str]
    """Folder of articles or mirror, as for `bclip ingest build`."""
    out: Annotated[Path, tyro.conf.arg(aliases=("-o",))] = Path("runs/data_ablation")
    """Folder for the dataset and the runs."""
    data: tuple[Name, ...] = get_args(Name)
    """Selections to train on. whole: complete figures. panels: and their panels. kinds: complete figures that `kinds`
    selects. mentions: complete figures, whose text is a citing sentence with probability 0.2. deduplicated: complete
    figures without the duplicates that the build marks."""
    kinds: str = "kind not in ['chart', 'diagram', 'chemical', 'gel', 'other']"
    """Expression of the selection `kinds`, over the columns of the manifest."""
    seeds: int = 3
    """Number of seeds, from 0."""
    steps: int = 250
    """Optimiser steps of each run, in batches of 64 pairs."""
    batch_size: int = recipes.BATCH
    """Pairs in a batch."""
    test_fraction: float = 0.25
    """Fraction of the articles that are held out."""
    workers: int = 0
    """Processes of the build, 0 for one a core."""
    num_threads: int = 2
    """Threads that decode images in training."""
    record: bool = True
    """Append the rows to benchmarks/results/data_ablation.jsonl."""

    def __post_init__(self) -> None:
        filters.parse(self.kinds)
        for name in ("seeds", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")


def main(config: AblationConfig) -> None:
    """Train the missing runs, and print the tables."""
    shards = _shards(config)
    manifest = _manifest(shards)
    selections = {name: _selection(config, name, manifest) for name in config.data}
    for seed in range(config.seeds):
        for name, selection in selections.items():
            if selection is None:
                continue
            settings = {"steps": config.steps, "batch_size": config.batch_size, "filter": selection.filter}
            result = config.out / f"{name}-{seed}.json"
            if result.exists():
                _check_settings(result, settings)
                continue
            row = {"data": name, "seed": seed, **settings, **_run(config, name, seed, shards, selection, manifest)}
            write_text(result, json.dumps(row) + "\n")
            if config.record:
                append([{**environment(), "operator": "data_ablation", **row}], [RESULTS])
    rows = [
        json.loads(path.read_text()) for name in get_args(Name) for path in sorted(config.out.glob(f"{name}-*.json"))
    ]
    print("\n".join(data_ablation_table.tables(rows)))
    for name, selection in selections.items():
        if selection is None:
            print(f"\n{name}: not trained. The build marks no duplicates, so its data are those of whole.")


def _shards(config: AblationConfig) -> Path:
    """The dataset of all runs. Its test articles depend on the articles' ids only."""
    out = config.out / "dataset"
    if not out.exists():
        source = IngestConfig(
            config.articles,
            out,
            panels=True,
            kinds=True,
            val_fraction=0.0,
            test_fraction=config.test_fraction,
            workers=config.workers,
        )
        build(source)
    return out


def _manifest(shards: Path) -> Any:
    """The manifest of a dataset whose training and test articles differ."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pq.read_table(shards / "manifest.parquet")
    articles = {
        split: set(table.filter(pc.equal(table["split"], split))["article"].to_pylist()) for split in ("train", "test")
    }
    for split, found in articles.items():
        if not found:
            raise UserError(f"{shards} has no articles in split {split}; use more articles or another test_fraction")
    if both := articles["train"] & articles["test"]:
        raise RuntimeError(f"{shards}: articles in train and in test: {', '.join(sorted(both)[:5])}")
    return table


def _selection(config: AblationConfig, name: str, manifest: Any) -> DataConfig | None:
    """The settings of the training data, or None if they are those of `whole`."""
    # A build without panels or duplicates writes no column for them.
    parts = [_WHOLE] if name != "panels" and "panel" in manifest.column_names else []
    if name == "kinds":
        parts.append(f"({config.kinds})")
    if name == "deduplicated":
        if "duplicate_of" not in manifest.column_names:
            return None
        parts.append(_UNIQUE)
    captions = CaptionWeights(caption=0.8, mention=0.2) if name == "mentions" else CaptionWeights()
    return DataConfig(filter=" and ".join(parts) or filters.ALL, captions=captions, num_threads=config.num_threads)


def train_keys(manifest: Any, text: str) -> list[str]:
    """The keys of the training samples that a filter selects."""
    mask = np.array(manifest["split"].to_pylist()) == "train"
    if text != filters.ALL:
        mask &= filters.parse(text).mask(manifest)
    keys: list[str] = manifest.filter(mask)["key"].to_pylist()
    return keys


def _check_settings(result: Path, settings: dict[str, Any]) -> None:
    row = json.loads(result.read_text())
    for name, value in settings.items():
        if row[name] != value:
            raise UserError(
                f"{result} has {name}={row[name]}, not {value}; use another --out or remove the file and its run"
            )


def _run(
    config: AblationConfig, name: str, seed: int, shards: Path, selection: DataConfig, manifest: Any
) -> dict[str, Any]:
    """Train and evaluate one run."""
    run = config.out / f"{name}-{seed}"
    start, is_new = cpu_seconds(), not run.exists()
    log.info("%s, seed %d: %s", name, seed, selection.filter)
    train(recipes.training(run, seed, shards, selection, max_steps=config.steps, batch_size=config.batch_size))
    row = recipes.evaluate(run, shards)
    keys = train_keys(manifest, selection.filter)
    seen = config.steps * config.batch_size
    kind_of = dict(zip(manifest["key"].to_pylist(), manifest["kind"].to_pylist(), strict=True))
    row |= {"num_train": len(keys), "samples_seen": seen, "epochs": round(seen / len(keys), 2)}
    row["medical"] = [kind_of[key] in _medical() for key in row["keys"]]
    return row | ({"cpu_seconds": round(cpu_seconds() - start, 1)} if is_new else {})


def _medical() -> set[str]:
    """The kinds of medical images."""
    return {kind.name for kind in kinds.taxonomy().kinds if kind.medical}


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        main(tyro.cli(AblationConfig, use_underscores=True))
    except UserError as error:
        raise SystemExit(str(error)) from None

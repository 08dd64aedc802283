"""Compare recipes of pretraining on held-out articles: python -m benchmarks.recipes DATA --out FOLDER

It ingests DATA/pmc_articles and trains the small model of `bclip quickstart` from random weights, for every recipe and
seed. Then it measures retrieval among the figures of articles that the run has not seen. A seed decides the split into
articles for training and test, the initial weights and the order. So recipes with one seed are compared pair by pair.

The command skips finished runs and resumes a stopped one. Several calls with different --recipe may run at the same
time. Each call appends the rows of the runs that it finishes to benchmarks/results/recipes.jsonl, and prints the table
of all runs in FOLDER. An interval covers 95 % of 2000 samples of articles, drawn with replacement.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import tyro

from bclip_fast import pretrained
from bclip_fast.data.shards.reader import ShardDataset
from bclip_fast.data.texts import CaptionWeights
from bclip_fast.errors import UserError
from bclip_fast.eval import retrieval
from bclip_fast.eval.datasets import open_dataset
from bclip_fast.eval.datasets.subset import SubsetDataset
from bclip_fast.eval.embed import Embedder
from bclip_fast.ingest.build import build
from bclip_fast.ingest.config import IngestConfig
from bclip_fast.io.atomic import write_text
from bclip_fast.io.jsonl import read_lines
from bclip_fast.io.runs import METRICS
from bclip_fast.model.presets import preset
from bclip_fast.model.tokenizer import Tokenizer
from bclip_fast.train.config import CheckpointConfig, DataConfig, TrainConfig
from bclip_fast.train.engine import EngineConfig
from bclip_fast.train.losses import LossConfig
from bclip_fast.train.schedule import OptimConfig
from bclip_fast.train.trainer import train

from .measure import append, cpu_seconds, environment

log = logging.getLogger(__name__)

RESULTS = Path(__file__).parent / "results" / "recipes.jsonl"
_TEST_FRACTION = 0.25
BATCH = 64
NUM_RESAMPLES = 2000
_K = 10


@dataclass(frozen=True)
class Recipe:
    """The settings of a recipe, where they differ from the defaults."""

    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)


RECIPES = {
    "clip": Recipe(),
    "siglip": Recipe(loss=LossConfig(kind="siglip")),
    "duplicates": Recipe(data=DataConfig(positives="duplicates")),
    "figure": Recipe(data=DataConfig(positives="figure")),
    "mentions": Recipe(data=DataConfig(captions=CaptionWeights(caption=0.8, mention=0.2))),
}
Name = Literal["clip", "siglip", "duplicates", "figure", "mentions"]


@dataclass(frozen=True)
class RecipesConfig:
    """Train and evaluate the recipes."""

    data: tyro.conf.Positional[Path]
    """Folder that holds pmc_articles."""
    out: Annotated[Path, tyro.conf.arg(aliases=("-o",))] = Path("runs/recipes")
    """Folder for shards and runs."""
    recipe: tuple[Name, ...] = get_args(Name)
    """Recipes to train."""
    seeds: int = 3
    """Number of seeds, from 0."""
    epochs: int = 30
    """Passes over the training pairs."""
    record: bool = True
    """Append the rows to benchmarks/results/recipes.jsonl."""


def main(config: RecipesConfig) -> None:
    """Train the missing runs, and print the table."""
    for seed in range(config.seeds):
        shards = _shards(config, seed)
        for name in config.recipe:
            result = config.out / f"{name}-{seed}.json"
            if result.exists():
                continue
            start, is_new = cpu_seconds(), not (config.out / f"{name}-{seed}").exists()
            run = _train(config, name, seed, shards)
            row = {**evaluate(run, shards), "recipe": name, "seed": seed, "epochs": config.epochs}
            row |= _pairs_of_run(run) | ({"cpu_seconds": round(cpu_seconds() - start, 1)} if is_new else {})
            write_text(result, json.dumps(row) + "\n")
            if config.record:
                append([{**environment(), "operator": "recipes", **row}], [RESULTS])
    print("\n".join(table([json.loads(path.read_text()) for path in sorted(config.out.glob("*-*.json"))])))


def _shards(config: RecipesConfig, seed: int) -> Path:
    """The shards whose test articles are those of the seed."""
    out = config.out / f"shards-{seed}"
    if not out.exists():
        source = str(config.data / "pmc_articles")
        build(IngestConfig(source, out, panels=True, val_fraction=0.0, test_fraction=_TEST_FRACTION, seed=seed))
    return out


def _train(config: RecipesConfig, name: str, seed: int, shards: Path) -> Path:
    recipe, run = RECIPES[name], config.out / f"{name}-{seed}"
    train(training(run, seed, shards, recipe.data, loss=recipe.loss, epochs=config.epochs))
    return run


def training(run: Path, seed: int, shards: Path, data: DataConfig, **changes: Any) -> TrainConfig:
    """The settings of a small run. `changes`: further settings of the run, such as its length."""
    settings = TrainConfig(
        run=str(run),
        resume=True,
        seed=seed,
        batch_size=BATCH,
        preset="quickstart",
        # Every run has the vocabulary of the captions.
        data=replace(data, shards=str(shards), tokenizer=str(_vocabulary(shards)), crop_scale=(0.5, 1.0)),
        optim=OptimConfig(lr=1e-3, warmup_steps=50, weight_decay=0.1, grad_clip_norm=1.0),
        engine=EngineConfig(name="ddp", precision="fp32"),
        checkpoint=CheckpointConfig(every_steps=100, keep=1),
    )
    return replace(settings, **changes)


def _vocabulary(shards: Path) -> Path:
    folder, text = shards.with_name(f"{shards.name}-tokenizer"), preset("quickstart").text
    path = folder / "tokenizer.json"
    if not path.exists():
        captions = ShardDataset(shards).captions()
        folder.mkdir(exist_ok=True)
        Tokenizer.train(captions, text.vocab_size, text.context_length).save(folder)
    return path


def evaluate(run: Path, shards: Path) -> dict[str, Any]:
    """The rank of every query among the complete figures of the test articles, in both directions."""
    dataset = ShardDataset(shards, "test")
    metas = [sample.meta for sample in dataset]
    rows = [i for i, meta in enumerate(metas) if "panel" not in meta]
    data = SubsetDataset(open_dataset(str(shards), "test"), rows)
    model, preprocess, tokenizer = pretrained.load(str(run))
    embedder = Embedder(model, preprocess, tokenizer, num_workers=1)
    captions = data.captions()
    assert captions is not None
    ranks = retrieval.rank(embedder.images(data), embedder.texts(captions))
    directions = [each.expected().tolist() for each in ranks]
    metrics = {f"recall_at_{k}": float(np.mean([each.recall(k) for each in ranks])) for k in retrieval.RECALL_AT}
    return {
        "metric": "retrieval",
        **metrics,
        f"chance_recall_at_{_K}": float(np.mean([each.chance_recall(_K) for each in ranks])),
        "mean_rank": float(np.mean(directions)),
        "num_test": len(rows),
        "num_train": len(ShardDataset(shards)),
        "ranks": directions,
        "articles": [metas[i]["article"] for i in rows],
        "keys": [data.key(i) for i in range(len(rows))],
    }


def _pairs_of_run(run: Path) -> dict[str, float]:
    """The mean number of pairs of a batch with more than one positive, if the run counts them."""
    counts = [line["shared_positives"] for line in read_lines(run / METRICS) if "shared_positives" in line]
    return {"shared_positives": float(np.mean(counts))} if counts else {}


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The lines of the table, in Markdown. Differences are to the runs of `clip` with the same seeds."""
    lines = [
        f"| recipe | runs | R@{_K} | 95 % | by seed | R@{_K} - clip | 95 % | mean rank | - clip | 95 % | shared |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    base = {row["seed"]: row for row in rows if row["recipe"] == "clip"}
    for name in RECIPES:
        runs = [row for row in rows if row["recipe"] == name]
        if not runs:
            continue
        articles = np.concatenate([row["articles"] * 2 for row in runs])
        hits, ranks = (np.concatenate([of(row) for row in runs]) for of in (_hits, _ranks))
        low, high = interval(hits, articles)
        by_seed = " ".join(f"{_hits(row).mean():.1%}" for row in runs)
        cells = [
            name,
            len(runs),
            f"{hits.mean():.1%}",
            f"{low:.1%} to {high:.1%}",
            by_seed,
            "",
            "",
            f"{ranks.mean():.1f}",
        ]
        cells += ["", "", f"{np.mean([row.get('shared_positives', 0.0) for row in runs]):.1f} of {BATCH}"]
        if name != "clip" and all(row["seed"] in base for row in runs):
            for of, column, form in ((_hits, 5, "+.1%"), (_ranks, 8, "+.1f")):
                change = np.concatenate([of(row) - of(base[row["seed"]]) for row in runs])
                low, high = interval(change, articles)
                cells[column : column + 2] = f"{change.mean():{form}}", f"{low:{form}} to {high:{form}}"
        lines.append(f"| {' | '.join(map(str, cells))} |")
    if rows:
        chance, pairs = (np.mean([row[name] for row in rows]) for name in (f"chance_recall_at_{_K}", "num_test"))
        lines.append(f"| chance | | {chance:.1%} | | | | | {(pairs + 1) / 2:.1f} | | | |")
    return lines


def _ranks(row: dict[str, Any]) -> np.ndarray:
    """The rank of the pair of each query, for both directions."""
    return np.concatenate(row["ranks"])


def _hits(row: dict[str, Any]) -> np.ndarray:
    """Whether each query has its pair among the first _K, for both directions."""
    return (_ranks(row) <= _K).astype(np.float64)


def interval(values: np.ndarray, articles: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of a mean over queries, from samples of articles.

    Args:
        values, articles: (queries,), the value and the article of each query.
    """
    _, owners = np.unique(articles, return_inverse=True)
    sums, counts = np.bincount(owners, values), np.bincount(owners)
    drawn = np.random.default_rng(0).integers(0, len(sums), (NUM_RESAMPLES, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975]).tolist()
    return low, high


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        main(tyro.cli(RecipesConfig, use_underscores=True))
    except UserError as error:
        raise SystemExit(str(error)) from None

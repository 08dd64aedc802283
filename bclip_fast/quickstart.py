"""`bclip quickstart`: every stage of a large run once, on a small set of real images.

The images come from packages, or are the figures of JATS articles on disk. They become shards. A small BiomedCLIP is
pretrained on them with DeepSpeed and evaluated on the held-out pairs. A report shows the results.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bclip_fast import config as config_files
from bclip_fast import eval as evaluation
from bclip_fast.demo_data import build as samples
from bclip_fast.errors import UserError
from bclip_fast.ingest import build
from bclip_fast.ingest.config import IngestConfig
from bclip_fast.io.progress import Advance, track
from bclip_fast.search.index import EmbedConfig, embed
from bclip_fast.train.config import TrainConfig
from bclip_fast.train.trainer import train

log = logging.getLogger(__name__)

_STEPS = (
    ("Make shards of articles of PubMed Central", "bclip ingest build ARTICLES -o SHARDS"),
    (
        "Train on the shards, or finetune a model on a .csv",
        "bclip train quickstart.toml --data.shards SHARDS --run RUN",
    ),
    ("Evaluate, and write such a report", "bclip eval RUN --split val"),
)


@dataclass(frozen=True)
class QuickstartConfig:
    """Build a small set of real images, pretrain a small BiomedCLIP, evaluate it and write a report."""

    out: Path = Path("runs/quickstart")
    """Folder for data, run and report. If it holds a finished quickstart, the next free name (-2, -3, ...) is used."""
    articles: Path | None = None
    """Folder of JATS articles (*.nxml or *.xml beside their images, .tar.gz) to use instead of the packages' images."""
    config: str = "quickstart.toml"
    """Training configuration: a TOML file, or the name of a file of the package."""
    epochs: int | None = None
    """Number of passes over the data. Default: that of the configuration."""
    seed: int = 0
    """Seed of the data's splits and of training."""


def run(config: QuickstartConfig) -> None:
    """Run every stage that isn't finished in the output folder."""
    start = time.perf_counter()
    out = _free(config.out)
    data = out / "data"
    if not (data / "dataset.json").is_file():
        _build(config, data)
    counts = _counts(data)
    log.info("%d pairs to train on, %d held out, in %s", counts["train"], counts["val"], data)
    settings = _training(config, out, data, counts["train"])
    if not (out / "run" / "model").is_dir() or (out / "run" / "checkpoints").is_dir():
        train(settings)
    run, index = str(out / "run"), str(out / "index")
    embed(EmbedConfig(model=run, data=str(data), split="val", out=index, progress=False))
    command = evaluation.EvalCommand(model=run, data=str(data), split="val", out=str(out))
    evaluation.run(command, search=index, steps=_STEPS)
    print(f"\n{time.perf_counter() - start:.0f} s in total. Results: {out / 'results.json'}")
    print(f"Report: {(out / 'report.html').resolve()}")
    print(f"Search the images: bclip serve {index}")


def _training(config: QuickstartConfig, out: Path, data: Path, num_pairs: int) -> TrainConfig:
    settings = config_files.from_toml(TrainConfig, config_files.find(config.config))
    batch_size = min(settings.batch_size, num_pairs)
    if batch_size < 2:
        raise UserError(f"{data} holds {num_pairs} training pairs; a contrastive batch needs at least 2")
    return dataclasses.replace(
        settings,
        run=str(out / "run"),
        seed=config.seed,
        epochs=config.epochs or settings.epochs,
        batch_size=batch_size,
        resume=True,
        data=dataclasses.replace(settings.data, shards=str(data)),
    )


def _counts(data: Path) -> dict[str, int]:
    splits = json.loads((data / "dataset.json").read_text(encoding="utf-8"))["splits"]
    counts = {split: splits[split]["samples"] if split in splits else 0 for split in ("train", "val")}
    if not all(counts.values()):
        raise UserError(
            f"{data} holds {counts['train']} pairs to train on and {counts['val']} held out. Each article belongs to "
            "one split, so pass more articles, or another --seed with a new --out"
        )
    return counts


def _build(config: QuickstartConfig, data: Path) -> None:
    if config.articles is None:
        with _progress() as update:
            samples.build(data, seed=config.seed, progress=update)
        return
    # Hold out a larger fraction than the paper, or retrieval would be measured on a handful of pairs.
    build.build(
        IngestConfig(
            source=str(config.articles),
            out=data,
            max_short_side=128,
            val_fraction=0.15,
            test_fraction=0.0,
            seed=config.seed,
        )
    )


def _free(out: Path) -> Path:
    """Return the first of out, out-2, out-3, ... that doesn't hold a finished quickstart."""
    candidate, number = out, 1
    while (candidate / "results.json").is_file():
        number += 1
        candidate = out.with_name(f"{out.name}-{number}")
    return candidate


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yield a progress callback, which shows each stage."""
    with ExitStack() as stack:
        completed: dict[str, int] = {}
        advance: Advance | None = None

        def update(stage: str, done: int, total: int) -> None:
            nonlocal advance
            if stage not in completed or advance is None:
                # Only one bar can be live. Those of earlier stages stay on the screen.
                stack.close()
                advance = stack.enter_context(track(stage, total))
            advance(done - completed.get(stage, 0))
            completed[stage] = done

        yield update

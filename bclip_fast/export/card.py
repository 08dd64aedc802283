"""The model card, README.md of an exported folder: how to use the files, and what the run says of the model.

Everything about the training comes from files: config.toml and metrics.jsonl of the run, dataset.json and
manifest.parquet of its data, and results.json of evaluations. The card names everything else as unknown.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bclip_fast.config import read_toml
from bclip_fast.errors import UserError
from bclip_fast.eval import results as evaluations
from bclip_fast.io.atomic import write_text
from bclip_fast.io.json_files import read_object
from bclip_fast.io.runs import METRICS, VALIDATION, read_metrics
from bclip_fast.model.biomedclip import BiomedClipConfig
from bclip_fast.pretrained.model_card import FILE, MARK
from bclip_fast.version import __version__

log = logging.getLogger(__name__)

_TAGS = ("clip", "biomedical", "image-text", "zero-shot-image-classification")
_MAX_LICENCES = 12
_LIMITS = """\
- The model compares images and texts. It isn't a medical device, and no one has tested it for diagnosis.
- Its captions come from articles, so it knows what authors show and write about: published cases aren't a sample of
  patients, and most text is English.
- Scores depend on the wording of prompts. Compare models with the same prompts and the same images.
- Images and captions of its training data may show people. Don't use embeddings to identify them."""
_USE = """\
Research on biomedical images and texts: retrieval, zero-shot classification, features for a linear classifier, and
further training. Test it on your own images before you rely on a score."""


@dataclass(frozen=True)
class Run:
    """The content of a run's files.

    data: lines about the data. recipe: (setting, value). metrics: (metric, value) of the last validation.
    """

    data: list[str] = field(default_factory=list)
    recipe: list[tuple[str, str]] = field(default_factory=list)
    metrics: list[tuple[str, str]] = field(default_factory=list)


def write(
    folder: Path,
    title: str,
    usage: str,
    library: str,
    config: BiomedClipConfig,
    *,
    run: Run | None,
    licence: str,
    evaluated: Sequence[Path] = (),
) -> None:
    """Write README.md.

    Args:
        usage: Markdown that says how to load the files.
        library: library_name of the hub.
        licence: licence of the weights, as the hub names them. "": unknown.
        evaluated: folders of `bclip eval`.

    Raises:
        UserError: a folder of an evaluation can't be read.
    """
    tables = [line for path in evaluated for line in _evaluation(path)]
    head = ["---", f"library_name: {library}", *([f"license: {licence}"] if licence else []), "tags:"]
    head += [f"- {tag}" for tag in _TAGS]
    sections = [
        "\n".join([*head, "---", MARK]),
        f"# {' '.join(title.split())}",
        _sizes(config),
        usage.strip(),
        "## Training data",
        "\n".join(run.data if run else ["Unknown: the model wasn't exported from the folder of its training run."]),
        "## Recipe",
        _table(("setting", "value"), run.recipe) if run and run.recipe else "Unknown.",
        "## Evaluation",
        "\n".join(tables) if tables else "The export got no results of `bclip eval`.",
    ]
    if run and run.metrics:
        sections += ["The last validation during training:", _table(("metric", "value"), run.metrics)]
    sections += [
        "## Licence",
        f"The weights: {licence}." if licence else "The licence of the weights isn't stated.",
        "## Intended use",
        _USE,
        "## Limits",
        _LIMITS,
        f"Written by bclip_fast {__version__}.",
    ]
    write_text(folder / FILE, "\n\n".join(sections) + "\n")


def read_run(folder: Path) -> Run | None:
    """The content of a training run's files. None if `folder` isn't one.

    A file that is damaged or absent only leaves its lines out, because the data may lie on another machine.
    """
    if not (folder / "config.toml").is_file():
        return None
    config = read_toml(folder / "config.toml")
    return Run(list(_data(config)), list(_recipe(config)), list(_metrics(folder)))


def _sizes(config: BiomedClipConfig) -> str:
    vision, text = config.vision, config.text
    return (
        f"An image tower ({vision.kind}, {vision.layers} layers, width {vision.width}, {vision.image_size} px, patches "
        f"of {vision.patch_size} px) and a text tower ({text.kind}, {text.layers} layers, width {text.width}, at most "
        f"{text.context_length} tokens) that share embeddings of {config.embed_dim} numbers."
    )


def _data(config: dict[str, Any]) -> Iterable[str]:
    """A line on each dataset, and the licences of its articles."""
    shards = config.get("data", {}).get("shards") if isinstance(config.get("data"), dict) else None
    paths = config.get("data") if shards is None else shards
    if isinstance(paths, str):
        paths = [paths]
    for entry in paths if isinstance(paths, list) else ():
        path = entry if isinstance(entry, str) else str(entry.get("path", entry)) if isinstance(entry, dict) else ""
        name = Path(path).name or path
        try:
            content = read_object(Path(path) / "dataset.json")
            splits = content["splits"]
            counts = ", ".join(f"{splits[split]['samples']:,} of {split}" for split in sorted(splits))
            yield f"- `{name}`: {counts}. SHA-256 of the samples: `{content['fingerprint']}`."
        except (UserError, LookupError, TypeError, ValueError, AttributeError):
            yield f"- `{name}`: its files were not there when the model was exported."
            continue
        yield from _licences(Path(path) / "manifest.parquet")


def _licences(path: Path) -> Iterable[str]:
    try:
        import pyarrow.parquet as parquet

        column = parquet.read_table(path, columns=["licence"]).column("licence")
    except (ImportError, OSError, KeyError, ValueError):  # pyarrow's errors are of these classes
        return
    counts = Counter(value.as_py() or "not stated" for value in column)
    shown = ", ".join(f"{name} ({count:,})" for name, count in counts.most_common(_MAX_LICENCES))
    yield f"  Licences of the figures: {shown}."


# Keys of config.toml -> name in the card.
_RECIPE = {
    "preset": "preset",
    "epochs": "epochs",
    "max_steps": "steps",
    "batch_size": "global batch",
    "loss.kind": "loss",
    "optim.name": "optimizer",
    "optim.lr": "learning rate",
    "optim.weight_decay": "weight decay",
    "optim.warmup_steps": "warm-up steps",
    "engine.name": "engine",
    "engine.precision": "precision",
    "model": "base model",
    "lora_rank": "LoRA rank",
    "seed": "seed",
}


def _recipe(config: dict[str, Any]) -> Iterable[tuple[str, str]]:
    for key, name in _RECIPE.items():
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if isinstance(value, dict):
            continue  # `model` is a section in pretraining, and the name of the base model in fine-tuning
        if key == "epochs" and config.get("max_steps"):
            continue  # `max_steps` decides the length of the run
        if value not in (None, "", 0):
            yield name, str(value)


def _metrics(folder: Path) -> Iterable[tuple[str, str]]:
    """The metrics of the last validation."""
    path = folder / METRICS
    if not path.is_file():
        return
    last: list[dict[str, Any]] = [record for record in read_metrics(path) if any(map(_is_shown, record))][-1:]
    for name, value in (item for record in last for item in record.items()):
        if _is_shown(name) and isinstance(value, int | float):
            yield name.removeprefix(VALIDATION), f"{value:.4g}"


def _is_shown(name: str) -> bool:
    return name.startswith(VALIDATION) and "seconds" not in name


def _evaluation(folder: Path) -> Iterable[str]:
    """A table of an evaluation's figures with their intervals."""
    content = evaluations.read(folder)
    rows = []
    for task, result in content["tasks"].items():
        for figure in result["figures"]:
            interval = figure.get("interval")
            shown = "" if not interval else f"{interval[0]:.4g} to {interval[1]:.4g}"
            rows.append((task, str(figure["name"]), f"{figure['value']:.4g}", shown, f"{figure['num_samples']:,}"))
    yield _table(("task", "metric", "value", "interval, 95 %", "samples"), rows)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1].replace("|", "\\|").replace("<", "&lt;")

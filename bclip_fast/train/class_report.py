"""The report at the end of `bclip finetune --task classification`: report.html, and the files of `bclip eval`."""

from __future__ import annotations

import dataclasses
import logging
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bclip_fast.data.sources import shown
from bclip_fast.errors import UserError
from bclip_fast.eval import classification, report, results, tasks
from bclip_fast.eval.embed import Embedder
from bclip_fast.eval.protocols import describe
from bclip_fast.hardware import environment_report, pick_device
from bclip_fast.html.page import format_spread
from bclip_fast.pretrained.any_model import load_model

from .class_data import ClassData
from .finetune_config import FinetuneConfig

log = logging.getLogger(__name__)

_TASK = "classification"


def write(run: Path, config: FinetuneConfig, content: ClassData) -> None:
    """Evaluate the exported model of a run on test, or on val without a test split, and write the report.

    Raises:
        UserError: an image cannot be read, unless `on_bad_image` is skip, or a file cannot be written.
    """
    split = "test" if "test" in content.parts else "val"
    if split == "val":
        log.warning("the data have no test split, so the report is on val, which chose the epoch: it is optimistic")
    part = content.parts[split]
    device = pick_device("auto")
    loaded: tuple[Any, Any, Any] = load_model(str(run), device)
    model, preprocess, tokenizer = loaded
    embedder = Embedder(
        model, preprocess, tokenizer, device=device, batch_size=config.batch_size, num_workers=config.num_workers,
        on_bad_image=config.on_bad_image,
    )  # fmt: skip
    embeddings = embedder.uncached_images(part.data)
    kept = embeddings.isfinite().all(1).nonzero()[:, 0].tolist()
    if not kept:
        raise UserError(f"none of {len(part.data)} images of split {split} can be decoded, so there is no report")
    labels, keys = [part.labels[i] for i in kept], [part.data.key(i) for i in kept]
    result = classification.measure(model.classifier, embeddings[kept], labels, keys)
    task = dataclasses.replace(tasks.load(_TASK), description=_about(split, content))
    evaluated: dict[str, Any] = {
        "model": {
            "class": type(model).__name__,
            "num_parameters": sum(weight.numel() for weight in model.parameters()),
            "logit_scale": None,
            "path": str(run),
        },
        "tasks": {_TASK: result | {"task": describe(task, part.data)}},
        "config": {
            "data": shown(config.data),
            **{name: getattr(config, name) for name in _SETTINGS},
            "lr": config.optim.lr,
        },
        "environment": environment_report(device),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    results.write(run / "eval" / split, evaluated)
    report.write(run / "report.html", evaluated, {_TASK: part.data}, run_folder=run)
    for metric in result["figures"]:
        log.info("%s %s: %.1f %% %s", split, metric["name"], 100 * metric["value"], format_spread(metric))
    log.info("report in %s", run / "report.html")


_SETTINGS = (
    "model", "label", "multi_label", "group", "class_weights", "prompts", "metric", "patience", "epochs", "batch_size",
    "seed", "lora_rank", "freeze_towers",
)  # fmt: skip


def _about(split: str, content: ClassData) -> str:
    """What a reader must know about the figures: the split, and what keeps it apart from the training samples."""
    numbers = ", ".join(f"{len(part.labels):,} in {name}" for name, part in content.parts.items())
    words = [f"Samples: {numbers}. The figures are of {split}."]
    if split == "val":
        words.append("It chose the epoch, so they are optimistic; keep a test split for a figure to publish.")
    if content.group:
        words.append(f"No {content.group} is in two splits.")
    else:
        words.append(
            "Nobody checked whether images of one patient are in two splits, which makes figures too good. --group "
            "patient_id does, with a column of patients."
        )
    return " ".join(words)

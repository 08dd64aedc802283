"""`bclip ingest label DATA`: write the kind of each figure into the manifest of a dataset.

Each shard is a task, whose result is a file beside the dataset. A killed run goes on from these files. The manifest is
replaced when all shards have results, so the dataset is complete at every moment. Its shards never change.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import tyro

from bclip_fast.data import filters
from bclip_fast.data.image_files import ImageError, open_image
from bclip_fast.data.shards.format import Sample, read_description
from bclip_fast.data.shards.manifest import MANIFEST
from bclip_fast.data.shards.reader import ShardDataset
from bclip_fast.data.storage import open_storage
from bclip_fast.errors import UserError, first_line
from bclip_fast.io import system
from bclip_fast.io.atomic import explained, replacing, write_text
from bclip_fast.io.hashing import sha256
from bclip_fast.io.progress import track

from . import executors
from .kinds import Taxonomy, read_taxonomy, taxonomy
from .kinds.classifier import VERSION_PREFIX, classifier, kind_of
from .sanitize import MAX_PIXELS
from .selection import record_filter

log = logging.getLogger(__name__)

COLUMNS = ("kind", "kind_p", "kind_by")
# Rows of the manifest in memory at a time, and shards whose results are in memory at a time.
_ROWS, _SHARDS = 4096, 4


@dataclass(frozen=True)
class LabelConfig:
    """Write the kind of each figure, such as ct or chart, and its probability into the manifest of a dataset."""

    dataset: tyro.conf.Positional[Path]
    """Folder that `bclip ingest build` wrote."""
    model: str = ""
    """Model for zero-shot classification with prompts: a run folder, a folder in open_clip's layout, hf-hub:ORG/NAME, a
    short name. If empty, a classifier without a model, from features of the image and words of the caption."""
    prompts: Path | None = None
    """Only with --model: TOML file of kinds and prompts in place of the package's (bclip_fast/ingest/kinds/kinds.toml).
    """
    batch_size: int = 64
    """Only with --model: number of images in a batch."""
    device: str = ""
    """Only with --model: device, such as cuda:1. If empty, the GPU if there is one."""
    filter: str = ""
    """Record this expression as the selection of the dataset, such as "kind in ['ct', 'mr'] and p > 0.5". Training then
    takes the selected pairs only (docs/data.md). Nothing is deleted. all: record none."""
    engine: Literal["local", "ray"] = "local"
    """local: processes of this machine. ray: a Ray cluster whose nodes share the dataset's folder."""
    workers: int = 0
    """Number of processes. 0: one for each CPU core, or with a model, one for each GPU if there are any."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.workers < 0:
            raise UserError(f"batch_size={self.batch_size} must be at least 1, and workers={self.workers} at least 0")
        if self.prompts is not None and not self.model:
            raise UserError(f"prompts={self.prompts} needs --model, which reads prompts")
        if self.filter not in ("", filters.ALL):
            filters.parse(self.filter)


@dataclass(frozen=True)
class Labeller:
    """What decides the kinds. `model` is empty for the classifier without a model, else `weights` has a hash of it."""

    model: str = ""
    prompts: str = ""
    batch_size: int = 64
    device: str = ""
    weights: str = ""

    @property
    def taxonomy(self) -> Taxonomy:
        """The kinds and their prompts."""
        return read_taxonomy(self.prompts, "prompts") if self.prompts else taxonomy()

    @property
    def name(self) -> str:
        """The value of the column kind_by: the classifier's version, or the model, hashes of weights and of prompts."""
        if not self.model:
            return f"{VERSION_PREFIX}{classifier().version}"
        return f"{self.model} {self.weights[:8]} {sha256(repr(self.taxonomy.prompts()))[:8]}"


@dataclass(frozen=True)
class LabelTask:
    """The task to label shard `number` of a split, with the samples `start` to `end` - 1."""

    dataset: str
    split: str
    shard: str
    start: int
    end: int
    results: str
    labeller: Labeller


def run(config: LabelConfig) -> None:
    """Label the dataset, and record the filter.

    Raises:
        UserError: the dataset is missing or damaged, a model or prompts can't be read, another process labels the
            dataset, or the filter selects nothing.
    """
    root = config.dataset
    description = read_description(open_storage(root))
    if not (root / MANIFEST).is_file():
        raise UserError(f"{root / MANIFEST} is missing; copy it, or build the dataset again")
    if config.filter not in ("", filters.ALL):
        filters.parse(config.filter).check_columns([*_columns(root / MANIFEST), *COLUMNS], str(root / MANIFEST))
    prompts = _read_prompts(config.prompts) if config.prompts else ""
    labeller = Labeller(config.model, prompts, config.batch_size, config.device)
    if config.model:
        labeller = dataclasses.replace(labeller, weights=_hash_of_model(labeller))
    # All files of an unfinished run are in this folder. Its name starts with a dot, as that of an unfinished build.
    work = root.resolve().with_name(f".{root.resolve().name}.labels")
    with explained(work):
        work.mkdir(exist_ok=True)
        with (work / "lock").open("w") as lock:
            try:
                system.lock(lock, wait=False)
            except OSError:
                raise UserError(f"{root}: another process labels this dataset; wait for it or end it") from None
            _label(config, labeller, description, work)
            # Under the lock, so another process that begins now does not lose its files.
            shutil.rmtree(work, ignore_errors=True)
    if config.filter:
        record_filter(root, config.filter)


def _columns(path: Path) -> list[str]:
    """Return the names of a manifest's columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names: list[str] = pq.read_schema(path).names
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}; copy it again, or build again") from None
    return names


def _read_prompts(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts={path} cannot be read: {error}; give a TOML file of kinds") from None
    read_taxonomy(text, str(path))
    return text


def _label(config: LabelConfig, labeller: Labeller, description: dict[str, Any], work: Path) -> None:
    root = config.dataset
    # Other batches or devices round differently.
    settings = json.dumps([description["fingerprint"], *dataclasses.astuple(labeller), labeller.name])
    if not (work / "settings.json").is_file() or (work / "settings.json").read_text(encoding="utf-8") != settings:
        for path in work.iterdir():
            if path.name != "lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_text(work / "settings.json", settings)
    tasks = list(_tasks(root, description, labeller, work))
    unfinished = [task for task in tasks if not _result(work, task.shard).is_file()]
    if len(unfinished) < len(tasks):
        log.info("resuming: %s of %s shards have their kinds", len(tasks) - len(unfinished), len(tasks))
    workers, share = config.workers, 0.0
    if labeller.model and (num_gpus := executors.num_gpus(config.engine)):
        workers, share = min(workers or num_gpus, num_gpus), 1.0
    results = executors.run(config.engine, label_shard, unfinished, workers, preload=[__name__], gpus=share)
    with track("shards", len(unfinished), transient=True) as advance:
        for task, result in results:
            if isinstance(result, executors.Crash):
                raise UserError(f"the process that labelled {task.shard} died (out of memory?); run it again")
            advance()
    counts, num_damaged = _write_manifest(root, work, labeller.name)
    shown = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    log.info("%s: %s", root, shown)
    if num_damaged:
        log.warning("%s: %s images are damaged, so they have no kind", root, num_damaged)


def _tasks(root: Path, description: dict[str, Any], labeller: Labeller, work: Path) -> Iterator[LabelTask]:
    for split, values in sorted(description["splits"].items()):
        start = 0
        for shard in values["files"]:
            end = start + shard["samples"]
            yield LabelTask(str(root), split, shard["name"], start, end, str(work), labeller)
            start = end


def _result(work: Path | str, shard: str) -> Path:
    return Path(work) / f"{shard}.json"


def label_shard(task: LabelTask) -> None:
    """Write the kinds and probabilities of a shard's samples: [[kind, p], ...], null for a damaged sample."""
    # A copy has no index of an earlier shard in memory.
    dataset = copy.copy(_open(task.dataset, task.split))
    samples = _readable(dataset, range(task.start, task.end))
    kinds = zero_shot(task.labeller, samples) if task.labeller.model else map(_kind_of, samples)
    write_text(_result(task.results, task.shard), json.dumps([kind and [kind[0], kind[1]] for kind in kinds]))


@functools.lru_cache(1)
def _open(root: str, split: str) -> ShardDataset:
    return ShardDataset(root, split)


def _readable(dataset: ShardDataset, positions: Sequence[int]) -> Iterator[Sample | None]:
    """Yield the samples, and None for damaged ones."""
    for position in positions:
        (sample,) = dataset.fetch([position])()
        yield sample if isinstance(sample, Sample) else None


def _kind_of(sample: Sample | None) -> tuple[str, float] | None:
    return kind_of(sample.image, sample.caption) if sample is not None else None


def zero_shot(labeller: Labeller, samples: Iterator[Sample | None]) -> Iterator[tuple[str, float] | None]:
    """Yield the most probable kind of each image by its similarity with the mean embedding of the kind's prompts."""
    import torch

    model, preprocess, classes, scale, device = _model(labeller)
    names = labeller.taxonomy.names
    # With one thread, a result doesn't depend on the number of threads. Other processes use the other cores.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        while batch := list(islice(samples, labeller.batch_size)):
            pixels: dict[int, Any] = {}
            for i, sample in enumerate(batch):
                with contextlib.suppress(ImageError):
                    if sample is not None:
                        pixels[i] = preprocess(open_image(sample.image, MAX_PIXELS).rgb())
            results: list[tuple[str, float] | None] = [None] * len(batch)
            if pixels:
                with torch.inference_mode():
                    embeddings = model.encode_image(torch.stack([*pixels.values()]).to(device))
                    logits = scale * torch.nn.functional.normalize(embeddings) @ classes.T
                rows = logits.double().softmax(1).cpu()
                if not rows.isfinite().all():
                    raise UserError(f"model={labeller.model} gives values that are not finite; take other weights")
                for i, row in zip(pixels, rows, strict=True):
                    best = int(row.argmax())
                    results[i] = names[best], round(float(row[best]), 4)
            yield from results
    finally:
        torch.set_num_threads(num_threads)


def _hash_of_model(labeller: Labeller) -> str:
    """Return a SHA-256 of the weights of a model. Raises UserError if it can't be loaded."""
    import torch

    model = _model(dataclasses.replace(labeller, device="cpu"))[0]
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@functools.lru_cache(1)
def _model(labeller: Labeller) -> tuple[Any, Any, Any, Any, Any]:
    """Return (model, preprocess, embeddings of the kinds, scale of the logits, device)."""
    import torch

    from bclip_fast.pretrained.any_model import load_model

    count = torch.cuda.device_count()
    device = torch.device(labeller.device or (f"cuda:{os.getpid() % count}" if count else "cpu"))
    model: Any
    model, preprocess, tokenizer = load_model(labeller.model, device)
    rows = []
    with torch.inference_mode():
        for prompts in labeller.taxonomy.prompts():
            texts = torch.nn.functional.normalize(model.encode_text(tokenizer(prompts).to(device)))
            rows.append(torch.nn.functional.normalize(texts.mean(0), dim=0))
        scale = model.logit_scale.detach().exp()
    return model, preprocess, torch.stack(rows), scale, device


def _write_manifest(root: Path, work: Path, name: str) -> tuple[Counter[str], int]:
    """Replace the manifest by one with the columns of the results. Return the counts of kinds and of damaged images."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    read = functools.lru_cache(_SHARDS)(lambda shard: json.loads(_result(work, shard).read_bytes()))
    path = root / MANIFEST
    counts: Counter[str] = Counter()
    num_damaged = 0
    added = [pa.field("kind", pa.string()), pa.field("kind_p", pa.float64()), pa.field("kind_by", pa.string())]
    try:
        with replacing(path, sync=True) as partial, contextlib.ExitStack() as stack:
            source = stack.enter_context(pq.ParquetFile(path))
            kept = [field for field in source.schema_arrow if field.name not in COLUMNS]
            schema = pa.schema([*kept, *added])
            writer = stack.enter_context(pq.ParquetWriter(partial, schema, compression="zstd"))
            for batch in source.iter_batches(_ROWS):
                places = zip(batch["shard"].to_pylist(), batch["position"].to_pylist(), strict=True)
                kinds = [read(shard)[position] or [None, None] for shard, position in places]
                counts.update(kind for kind, _ in kinds if kind is not None)
                num_damaged += sum(kind is None for kind, _ in kinds)
                values = [batch[field.name] for field in kept]
                values += [pa.array([kind for kind, _ in kinds], pa.string())]
                values += [pa.array([p for _, p in kinds], pa.float64()), pa.array([name] * len(kinds), pa.string())]
                writer.write_batch(pa.RecordBatch.from_arrays(values, schema=schema))
    except (pa.ArrowException, KeyError, IndexError, FileNotFoundError) as error:
        raise UserError(f"{path} doesn't fit the shards: {first_line(error)}; build the dataset again") from error
    return counts, num_damaged

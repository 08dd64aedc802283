"""`bclip ingest build SOURCE -o OUT`: JATS articles with their images to shards of figure-caption pairs.

Three stages, each of tasks that processes share and that leave a file each, whole or not at all:

1. Packages of articles to parts (`pairs`): a pure function of their files.
2. All parts to a plan (`plan`): repeated articles, duplicate images, splits, the order, the shard of every pair.
3. Shards, then the manifest, the rejects and dataset.json.

So the dataset is byte for byte the same whatever the engine and the number of workers, and a run that was killed goes
on where it was. Nothing is dropped in silence: what is no pair stands, with its reason, in OUT/rejects.parquet.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from bclip_fast.data.shards.format import to_json
from bclip_fast.data.shards.writer import Staging, write_description, write_manifest
from bclip_fast.errors import UserError
from bclip_fast.io.atomic import replacing, write_text
from bclip_fast.io.progress import track

from . import executors
from .articles import FetchError, Package, SourceError, discover
from .assign import Shard, Splits, make_plan
from .dataset import ShardTask, write_rejects, write_shard
from .extract import Options, PartTask, write_part
from .object_store import is_address, is_mirror, open_store
from .parts import Reject, part_paths, part_rejects, write_rows
from .pmc import Rules, discover_objects, select
from .sanitize import JPEG_QUALITY

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class IngestConfig:
    source: tyro.conf.Positional[str]
    """Folder of articles (`*.nxml` or `*.xml` beside their images, `.tar`, `.tar.gz`, `.tgz` packages of them), mirror
    that `bclip ingest fetch` wrote, or address of a bucket (`https://pmc-oa-opendata.s3.amazonaws.com`, `s3://...`)."""
    out: Annotated[Path, tyro.conf.arg(aliases=("-o",))]
    """Folder to write: shards, indices, manifest.parquet, rejects.parquet, dataset.json. While the run lasts, its pairs
    are held a second time in a folder beside it."""
    ids: Path | None = None
    """Of a mirror or bucket: file with the articles to take, one a line, PMC123 or PMC123.2."""
    inventory: str = ""
    """Of a bucket: its inventory, a `.csv` or `.csv.gz` file, or `latest`."""
    prefix: str = ""
    """Of a mirror or bucket: take the articles whose id starts with this (PMC100...)."""
    license: Literal["commercial", "noncommercial", "all"] = "all"
    """Articles for use of this kind: CC0, CC BY, -SA, -ND; those and CC BY-NC...; or all."""
    keep_retracted: bool = False
    """Keep retracted articles; the manifest says which they are."""
    max_short_side: int = 384
    """Larger images are reduced to this shorter side, in pixels; 0 keeps every size."""
    jpeg_quality: int = JPEG_QUALITY
    """Of the images that have to be encoded again."""
    panels: bool = False
    """Also pair panels of composite figures with their part of the caption, where both agree."""
    tokenizer: Path | None = None
    """`vocab.txt` or `tokenizer.json` to count tokens with; without it the manifest has no token counts."""
    val_fraction: float = 0.001
    """Share of the articles in split `val`; the defaults are the paper's proportions."""
    test_fraction: float = 0.05
    """Share of the articles in split `test`. Images that resemble one of it are kept out of the other splits."""
    seed: int = 0
    """Of the split and the order: both depend on ids and this number only."""
    engine: Literal["local", "ray"] = "local"
    """Processes of this machine, or a Ray cluster (RAY_ADDRESS, else one on this machine) that shares OUT's folder."""
    workers: int = 0
    """Processes; 0 is one a CPU core, 1 works in this process (where a crash of an image decoder ends the run)."""
    connections: int = 8
    """Requests to a bucket at one time, all workers together."""
    max_shard_megabytes: int = 256
    """Size at which the next shard is begun."""
    overwrite: bool = False
    """Replace a finished dataset in OUT."""

    def __post_init__(self) -> None:
        checks = {
            "max_short_side": self.max_short_side >= 0,
            "jpeg_quality": 1 <= self.jpeg_quality <= 100,
            "val_fraction": 0 <= self.val_fraction <= 1,
            "test_fraction": 0 <= self.test_fraction <= 1 - self.val_fraction,
            "workers": self.workers >= 0,
            "connections": self.connections >= 1,
            "max_shard_megabytes": self.max_shard_megabytes >= 1,
        }
        for name, is_good in checks.items():
            if not is_good:
                raise UserError(f"{name}={getattr(self, name)}: out of range")

    def options(self) -> Options:
        connections = max(1, self.connections // max(1, self.workers or executors.num_cores()))
        rules = Rules(self.license, self.keep_retracted)
        tokenizer = str(self.tokenizer or "")
        return Options(rules, self.max_short_side, self.jpeg_quality, self.panels, tokenizer, connections)

    def signature(self) -> dict[str, Any]:
        """What the bytes of the dataset depend on beside the articles, as it stands in dataset.json."""
        names = (
            "source ids inventory prefix license keep_retracted max_short_side jpeg_quality panels tokenizer "
            "val_fraction test_fraction seed max_shard_megabytes"
        ).split()
        values = {name: getattr(self, name) for name in names}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def build(config: IngestConfig) -> None:
    """Read every article of `config.source` and write the dataset, or go on with a run that was killed.

    Raises UserError: no such source, no article or no pair in it, `out` inside it or occupied; articles that could not
    be fetched this time (run it again: the others are kept).
    """
    if config.tokenizer is not None and not config.tokenizer.is_file():
        raise UserError(f"{config.tokenizer}: no such vocab.txt or tokenizer.json")
    if not is_address(config.source):
        root, out = Path(config.source).resolve(), config.out.resolve()
        if not root.is_dir():
            raise UserError(f"{config.source}: no such folder of articles")
        if out.is_relative_to(root):
            raise UserError(f"{config.out}: lies inside {config.source}; give a folder outside of the articles")
    with Staging(config.out, config.overwrite) as staging:
        try:
            _build(config, staging)
        except _NothingToBuildError as error:
            staging.discard()
            raise UserError(str(error)) from None
    log.info("wrote %s", config.out)


class _NothingToBuildError(UserError):
    """Running it again would find nothing either: no trace is left."""


def _build(config: IngestConfig, staging: Staging) -> None:
    work = staging.path / "work"
    if not _resumes(config, staging.path):
        staging.clear()
        work.mkdir()
        (work / "signature.json").write_text(to_json(config.signature()))
    if not (staging.path / "dataset.json").exists():
        num_parts = _write_parts(config, work)
        counts = _planned(config, work, num_parts)
        shards = [Shard(*shard) for shard in counts.pop("shards")]
        descriptions = _write_shards(config, work, shards)
        _finish(config, staging.path, num_parts, counts, shards, descriptions)
    shutil.rmtree(work, ignore_errors=True)
    staging.publish()


def _resumes(config: IngestConfig, folder: Path) -> bool:
    try:
        if (folder / "dataset.json").exists():
            found = json.loads((folder / "dataset.json").read_bytes())["ingest"]["config"]
        else:
            found = json.loads((folder / "work/signature.json").read_bytes())
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(found == json.loads(to_json(config.signature())))


def _packages(config: IngestConfig) -> Iterator[Package]:
    root = config.source if is_address(config.source) else str(Path(config.source).resolve())
    if not is_address(config.source) and not is_mirror(Path(root)):
        if config.ids or config.inventory or config.prefix:
            raise _NothingToBuildError(f"{config.source}: ids, inventory and prefix need a mirror or a bucket")
        yield from discover(Path(root))
        return
    store = open_store(root, config.connections)
    try:
        chosen = select(store, ids=config.ids, inventory=config.inventory, prefix=config.prefix)
        yield from discover_objects(root, chosen)
    except SourceError as error:
        raise _NothingToBuildError(str(error)) from None
    except FetchError as error:
        raise UserError(f"{error}; run it again") from None


def _write_parts(config: IngestConfig, work: Path) -> int:
    """Stage 1; the number of parts. The list of packages is made once, so that a second run does the same ones."""
    listed = work / "packages.jsonl"
    if not listed.exists():
        with replacing(listed) as partial, partial.open("w", encoding="utf-8") as file:
            file.writelines(to_json(dataclasses.asdict(package)) + "\n" for package in _packages(config))
    with listed.open(encoding="utf-8") as file:
        num_parts = sum(1 for _ in file)
    if not num_parts:
        raise _NothingToBuildError(f"{config.source}: no article found (*.nxml, *.xml, *.tar, *.tar.gz, *.tgz)")
    parts, options = str(work / "parts"), config.options()

    def tasks() -> Iterator[PartTask]:
        with listed.open(encoding="utf-8") as file:
            for number, line in enumerate(file):
                if not part_paths(parts, number)[1].exists():
                    values = json.loads(line)
                    package = Package(**{**values, "items": tuple(values["items"])})
                    yield PartTask(parts, number, package, options)

    num_left = sum(1 for _ in tasks())
    if num_left < num_parts:
        log.info("going on: %s of %s packages are done", num_parts - num_left, num_parts)
    failures = []
    results = executors.run(config.engine, write_part, tasks(), config.workers, preload=[__name__])
    for task, answer in _shown("packages", results, num_left):
        if isinstance(answer, executors.Crash):
            files = task.package.items or (task.package.name,)
            lost = (Reject("", "", file, "crash while reading the package") for file in files)
            write_rows(parts, task.number, lost)
        elif answer:
            failures.append(answer)
    if failures:
        raise UserError(
            f"{len(failures)} of {num_parts} packages could not be fetched (the first: {failures[0]}); "
            "run it again: what was read is kept"
        )
    return num_parts


def _planned(config: IngestConfig, work: Path, num_parts: int) -> dict[str, Any]:
    """Stage 2."""
    path = work / "plan.json"
    if not path.exists():
        splits = Splits(config.seed, config.val_fraction, config.test_fraction)
        counts = make_plan(work, num_parts, splits, config.max_shard_megabytes << 20)
        write_text(path, to_json(counts))
    counts = json.loads(path.read_bytes())
    if not counts["pairs"]:
        told = _told(Counter(reject.reason.partition(":")[0] for reject in part_rejects(work, num_parts)))
        raise _NothingToBuildError(
            f"{config.source}: no figure-caption pair in {counts['articles']} articles; rejects: {told}"
        )
    return counts


def _write_shards(config: IngestConfig, work: Path, shards: list[Shard]) -> list[dict[str, Any]]:
    """Stage 3; what dataset.json says of each shard."""
    (work / "shards").mkdir(exist_ok=True)
    left = [ShardTask(str(work), shard) for shard in shards if not (work / f"shards/{shard.name}.json").exists()]
    results = executors.run(config.engine, write_shard, left, config.workers, preload=[__name__])
    for task, answer in _shown("shards", results, len(left)):
        if isinstance(answer, executors.Crash):
            raise UserError(f"the process that wrote {task.shard.name} died (out of memory?); run it again")
    return [json.loads((work / f"shards/{shard.name}.json").read_bytes()) for shard in shards]


def _finish(
    config: IngestConfig,
    folder: Path,
    num_parts: int,
    counts: dict[str, Any],
    shards: list[Shard],
    written: list[dict[str, Any]],
) -> None:
    work = folder / "work"
    rows = [
        (work / f"shards/{shard.name}.rows", answer["types"]) for shard, answer in zip(shards, written, strict=True)
    ]
    write_manifest(folder, rows)
    kinds = write_rejects(folder / "rejects.parquet", part_rejects(work, num_parts))
    splits: dict[str, list[dict[str, Any]]] = {}
    for shard, answer in zip(shards, written, strict=True):
        splits.setdefault(shard.split, []).append(answer["description"])
    for split, fraction in (("val", config.val_fraction), ("test", config.test_fraction)):
        if fraction and split not in splits:
            log.warning(
                "split %s is empty: %s articles are few for a fraction of %s", split, counts["articles"], fraction
            )
    counts.pop("rejects")
    by_split = ", ".join(f"{count} {split}" for split, count in sorted(counts["by_split"].items()))
    told = counts["articles"], counts["pairs"], by_split, _told(kinds)
    log.info("%s articles, %s pairs (%s); rejects: %s", *told)
    info = {**counts, "rejects": dict(sorted(kinds.items())), "config": config.signature()}
    write_description(folder, splits, {"ingest": info})


def _told(kinds: Counter[str]) -> str:
    return "; ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or "none"


def _shown(what: str, results: Iterable[Any], total: int) -> Iterator[Any]:
    """The results, with a bar on stderr."""
    iterator = iter(results)
    first = list(islice(iterator, 1))  # starts the processes before the thread that draws the progress
    with track(what, total, transient=True) as advance:
        for result in chain(first, iterator):
            yield result
            advance()

"""`bclip ingest build SOURCE -o OUT`: build shards of figure-caption pairs from JATS articles and their images.

The build has three stages. Processes share the tasks of a stage, and each task writes its files atomically:

1. Extract the pairs of each package of articles into a part (`extract`). A part depends only on the package's files.
   With `panel_model`, a detector finds the panels of all packages before that (`panel_boxes`).
2. Make a plan from all parts (`assign`): remove repeated articles and leaks, assign each pair its split and shard.
3. Write the shards (`dataset`), then the manifest, the rejects and dataset.json.

The bytes of the dataset therefore don't depend on the engine or the number of workers, and a killed run resumes.
OUT/rejects.parquet lists every figure that gave no pair, with the reason.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from bclip_fast.data import filters
from bclip_fast.data.shards.format import to_json
from bclip_fast.data.shards.manifest import write_manifest
from bclip_fast.data.shards.staging import Staging
from bclip_fast.data.shards.verify import add_to_index
from bclip_fast.data.shards.writer import write_description
from bclip_fast.errors import UserError
from bclip_fast.io.atomic import explained, replacing, write_text
from bclip_fast.io.file_names import printable
from bclip_fast.io.progress import track

from . import executors
from .articles import FetchError, Package, SourceError
from .assign import Shard, Splits, make_plan
from .box_files import boxes_path, counts_path
from .config import IngestConfig
from .dataset import ShardTask, write_rejects, write_shard
from .discovery import discover
from .extract import PartTask, extract_part
from .object_store import is_address, is_mirror, open_store
from .panel_boxes import GROUP, BoxTask, copy_model, count_boxes, find_boxes, groups, model_identity
from .panels.detector_files import model_files
from .parts import Reject, part_paths, part_rejects, write_part
from .pmc import discover_objects, select
from .selection import log_selection, record_filter
from .unfinished import can_resume, recorded_options, work_signature

log = logging.getLogger(__name__)

_MAX_REJECTS_TO_COUNT = 1_000_000


def build(config: IngestConfig) -> None:
    """Read every article of `config.source` and write the dataset, or resume a killed run.

    Raises:
        UserError: the source is missing or has no article or pair. Or `out` is occupied or inside the source. Or a
            package could not be fetched this time. Then run it again: the parts of the other packages are kept.
    """
    if config.tokenizer is not None and not config.tokenizer.is_file():
        raise UserError(f"tokenizer={config.tokenizer} is not a file; give a vocab.txt or tokenizer.json")
    if not is_address(config.source):
        root, out = Path(config.source).resolve(), config.out.resolve()
        if not root.is_dir():
            raise UserError(
                f"source={config.source} is not a folder; give a folder of articles, a mirror or an address"
            )
        if out.is_relative_to(root):
            raise UserError(f"out={config.out} lies inside source={config.source}; give a folder outside the articles")
    with Staging(config.out, config.overwrite) as staging, explained(config.out):
        try:
            _build(config, staging)
        except _NothingToBuildError as error:
            staging.discard()
            raise UserError(str(error)) from None
    log.info("wrote %s", config.out)


class _NothingToBuildError(UserError):
    """Another run would fail in the same way, so the build deletes its files."""


def _build(config: IngestConfig, staging: Staging) -> None:
    work = staging.path / "work"
    without_texts = dataclasses.replace(config, texts=False)
    if config.texts and recorded_options(staging.path) == json.loads(to_json(without_texts.signature())):
        log.warning("%s: the unfinished build keeps no texts, so this run doesn't either", config.out)
        config = without_texts
    model = model_files(config.panel_model) if config.panel_model else {}
    signature = work_signature(config.signature(), config.tokenizer, model_identity(model) if model else "")
    if not can_resume(config.allow_changes, staging.path, signature):
        staging.clear()
        work.mkdir()
    if work.is_dir():
        write_text(work / "signature.json", to_json(signature))
    if not (staging.path / "dataset.json").exists():
        num_parts = _list_packages(config, work)
        if model:
            _write_boxes(config, work, num_parts, copy_model(model, work))
        _write_parts(config, work, num_parts)
        counts = _load_or_make_plan(config, work, num_parts)
        shards = [Shard(*shard) for shard in counts.pop("shards")]
        descriptions = _write_shards(config, work, shards)
        _finish(config, staging.path, num_parts, counts, shards, descriptions)
    else:
        # The run that wrote it may have had another filter.
        record_filter(staging.path, config.filter or filters.ALL)
    try:
        if work.exists():
            shutil.rmtree(work)
    except OSError as error:
        raise UserError(f"{work} cannot be deleted: {error.strerror}; make it writable and run it again") from error
    staging.publish()


def list_packages(config: IngestConfig) -> Iterator[Package]:
    """Yield the packages of `config.source`. Raises UserError if `config` selects articles that it cannot select."""
    root = config.source if is_address(config.source) else str(Path(config.source).resolve())
    if not is_address(config.source) and not is_mirror(Path(root)):
        if config.ids or config.inventory or config.prefix:
            raise _NothingToBuildError(
                f"source={config.source} is not a mirror or bucket; remove ids, inventory and prefix, which need one"
            )
        yield from discover(Path(root))
        return
    store = open_store(root, config.connections)
    try:
        selected = select(store, ids=config.ids, inventory=config.inventory, prefix=config.prefix)
        yield from discover_objects(root, selected)
    except SourceError as error:
        raise _NothingToBuildError(str(error)) from None
    except FetchError as error:
        raise UserError(f"{error}; run it again") from None


def _list_packages(config: IngestConfig, work: Path) -> int:
    """List the packages. Return their number. A resumed run uses the list that the first run made."""
    package_list = work / "packages.jsonl"
    if not package_list.exists():
        with replacing(package_list) as partial, partial.open("w", encoding="utf-8") as file:
            # ASCII, because a name that is not UTF-8 holds lone surrogates.
            file.writelines(json.dumps(dataclasses.asdict(package)) + "\n" for package in list_packages(config))
    num_packages = sum(1 for _ in _packages(work))
    if not num_packages:
        raise _NothingToBuildError(f"source={config.source} has no article (*.nxml, *.xml, *.tar, *.tar.gz, *.tgz)")
    return num_packages


def _packages(work: Path) -> Iterator[Package]:
    with (work / "packages.jsonl").open(encoding="utf-8") as file:
        for line in file:
            values = json.loads(line)
            yield Package(**{**values, "items": tuple(values["items"])})


def _write_boxes(config: IngestConfig, work: Path, num_parts: int, model: Path) -> None:
    """Find the panels of all packages. The file of the counts comes last."""
    folder, num_groups = work / "boxes", -(-num_parts // GROUP)
    if counts_path(folder).exists():
        return
    settings = str(model), config.panel_score, config.panel_batch_size

    def tasks() -> Iterator[BoxTask]:
        for number, packages in groups(_packages(work)):
            if not boxes_path(folder, number).exists():
                yield BoxTask(str(folder), number, packages, config.options(), *settings)

    num_left = sum(1 for _ in tasks())
    results = find_boxes(config.engine, tasks(), config.workers)
    _raise_for_failures(
        [reason for _, reason in _with_progress("panel boxes", results, num_left) if reason], num_groups
    )
    write_text(counts_path(folder), to_json(count_boxes(folder, num_groups)))


def _raise_for_failures(failures: list[str], total: int) -> None:
    if failures:
        raise UserError(
            f"{len(failures)} of {total} packages could not be fetched (the first: {failures[0]}); "
            "run it again: the other packages are kept"
        )


def _write_parts(config: IngestConfig, work: Path, num_parts: int) -> None:
    """Run stage 1."""
    parts, options = str(work / "parts"), config.options()

    def tasks() -> Iterator[PartTask]:
        for number, package in enumerate(_packages(work)):
            if not part_paths(parts, number)[1].exists():
                boxes = str(boxes_path(work / "boxes", number // GROUP)) if config.panel_model else ""
                yield PartTask(parts, number, package, options, boxes)

    num_left = sum(1 for _ in tasks())
    if num_left < num_parts:
        log.info("resuming: %s of %s packages are done", num_parts - num_left, num_parts)
    failures = []
    results = executors.run(config.engine, extract_part, tasks(), config.workers, preload=[__name__])
    for task, result in _with_progress("packages", results, num_left):
        if isinstance(result, executors.Crash):
            files = task.package.items or (task.package.name,)
            rejects = (Reject("", "", printable(file), "crash while reading the package") for file in files)
            write_part(parts, task.number, rejects)
        elif result:
            failures.append(result)
    _raise_for_failures(failures, num_parts)


def _load_or_make_plan(config: IngestConfig, work: Path, num_parts: int) -> dict[str, Any]:
    """Run stage 2. Return the counts and the shards."""
    path = work / "plan.json"
    if not path.exists():
        splits = Splits(config.seed, config.val_fraction, config.test_fraction)
        counts = make_plan(work, num_parts, splits, config.max_shard_megabytes << 20)
        write_text(path, to_json(counts))
    counts = json.loads(path.read_bytes())
    if not counts["pairs"]:
        rejects = list(islice(part_rejects(work, num_parts), _MAX_REJECTS_TO_COUNT))
        kinds = Counter(reject.reason.partition(":")[0] for reject in rejects)
        first = f" (the first: {rejects[0].file or rejects[0].article}: {rejects[0].reason})" if rejects else ""
        raise _NothingToBuildError(
            f"source={config.source} has no figure-caption pair in {counts['articles']} articles; "
            f"rejects: {_format_counts(kinds)}{first}"
        )
    return counts


def _write_shards(config: IngestConfig, work: Path, shards: list[Shard]) -> list[dict[str, Any]]:
    """Run stage 3. Return the description and the column types of each shard."""
    (work / "shards").mkdir(exist_ok=True)
    unfinished = [
        ShardTask(str(work), shard, config.version)
        for shard in shards
        if not (work / f"shards/{shard.name}.json").exists()
    ]
    results = executors.run(config.engine, write_shard, unfinished, config.workers, preload=[__name__])
    for task, result in _with_progress("shards", results, len(unfinished)):
        if isinstance(result, executors.Crash):
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
        (work / f"shards/{shard.name}.rows", result["types"]) for shard, result in zip(shards, written, strict=True)
    ]
    write_manifest(folder, rows)
    selection = {}
    if config.filter:
        log_selection(folder, config.filter)
        selection = {"filter": config.filter}
    kinds = write_rejects(folder / "rejects.parquet", part_rejects(work, num_parts))
    splits: dict[str, list[dict[str, Any]]] = {}
    for shard, result in zip(shards, written, strict=True):
        if "checksum" not in result:  # an earlier release wrote the shard before this run resumed
            add_to_index(folder, result["description"])
        splits.setdefault(shard.split, []).append(result["description"])
    for split, fraction in (("val", config.val_fraction), ("test", config.test_fraction)):
        if fraction and split not in splits:
            log.warning(
                "split %s is empty: %s_fraction=%s selected none of %s articles",
                split,
                split,
                fraction,
                counts["articles"],
            )
    counts.pop("rejects")
    by_split = ", ".join(f"{count} {split}" for split, count in sorted(counts["by_split"].items()))
    totals = counts["articles"], counts["pairs"], by_split, _format_counts(kinds)
    log.info("%s articles, %s pairs (%s); rejects: %s", *totals)
    info = {**counts, "rejects": dict(sorted(kinds.items())), "config": config.signature()}
    if config.panel_model:
        identity = json.loads((work / "signature.json").read_bytes())["panel_model"]
        info["panel_model"] = {"sha256": identity, **json.loads(counts_path(work / "boxes").read_bytes())}
    write_description(folder, splits, {"ingest": info, **selection}, config.version)


def _format_counts(kinds: Counter[str]) -> str:
    return "; ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or "none"


def _with_progress(what: str, results: Iterable[Any], total: int) -> Iterator[Any]:
    """Yield the results and show a progress bar."""
    iterator = iter(results)
    # Start the worker processes before the thread that draws the bar.
    first = list(islice(iterator, 1))
    with track(what, total, transient=True) as advance:
        for result in chain(first, iterator):
            yield result
            advance()

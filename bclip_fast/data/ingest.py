"""`bclip ingest build DIR -o OUT`: JATS articles with their images to shards of figure-caption pairs.

The work of a package of articles is a pure function, so the shards are byte for byte the same whatever the number of
workers. Nothing is dropped in silence: what is no pair stands, with its reason, in OUT/rejects.parquet.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import multiprocessing
import os
import re
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from ..errors import UserError
from .jats import Article, Figure, JatsError, parse
from .sanitize import JPEG_QUALITY, SanitizeError, sanitize
from .shards import Sample, ShardWriter
from .source import Files, ImageNames, Package, SourceError, discover, images_of, open_package

log = logging.getLogger(__name__)

_PACKAGES_AHEAD_PER_WORKER = 4


@dataclass(frozen=True)
class IngestConfig:
    source: tyro.conf.Positional[Path]
    """Folder of articles: `*.nxml` or `*.xml` beside their images, or `.tar`, `.tar.gz`, `.tgz` packages of them."""
    out: Annotated[Path, tyro.conf.arg(aliases=("-o",))]
    """Folder to write: shards, indices, manifest.parquet, rejects.parquet, dataset.json."""
    max_short_side: int = 384
    """Larger images are reduced to this shorter side, in pixels; 0 keeps every size."""
    jpeg_quality: int = JPEG_QUALITY
    """Of the images that have to be encoded again."""
    val_fraction: float = 0.001
    """Share of the articles in split `val`; the defaults are the paper's proportions."""
    test_fraction: float = 0.05
    """Share of the articles in split `test`."""
    seed: int = 0
    """Of the split: an article's split depends on its id and this number only."""
    workers: int = 0
    """Processes; 0 is one a CPU core, 1 works in this process (where a crash of an image decoder ends the run)."""
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
            "max_shard_megabytes": self.max_shard_megabytes >= 1,
        }
        for name, is_good in checks.items():
            if not is_good:
                raise UserError(f"{name}={getattr(self, name)}: out of range")


@dataclass(frozen=True)
class Reject:
    """What did not become a pair. The part of `reason` before a colon is its kind."""

    article: str
    figure: str
    file: str
    reason: str


@dataclass
class _ArticlePairs:
    identity: str
    name: str
    # Keys are made of the article's, once the parent knows that it is not a repetition.
    pairs: list[tuple[str, Sample]] = field(default_factory=list)


@dataclass
class _Result:
    articles: list[_ArticlePairs] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)


def build(config: IngestConfig) -> None:
    """Read every article under `config.source` and write the dataset.

    Raises UserError: no such folder, no article or no pair in it, `out` inside it or occupied.
    """
    root, out = config.source.resolve(), config.out.resolve()
    if not root.is_dir():
        raise UserError(f"{config.source}: no such folder of articles")
    if out.is_relative_to(root):
        raise UserError(f"{config.out}: lies inside {config.source}; give a folder outside of the articles")
    with ExitStack() as stack:
        # Taken first: an occupied OUT should be known before hours of work.
        writer = ShardWriter(config.out, max_shard_bytes=config.max_shard_megabytes << 20, overwrite=config.overwrite)
        stack.enter_context(writer)
        packages = list(discover(root))
        if not packages:
            raise UserError(f"{config.source}: no article found (*.nxml, *.xml, *.tar, *.tar.gz, *.tgz)")
        _write(config, packages, writer)
    log.info("wrote %s", config.out)


def _write(config: IngestConfig, packages: list[Package], writer: ShardWriter) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    seen: dict[str, str] = {}
    rejects: list[Reject] = []
    splits: Counter[str] = Counter()
    shown = TextColumn("packages"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    results = _results(packages, config)
    first = next(results)  # starts the processes before the thread that draws the progress
    with Progress(*shown, TextColumn("{task.description}"), transient=True, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(packages))
        result: _Result | None = first
        while result is not None:
            rejects += result.rejects
            for article in result.articles:
                if article.identity in seen:
                    reason = f"repeated article: also in {seen[article.identity]}"
                    rejects.append(Reject(article.identity, "", article.name, reason))
                    continue
                seen[article.identity] = article.name
                split = split_of(article.identity, config)
                for suffix, sample in article.pairs:
                    key = f"{_key(article.identity)}_{suffix}"
                    writer.write(dataclasses.replace(sample, key=key), split)
                    splits[split] += 1
            progress.update(task, advance=1, description=f"{len(seen)} articles, {splits.total()} pairs")
            result = next(results, None)
    kinds = Counter(reject.reason.partition(":")[0] for reject in rejects)
    told = "; ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or "none"
    if not splits:
        raise UserError(f"{config.source}: no figure-caption pair in {len(seen)} articles; rejects: {told}")
    for split, fraction in (("val", config.val_fraction), ("test", config.test_fraction)):
        if fraction and not splits[split]:
            log.warning("split %s is empty: %s articles are few for a fraction of %s", split, len(seen), fraction)
    _write_rejects(writer.staging / "rejects.parquet", rejects)
    writer.info["ingest"] = {
        "articles": len(seen),
        "pairs": splits.total(),
        "rejects": dict(sorted(kinds.items())),
        "max_short_side": config.max_short_side,
        "jpeg_quality": config.jpeg_quality,
        "val_fraction": config.val_fraction,
        "test_fraction": config.test_fraction,
        "seed": config.seed,
    }
    by_split = ", ".join(f"{count} {split}" for split, count in sorted(splits.items()))
    log.info("%s articles, %s pairs (%s); rejects: %s", len(seen), splits.total(), by_split, told)


def split_of(identity: str, config: IngestConfig) -> str:
    """train, val or test: a hash of the article's id and the seed, so that an article is never divided."""
    digest = hashlib.sha256(f"{config.seed}:{identity}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    if position < config.val_fraction:
        return "val"
    return "test" if position < config.val_fraction + config.test_fraction else "train"


def _key(identity: str) -> str:
    if re.fullmatch(r"PMC\d{1,12}", identity):
        return identity
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
    return re.sub(r"[^A-Za-z0-9]+", "-", identity).strip("-")[-48:].lstrip("-") + f"-{digest}"


def _write_rejects(path: Path, rejects: list[Reject]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = [field.name for field in dataclasses.fields(Reject)]
    table = pa.table({name: pa.array([getattr(row, name) for row in rejects], pa.string()) for name in names})
    pq.write_table(table, path, compression="zstd")


def _results(packages: list[Package], config: IngestConfig) -> Iterator[_Result]:
    """The result of every package, in order; at most a few are kept waiting."""
    workers = config.workers or len(os.sched_getaffinity(0))
    if workers == 1:
        yield from (process(package, config) for package in packages)
        return
    waiting = deque(packages)
    running: deque[tuple[Package, Future[_Result]]] = deque()
    pool = _pool(workers)
    try:
        while waiting or running:
            while waiting and len(running) < _PACKAGES_AHEAD_PER_WORKER * workers:
                package = waiting.popleft()
                running.append((package, pool.submit(process, package, config)))
            package, future = running[0]
            try:
                result = future.result()
            except BrokenProcessPool:
                # A process died (a decoder crashed, memory ran out) and took the pool along. Which package it was is
                # found by giving each that was under way a pool of its own.
                suspects = [package for package, _ in running]
                running.clear()
                for suspect in suspects:
                    yield _process_alone(suspect, config)
                pool = _pool(workers)
                continue
            running.popleft()
            yield result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _pool(workers: int) -> ProcessPoolExecutor:
    # A fork server has no threads of ours, whose locks a plain fork would copy; it imports this module once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return ProcessPoolExecutor(workers, mp_context=context)


def _process_alone(package: Package, config: IngestConfig) -> _Result:
    with _pool(1) as pool:
        try:
            return pool.submit(process, package, config).result()
        except BrokenProcessPool:
            files = package.xml_names or (package.name,)
            return _Result(rejects=[Reject("", "", file, "crash while reading the package") for file in files])


def process(package: Package, config: IngestConfig) -> _Result:
    """All pairs and rejects of a package: a function of its files and the configuration only."""
    result = _Result()
    try:
        with open_package(package) as files:
            result.rejects += [Reject("", "", name, reason) for name, reason in files.refused]
            if not files.xml_names:
                result.rejects.append(Reject("", "", package.name, "no article in the package"))
            for name in files.xml_names:
                _process_article(files, name, config, result)
    except SourceError as error:
        # The rest of a broken archive is not trusted either.
        return _Result(rejects=[Reject("", "", package.name, str(error))])
    return result


def _process_article(files: Files, name: str, config: IngestConfig, result: _Result) -> None:
    try:
        article = parse(files.read(name))
    except (JatsError, SourceError) as error:
        result.rejects.append(Reject("", "", name, str(error)))
        return
    identity = article.pmcid or article.doi or article.pmid or name.rpartition(".")[0]
    pairs = _ArticlePairs(identity, name)
    result.articles.append(pairs)
    folder = name[: name.rfind("/") + 1]
    images = ImageNames(images_of(name, files.image_names, files.xml_names))
    about = {"article": identity, **_about(article)}
    for figure in article.figures:
        for number, file, reason in _images(figure, images):
            if not reason:
                caption = " ".join(filter(None, (figure.caption, figure.graphics[number].caption)))
                try:
                    sample = _sample(files.read(folder + file), caption, config)
                except (SanitizeError, SourceError) as error:
                    reason = str(error)
            if reason:
                result.rejects.append(Reject(identity, figure.id, file, reason))
                continue
            suffix = f"f{figure.number}" + (f"_{number + 1}" if len(figure.graphics) > 1 else "")
            sample.meta.update(about, **_about_figure(figure), file=file)
            pairs.pairs.append((suffix, sample))


def _images(figure: Figure, images: ImageNames) -> Iterator[tuple[int, str, str]]:
    """(number of the graphic, file or href, reason against) for every image of a figure."""
    if not figure.graphics or figure.excluded:
        yield 0, "", figure.excluded or "no graphic in the XML"
        return
    taken: set[str] = set()
    for number, graphic in enumerate(figure.graphics):
        if not figure.caption and not graphic.caption:
            yield number, graphic.hrefs[0], "no caption"
            continue
        try:
            file = images.find(graphic.hrefs)
        except SourceError as error:
            yield number, graphic.hrefs[0], str(error)
            continue
        # Some publishers list the versions of one image without `alternatives`.
        if file not in taken:
            taken.add(file)
            yield number, file, ""


def _sample(data: bytes, caption: str, config: IngestConfig) -> Sample:
    image = sanitize(data, max_short_side=config.max_short_side, jpeg_quality=config.jpeg_quality)
    meta = {field.name: getattr(image, field.name) for field in dataclasses.fields(image) if field.name != "data"}
    return Sample("", image.data, caption, meta)


def _about(article: Article) -> dict[str, Any]:
    names = ["pmcid", "pmid", "doi", "title", "journal", "year", "licence", "licence_url"]
    if not article.licence:  # the words, for whoever has to judge them
        names.append("licence_text")
    return {name: value for name in names if (value := getattr(article, name))}


def _about_figure(figure: Figure) -> dict[str, Any]:
    values = {"figure": figure.id, "label": figure.label, "figure_licence": figure.licence}
    return {"figure_number": figure.number, **{name: value for name, value in values.items() if value}}

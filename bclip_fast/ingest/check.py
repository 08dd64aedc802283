"""`bclip ingest check PATH...`: say in words what becomes of articles and images, and why."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from bclip_fast.errors import UserError
from bclip_fast.io.file_names import printable
from bclip_fast.io.hashing import sha256

from .articles import XML_SUFFIXES, ArticleArchive, ArticleFiles, FetchError, Package, SourceError, read_regular_file
from .build import list_packages
from .config import IngestConfig
from .discovery import archive_package, is_archive
from .extract import Options, open_articles, process_file
from .jats import Article, JatsError, read_article, split
from .jats_figures import Figure
from .licences import with_metadata
from .parts import Event, Pair, Reject
from .pmc import Rules
from .sanitize import JPEG_QUALITY, SanitizedImage, SanitizeError, sanitize

_MAX_TEXT = 400


@dataclass(frozen=True)
class CheckConfig:
    """Say in words what `bclip ingest build` makes of articles and images: captions, licence, conversion, rejects."""

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """Articles (`*.nxml`, `*.xml`), images, packages (`*.tar`, `*.tar.gz`, `*.tgz`), or folders of them."""
    license: Literal["commercial", "noncommercial", "all"] = "all"
    """Licences to accept, as for `bclip ingest build`."""
    max_short_side: int = 384
    """Limit for the shorter side of an image, in pixels. 0: no limit."""
    panels: bool = False
    """Also split composite figures."""


def run(config: CheckConfig) -> int:
    """Print the explanation of each path. Return 0. Raises UserError if a path is missing."""
    if not config.paths:
        raise UserError("no path; give articles, images, packages or folders")
    for path in config.paths:
        for line in explain(path, config):
            print(line)
    return 0


def explain(path: Path, config: CheckConfig) -> Iterator[str]:
    """Yield lines that say what becomes of a file or folder. Raises UserError if it is missing."""
    if not path.exists():
        raise UserError(f"{printable(str(path))}: no such file or folder")
    options = Options(Rules(config.license), config.max_short_side, JPEG_QUALITY, config.panels)
    path = path.resolve()
    if path.is_dir():
        packages = list_packages(IngestConfig(str(path), path / "unused"))
    elif path.name.lower().endswith(XML_SUFFIXES):
        packages = iter([Package("folder", str(path.parent), "", (path.name,))])
    elif is_archive(path.name):
        packages = iter([archive_package(path)])
    else:
        yield from _explain_image(path, config)
        return
    is_empty = True
    for package in packages:
        is_empty = False
        if package.kind == "unread":
            yield f"{printable(package.name)}: rejected: {package.items[0]}"
            continue
        try:
            with open_articles(package, options) as archive:
                for files in archive.articles():
                    yield from _explain_file(archive, files, options)
                yield from (f"{printable(name)}: rejected: {reason}" for _, name, reason in archive.refused)
        except (SourceError, FetchError) as error:
            yield f"{printable(package.name)}: rejected: {error}"
    if is_empty:
        yield f"{printable(str(path))}: rejected: no article in the folder"


def _explain_image(path: Path, config: CheckConfig) -> Iterator[str]:
    try:
        data = read_regular_file(path, path.parent)
        image = sanitize(data, max_short_side=config.max_short_side)
    except (SourceError, SanitizeError) as error:
        yield f"{printable(path.name)}: rejected: {error}"
    else:
        yield f"{printable(path.name)}: {_conversion(image, sha256(data))}"


def _conversion(image: SanitizedImage, source_sha256: str) -> str:
    source = f"{image.source_format} of mode {image.source_mode}, {image.source_width} x {image.source_height} pixels"
    if sha256(image.data) == source_sha256:
        return f"{source}; its bytes are kept"
    return f"{source}; encoded as RGB JPEG of {image.width} x {image.height} pixels"


def _explain_file(archive: ArticleArchive, files: ArticleFiles, options: Options) -> Iterator[str]:
    name = printable(files.xml_name)
    events = deque(process_file(archive, files, options))
    try:
        elements, _ = split(archive.read(files.xml_name))
    except (JatsError, SourceError):
        elements = []
    for number, element in enumerate(elements, 1):
        try:
            article = read_article(element)
        except JatsError:
            continue
        place = name if len(elements) == 1 else f"{name}#{number}"
        yield from _explain_article(article, files, place)
        for figure in article.figures:
            yield from _explain_figure(figure, events)
    for event in events:
        if isinstance(event, Reject):
            yield f"  {event.file or name}: rejected: {event.reason}"


def _explain_article(article: Article, files: ArticleFiles, place: str) -> Iterator[str]:
    identity = article.pmcid or article.doi or article.pmid or "an article without id"
    yield f"{place}: {identity}, {len(article.figures)} figures: {_shortened(article.title) or 'no title'}"
    licence = with_metadata(article.terms, files.metadata.get("licence", ""))
    yield f"  licence: {licence.code or 'none'}{f' ({licence.problem})' if licence.problem else ''}"
    if licence.url:
        yield f"    address: {licence.url}"
    if licence.text:
        yield f"    words: {_shortened(licence.text)}"
    choices = ("commercial", "noncommercial", "all")
    accepted = [name for name in choices if not Rules(name).licence_problem(licence.code)]
    yield f"    accepted with --license {' or '.join(accepted)}"


def _explain_figure(figure: Figure, events: deque[Event]) -> Iterator[str]:
    name = ", ".join(filter(None, (figure.id and f"id {figure.id}", figure.label)))
    yield f"  figure {figure.number}{f' ({name})' if name else ''}"
    language = f", {figure.language}" if figure.language else ""
    language += ", followed by the English version" if figure.translation else ""
    sources = {"group": "caption of the group", "own": "caption", "member": "caption"}
    for source, text in figure.parts:
        yield f"    {sources[source]}{language}: {_shortened(text)}"
    if not figure.parts:
        yield "    caption: none"
    if figure.licence:
        yield f"    its own licence: {_shortened(figure.licence)}"
    for number, graphic in enumerate(figure.graphics, 1):
        yield f"    image {number}: {' or '.join(graphic.hrefs)}"
        if graphic.caption:
            yield f"      its caption: {_shortened(graphic.caption)}"
    while events and not isinstance(events[0], Pair | Reject):
        events.popleft()
    num_images = max(1, len(figure.graphics))
    while events and num_images >= 0 and _is_of(events[0], figure):
        event = events[0]
        num_images -= not (isinstance(event, Pair) and "panel" in event.meta)
        if num_images < 0:
            break
        events.popleft()
        if isinstance(event, Reject):
            yield f"    {event.file or 'figure'}: rejected: {event.reason}"
        elif isinstance(event, Pair):
            panel = f"panel {event.meta['panel']}: " if "panel" in event.meta else ""
            conversion = panel or f"{event.meta['file']}: {_conversion(event.image, event.meta['source_sha256'])}: "
            yield f"    {conversion}pair {event.suffix}: {_shortened(event.caption)}"


def _is_of(event: Event, figure: Figure) -> bool:
    if isinstance(event, Pair):
        return bool(re.match(rf"f{figure.number}(?!\d)", event.suffix))
    return isinstance(event, Reject) and event.figure == figure.id


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}... ({len(text)} characters)"

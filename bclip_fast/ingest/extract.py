"""Extract the pairs and rejects of articles from their figures, images and captions. Write a part for each package."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import html
import logging
import pathlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from bclip_fast.errors import first_line
from bclip_fast.io.file_names import printable

from .articles import ArticleArchive, ArticleFiles, FetchError, Package, SourceError
from .box_files import read_boxes
from .caption_facts import caption_facts, language_detector
from .discovery import open_package
from .image_formats import num_pixels
from .image_names import ImageNames
from .jats import Article, JatsError, read_article, split
from .jats_figures import Figure
from .kinds.classifier import classifier, kind_columns
from .licences import Licence, with_metadata
from .mentions import MAX_SENTENCE, Mentions
from .panels import split_caption, split_panels
from .parts import ArticleStart, Event, Pair, Reject, write_part
from .pmc import Rules, open_objects
from .sanitize import JPEG_QUALITY, SanitizeError, sanitize

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """The options that affect the pairs of an article, and the number of connections to a bucket."""

    rules: Rules = field(default_factory=Rules)
    max_short_side: int = 384
    jpeg_quality: int = JPEG_QUALITY
    panels: bool = False
    texts: bool = True
    tokenizer: str = ""
    connections: int = 8
    kinds: bool = False
    # Boxes of figures by the SHA-256 of their images, as `panel_boxes` finds them.
    boxes: dict[str, Any] = field(default_factory=dict, hash=False, compare=False)


def process(package: Package, options: Options, make: Any = None) -> Iterator[Event]:
    """Yield all pairs and rejects of a package. They depend only on its files and the options. Raises FetchError.

    Args:
        make: function that yields the events of an image, with the arguments of `_first_usable`, in its place.
    """
    if package.kind == "unread":
        yield Reject("", "", printable(package.name), package.items[0])
        return
    # A broken tokenizer, detector or classifier ends the run, not each article.
    language_detector()
    if options.tokenizer:
        _token_counter(options.tokenizer)
    if options.kinds:
        classifier()
    try:
        with open_articles(package, options) as archive:
            for files in archive.articles():
                try:
                    yield from process_file(archive, files, options, make)
                except Exception as error:
                    yield _internal_error(error, printable(files.xml_name))
            for article_id, name, reason in archive.refused:
                yield Reject(article_id, "", printable(name), reason)
    except SourceError as error:
        yield Reject("", "", printable(package.name), str(error))


def open_articles(package: Package, options: Options) -> AbstractContextManager[ArticleArchive]:
    """Open a package of any kind that has articles. Raises SourceError."""
    if package.kind == "objects":
        return open_objects(package, options.rules, options.connections)
    return open_package(package)


def _internal_error(error: Exception, place: str) -> Reject:
    """Return a reject for a fault of this program, which must not end a run of a million articles.

    Raise `error` again if it is not one: if the source failed, so that another run may succeed.
    """
    if isinstance(error, (FetchError, SourceError)):
        raise error
    log.debug("%s", place, exc_info=error)
    return Reject("", "", place, f"internal error: {type(error).__name__} {first_line(error)}"[:200])


def process_file(archive: ArticleArchive, files: ArticleFiles, options: Options, make: Any = None) -> Iterator[Event]:
    """Yield the pairs and rejects of an XML file, which holds an article or a set of articles. `make`: see process."""
    name = printable(files.xml_name)
    article_id = files.metadata.get("version", "").partition(".")[0]
    try:
        elements, problems = split(archive.read(files.xml_name))
    except (JatsError, SourceError) as error:
        yield Reject(article_id, "", name, str(error))
        return
    yield from (Reject(article_id, "", name, f"article missing in the set: {problem}") for problem in problems)
    images = ImageNames(files.image_names)
    for number, element in enumerate(elements, 1):
        place = name if len(elements) == 1 else f"{name}#{number}"
        try:
            yield from _process_article(
                archive, files, read_article(element), place, images, options, make or _first_usable
            )
        except JatsError as error:
            yield Reject(article_id, "", place, str(error))
        except Exception as error:
            yield _internal_error(error, place)


def _process_article(
    archive: ArticleArchive,
    files: ArticleFiles,
    article: Article,
    place: str,
    images: ImageNames,
    options: Options,
    make: Any,
) -> Iterator[Event]:
    """Yield the pairs and rejects of an article. `place`: its file, and its number if the file is a set of articles."""
    identity = article.pmcid or article.doi or article.pmid or _without_xml_suffix(place)
    yield ArticleStart(identity, place)
    licence = with_metadata(article.terms, files.metadata.get("licence", ""))
    if problem := options.rules.licence_problem(licence.code, licence.problem):
        yield Reject(identity, "", place, problem)
        return
    metadata = {"article": identity, **_article_metadata(article, licence, files.metadata)}
    words = licence.text if licence.says_terms else ""
    folder = files.xml_name[: files.xml_name.rfind("/") + 1]
    for figure in article.figures:
        for number, candidates, reason in _images(figure, images, options.rules):
            if reason:
                yield Reject(identity, figure.id, printable(candidates[0]), reason)
                continue
            caption = " ".join(filter(None, (figure.caption, figure.graphics[number].caption)))
            suffix = f"f{figure.number}" + (f"_{number + 1}" if len(figure.graphics) > 1 else "")
            values = {**metadata, **_figure_metadata(figure)}
            pair = _Source(suffix, caption, values, figure.mentions, words, article.title)
            yield from make(archive, folder, candidates, pair, figure, options)
    for loose in article.loose_graphics:
        yield Reject(identity, "", loose.href, loose.reason)


def _without_xml_suffix(place: str) -> str:
    stem, _, end = place.rpartition(".")
    return f"{stem}{end[end.find('#') :] if '#' in end else ''}"


def _images(figure: Figure, images: ImageNames, rules: Rules) -> Iterator[tuple[int, list[str], str]]:
    """Yield (number of the graphic, files of its versions or its href, reason to reject it) for every image."""
    if not figure.graphics or figure.excluded:
        yield 0, [""], figure.excluded or "no graphic in the XML"
        return
    used_files: set[str] = set()
    for number, graphic in enumerate(figure.graphics):
        if not figure.caption and not graphic.caption:
            yield number, [graphic.hrefs[0]], "no caption"
            continue
        # Without its own licence, a figure has the article's licence.
        if figure.licence and (problem := rules.licence_problem(figure.licence)):
            yield number, [graphic.hrefs[0]], f"figure's own {problem[:200]}"
            continue
        try:
            files = images.find_all(graphic.hrefs, graphic.thumbnails)
        except SourceError as error:
            yield number, [graphic.hrefs[0]], str(error)
            continue
        # Some publishers list the versions of one image without `alternatives`.
        if files[0] not in used_files:
            used_files.add(files[0])
            yield number, files, ""


@dataclass(frozen=True)
class _Source:
    """The parts of a pair that don't depend on its image."""

    suffix: str
    caption: str
    meta: dict[str, Any]
    mentions: Mentions
    licence_text: str
    title: str


def _first_usable(
    archive: ArticleArchive, folder: str, candidates: list[str], source: _Source, figure: Figure, options: Options
) -> list[Event]:
    """Return the pairs of the largest version of an image that can be decoded. If no version can, return a reject."""
    failure: tuple[str, str] | None = None
    for file, data, problem in read_versions(archive, folder, candidates):
        reason = problem
        if not reason:
            try:
                return list(_pairs(data, file, source, options))
            except SourceError as error:
                reason = str(error)
            except SanitizeError as error:
                reason = str(error)
        failure = failure or (file, reason)
    assert failure is not None
    return [Reject(source.meta["article"], figure.id, printable(failure[0]), failure[1])]


def read_versions(archive: ArticleArchive, folder: str, files: list[str]) -> list[tuple[str, bytes, str]]:
    """Return (file, content, reason why it cannot be read) of an image's versions, the largest image first.

    Versions with at least 90 % of the largest one's pixels count as equally large. The order of `files` decides then.
    """
    versions = []
    for file in files:
        try:
            versions.append((file, archive.read(folder + file), ""))
        except SourceError as error:
            versions.append((file, b"", str(error)))
    if len(versions) > 1:
        pixels = {file: num_pixels(data) for file, data, _ in versions}
        enough = 0.9 * max(pixels.values())
        versions.sort(key=lambda version: -min(pixels[version[0]], enough))
    return versions


def _pairs(data: bytes, file: str, source: _Source, options: Options) -> Iterator[Pair]:
    """Yield the complete figure, then its panels if the options ask for them."""
    image = sanitize(data, max_short_side=options.max_short_side, jpeg_quality=options.jpeg_quality)
    image_metadata = {item.name: getattr(image, item.name) for item in dataclasses.fields(image) if item.name != "data"}
    hashes = {"source_sha256": hashlib.sha256(data).hexdigest(), "source_bytes": len(data)}
    meta = {**source.meta, "file": printable(file), **image_metadata, **hashes}
    caption = source.caption
    paragraphs, words = tuple(source.mentions.paragraphs), source.licence_text
    texts = _texts(source, caption, source.mentions.sentences, split_caption(caption)) if options.texts else None
    facts = _facts(caption, meta, image.data, options)
    yield Pair(source.suffix, image, caption, meta | _token_count(caption, options), paragraphs, words, texts, facts)
    if not options.panels:
        return
    for panel in split_panels(data, caption, boxes=options.boxes.get(meta["source_sha256"])):
        part = sanitize(panel.image, max_short_side=options.max_short_side, jpeg_quality=options.jpeg_quality)
        panel_metadata = {
            "panel": panel.label,
            "panel_box": list(panel.box),
            "width": part.width,
            "height": part.height,
        }
        panel_metadata |= {"phash": part.phash, "source_sha256": hashlib.sha256(panel.image).hexdigest()}
        yield Pair(
            f"{source.suffix}_p{panel.label}",
            part,
            panel.caption,
            meta | panel_metadata | _token_count(panel.caption, options),
            licence_text=words,
            texts=_texts(source, panel.caption, [], {}) if options.texts else None,
            facts=_facts(panel.caption, meta, part.data, options),
        )


def _texts(source: _Source, caption: str, sentences: list[str], panels: dict[str, str]) -> dict[str, list[str]]:
    """Return the texts of an image in addition to its caption, by kind. Each has at most MAX_SENTENCE characters."""
    title = source.title.rstrip(" .")
    titled = [f"{title}. {caption}"] if title else []
    texts = {"mention": sentences, "panel": list(dict.fromkeys(panels.values())), "title": titled}
    return {kind: [text[:MAX_SENTENCE] for text in each] for kind, each in texts.items() if each}


def _facts(caption: str, meta: dict[str, Any], image: bytes, options: Options) -> dict[str, Any]:
    """Return the facts about the caption and the image of a figure or panel, whose metadata are `meta`."""
    facts = caption_facts(caption, meta.get("label", ""), meta.get("language", ""))
    return facts | kind_columns(image, caption) if options.kinds else facts


def _token_count(caption: str, options: Options) -> dict[str, int]:
    return {"num_tokens": _token_counter(options.tokenizer)(caption)} if options.tokenizer else {}


@functools.cache
def _token_counter(path: str) -> Callable[[str], int]:
    """Return a function that counts the tokens of a caption, including the start and end tokens.

    It repairs the text as training does (ftfy, HTML entities).

    Args:
        path: a `tokenizer.json` or a BERT's `vocab.txt`, with its settings beside it.
    """
    import ftfy

    from bclip_fast.model import tokenizer_files

    tokenizer = tokenizer_files.read(pathlib.Path(path)).fast
    tokenizer.no_padding()
    tokenizer.no_truncation()
    special = 2 - len(tokenizer.encode("").ids)
    return lambda text: special + len(tokenizer.encode(html.unescape(html.unescape(ftfy.fix_text(text)))).ids)


def _article_metadata(article: Article, licence: Licence, stated: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of an article. `stated`: facts of the source, which count more than those of the XML."""
    names = ("pmcid", "pmid", "doi", "title", "journal", "year", "citation")
    values = {name: getattr(article, name) for name in names}
    values |= {"licence_url": licence.url, "licence_conflict": licence.conflict}
    values |= {name: value for name, value in stated.items() if value != ""} | {"licence": licence.code}
    return {name: value for name, value in values.items() if value not in ("", None)}


def _figure_metadata(figure: Figure) -> dict[str, Any]:
    values = {"figure": figure.id, "label": figure.label, "figure_licence": figure.licence}
    values |= {"language": figure.language, "translation": figure.translation}
    return {"figure_number": figure.number, **{name: value for name, value in values.items() if value}}


@dataclass(frozen=True)
class PartTask:
    """The task to write part `number` from a package. `boxes`: file of a detector's boxes, if there is one."""

    folder: str
    number: int
    package: Package
    options: Options
    boxes: str = ""


def extract_part(task: PartTask) -> str:
    """Write the part of a package. Return an empty string, or why the package couldn't be read this time."""
    options = task.options
    if task.boxes:
        options = dataclasses.replace(options, boxes=read_boxes(task.boxes))
    try:
        write_part(task.folder, task.number, process(task.package, options))
    except FetchError as error:
        return str(error)
    return ""

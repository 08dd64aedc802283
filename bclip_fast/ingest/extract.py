"""Extract the pairs and rejects of articles from their figures, images and captions. Write a part for each package."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import html
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from .articles import ArticleArchive, ArticleFiles, FetchError, Package, SourceError, open_package
from .image_names import ImageNames
from .jats import Article, Figure, JatsError, parse
from .panels import split_panels
from .parts import ArticleStart, Event, Pair, Reject, write_part
from .pmc import Rules, open_objects
from .sanitize import JPEG_QUALITY, SanitizeError, sanitize


@dataclass(frozen=True)
class Options:
    """The options that affect the pairs of an article, and the number of connections to a bucket."""

    rules: Rules = field(default_factory=Rules)
    max_short_side: int = 384
    jpeg_quality: int = JPEG_QUALITY
    panels: bool = False
    tokenizer: str = ""
    connections: int = 8


def process(package: Package, options: Options) -> Iterator[Event]:
    """Yield all pairs and rejects of a package. They depend only on its files and the options. Raises FetchError."""
    try:
        with _open(package, options) as archive:
            for article in archive.articles():
                yield from _process_article(archive, article, options)
            yield from (Reject(article_id, "", name, reason) for article_id, name, reason in archive.refused)
    except SourceError as error:
        yield Reject("", "", package.name, str(error))


def _open(package: Package, options: Options) -> AbstractContextManager[ArticleArchive]:
    if package.kind == "objects":
        return open_objects(package, options.rules, options.connections)
    return open_package(package)


def _process_article(archive: ArticleArchive, files: ArticleFiles, options: Options) -> Iterator[Event]:
    name = files.xml_name
    try:
        article = parse(archive.read(name))
    except (JatsError, SourceError) as error:
        yield Reject(files.metadata.get("version", "").partition(".")[0], "", name, str(error))
        return
    identity = article.pmcid or article.doi or article.pmid or name.rpartition(".")[0]
    yield ArticleStart(identity, name)
    source_metadata = {key: value for key, value in files.metadata.items() if value != ""}
    article_metadata = {"article": identity, **_article_metadata(article), **source_metadata}
    if problem := options.rules.licence_problem(article_metadata.get("licence", "")):
        yield Reject(identity, "", name, problem)
        return
    folder = name[: name.rfind("/") + 1]
    images = ImageNames(files.image_names)
    for figure in article.figures:
        for number, file, reason in _images(figure, images, options.rules):
            pairs: list[Pair] = []
            if not reason:
                caption = " ".join(filter(None, (figure.caption, figure.graphics[number].caption)))
                suffix = f"f{figure.number}" + (f"_{number + 1}" if len(figure.graphics) > 1 else "")
                try:
                    data = archive.read(folder + file)
                    meta = {**article_metadata, **_figure_metadata(figure), "file": file}
                    pairs = list(_pairs(data, suffix, caption, meta, figure.mentions, options))
                except (SanitizeError, SourceError) as error:
                    reason = str(error)
            if reason:
                yield Reject(identity, figure.id, file, reason)
            yield from pairs


def _images(figure: Figure, images: ImageNames, rules: Rules) -> Iterator[tuple[int, str, str]]:
    """Yield (number of the graphic, file or href, reason to reject it) for every image of a figure."""
    if not figure.graphics or figure.excluded:
        yield 0, "", figure.excluded or "no graphic in the XML"
        return
    used_files: set[str] = set()
    for number, graphic in enumerate(figure.graphics):
        if not figure.caption and not graphic.caption:
            yield number, graphic.hrefs[0], "no caption"
            continue
        # Without its own licence, a figure has the article's licence.
        if figure.licence and (problem := rules.licence_problem(figure.licence)):
            yield number, graphic.hrefs[0], f"figure's own {problem[:200]}"
            continue
        try:
            file = images.find(graphic.hrefs)
        except SourceError as error:
            yield number, graphic.hrefs[0], str(error)
            continue
        # Some publishers list the versions of one image without `alternatives`.
        if file not in used_files:
            used_files.add(file)
            yield number, file, ""


def _pairs(
    data: bytes, suffix: str, caption: str, meta: dict[str, Any], mentions: tuple[str, ...], options: Options
) -> Iterator[Pair]:
    """Yield the complete figure, then its panels if the options ask for them."""
    image = sanitize(data, max_short_side=options.max_short_side, jpeg_quality=options.jpeg_quality)
    image_metadata = {item.name: getattr(image, item.name) for item in dataclasses.fields(image) if item.name != "data"}
    meta |= image_metadata | {"source_sha256": hashlib.sha256(data).hexdigest(), "source_bytes": len(data)}
    yield Pair(suffix, image, caption, meta | _token_count(caption, options), mentions)
    if not options.panels:
        return
    for panel in split_panels(data, caption):
        part = sanitize(panel.image, max_short_side=options.max_short_side, jpeg_quality=options.jpeg_quality)
        panel_metadata = {
            "panel": panel.label,
            "panel_box": list(panel.box),
            "width": part.width,
            "height": part.height,
        }
        panel_metadata |= {"phash": part.phash, "source_sha256": hashlib.sha256(panel.image).hexdigest()}
        yield Pair(
            f"{suffix}_p{panel.label}",
            part,
            panel.caption,
            meta | panel_metadata | _token_count(panel.caption, options),
        )


def _token_count(caption: str, options: Options) -> dict[str, int]:
    return {"num_tokens": _token_counter(options.tokenizer)(caption)} if options.tokenizer else {}


@functools.cache
def _token_counter(path: str) -> Callable[[str], int]:
    """Return a function that counts the tokens of a caption, including the start and end tokens.

    It repairs the text as training does (ftfy, HTML entities).

    Args:
        path: a `tokenizer.json`, or the `vocab.txt` of an uncased BERT.
    """
    import ftfy
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    if path.endswith(".json"):
        tokenizer = Tokenizer.from_file(path)
        tokenizer.no_padding()
        tokenizer.no_truncation()
    else:
        tokenizer = Tokenizer(models.WordPiece.from_file(path, unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = 2 - len(tokenizer.encode("").ids)
    return lambda text: special + len(tokenizer.encode(html.unescape(html.unescape(ftfy.fix_text(text)))).ids)


def _article_metadata(article: Article) -> dict[str, Any]:
    names = ["pmcid", "pmid", "doi", "title", "journal", "year", "citation", "licence", "licence_url"]
    if not article.licence:  # a person must judge the text of the licence
        names.append("licence_text")
    return {name: value for name in names if (value := getattr(article, name))}


def _figure_metadata(figure: Figure) -> dict[str, Any]:
    values = {"figure": figure.id, "label": figure.label, "figure_licence": figure.licence}
    return {"figure_number": figure.number, **{name: value for name, value in values.items() if value}}


@dataclass(frozen=True)
class PartTask:
    """The task to write part `number` from a package."""

    folder: str
    number: int
    package: Package
    options: Options


def extract_part(task: PartTask) -> str:
    """Write the part of a package. Return an empty string, or why the package couldn't be read this time."""
    try:
        write_part(task.folder, task.number, process(task.package, task.options))
    except FetchError as error:
        return str(error)
    return ""

"""The work of an article: its figures, their images, their captions, as pairs and rejects; a part for each package."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import html
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from .articles import ArticleFiles, FetchError, Files, Package, SourceError, open_package
from .image_names import ImageNames
from .jats import Article, Figure, JatsError, parse
from .panels import split_panels
from .parts import Begin, Pair, Reject, write_rows
from .pmc import Rules, open_objects
from .sanitize import JPEG_QUALITY, SanitizeError, sanitize


@dataclass(frozen=True)
class Options:
    """What the pairs of an article depend on beside its files."""

    rules: Rules = field(default_factory=Rules)
    max_short_side: int = 384
    jpeg_quality: int = JPEG_QUALITY
    panels: bool = False
    tokenizer: str = ""
    connections: int = 8


def process(package: Package, options: Options) -> Iterator[Begin | Pair | Reject]:
    """All pairs and rejects of a package: a function of its files and the options only. Raises FetchError."""
    try:
        with _opened(package, options) as files:
            for article in files.articles():
                yield from _process_article(files, article, options)
            yield from (Reject(article_id, "", name, reason) for article_id, name, reason in files.refused)
    except SourceError as error:
        yield Reject("", "", package.name, str(error))


def _opened(package: Package, options: Options) -> AbstractContextManager[Files]:
    if package.kind == "objects":
        return open_objects(package, options.rules, options.connections)
    return open_package(package)


def _process_article(files: Files, source: ArticleFiles, options: Options) -> Iterator[Begin | Pair | Reject]:
    name = source.xml_name
    try:
        article = parse(files.read(name))
    except (JatsError, SourceError) as error:
        yield Reject(source.about.get("version", "").partition(".")[0], "", name, str(error))
        return
    identity = article.pmcid or article.doi or article.pmid or name.rpartition(".")[0]
    yield Begin(identity, name)
    known = {key: value for key, value in source.about.items() if value != ""}
    about = {"article": identity, **_about(article), **known}
    if problem := options.rules.licence_problem(about.get("licence", "")):
        yield Reject(identity, "", name, problem)
        return
    folder = name[: name.rfind("/") + 1]
    images = ImageNames(source.image_names)
    for figure in article.figures:
        for number, file, reason in _images(figure, images, options.rules):
            pairs: list[Pair] = []
            if not reason:
                caption = " ".join(filter(None, (figure.caption, figure.graphics[number].caption)))
                suffix = f"f{figure.number}" + (f"_{number + 1}" if len(figure.graphics) > 1 else "")
                try:
                    data = files.read(folder + file)
                    meta = {**about, **_about_figure(figure), "file": file}
                    pairs = list(_pairs(data, suffix, caption, meta, figure.mentions, options))
                except (SanitizeError, SourceError) as error:
                    reason = str(error)
            if reason:
                yield Reject(identity, figure.id, file, reason)
            yield from pairs


def _images(figure: Figure, images: ImageNames, rules: Rules) -> Iterator[tuple[int, str, str]]:
    """(number of the graphic, file or href, reason against) for every image of a figure."""
    if not figure.graphics or figure.excluded:
        yield 0, "", figure.excluded or "no graphic in the XML"
        return
    taken: set[str] = set()
    for number, graphic in enumerate(figure.graphics):
        if not figure.caption and not graphic.caption:
            yield number, graphic.hrefs[0], "no caption"
            continue
        # A figure that says nothing of a licence has that of its article.
        if figure.licence and (problem := rules.licence_problem(figure.licence)):
            yield number, graphic.hrefs[0], f"figure's own {problem[:200]}"
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


def _pairs(
    data: bytes, suffix: str, caption: str, meta: dict[str, Any], mentions: tuple[str, ...], options: Options
) -> Iterator[Pair]:
    """The whole figure, then its panels where they were asked for and found."""
    image = sanitize(data, max_short_side=options.max_short_side, jpeg_quality=options.jpeg_quality)
    facts = {item.name: getattr(image, item.name) for item in dataclasses.fields(image) if item.name != "data"}
    meta |= facts | {"source_sha256": hashlib.sha256(data).hexdigest(), "source_bytes": len(data)}
    yield Pair(suffix, image, caption, meta | _counted(caption, options), mentions)
    if not options.panels:
        return
    for panel in split_panels(data, caption):
        part = sanitize(panel.image, max_short_side=options.max_short_side, jpeg_quality=options.jpeg_quality)
        found = {"panel": panel.label, "panel_box": list(panel.box), "width": part.width, "height": part.height}
        found |= {"phash": part.phash, "source_sha256": hashlib.sha256(panel.image).hexdigest()}
        yield Pair(f"{suffix}_p{panel.label}", part, panel.caption, meta | found | _counted(panel.caption, options))


def _counted(caption: str, options: Options) -> dict[str, int]:
    return {"num_tokens": _counter(options.tokenizer)(caption)} if options.tokenizer else {}


@functools.cache
def _counter(path: str) -> Callable[[str], int]:
    """Tokens of a caption, start and end included, from a `tokenizer.json` or BERT's `vocab.txt`, uncased; the text is
    repaired first as it is before training (ftfy, HTML entities)."""
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


def _about(article: Article) -> dict[str, Any]:
    names = ["pmcid", "pmid", "doi", "title", "journal", "year", "citation", "licence", "licence_url"]
    if not article.licence:  # the words, for whoever has to judge them
        names.append("licence_text")
    return {name: value for name in names if (value := getattr(article, name))}


def _about_figure(figure: Figure) -> dict[str, Any]:
    values = {"figure": figure.id, "label": figure.label, "figure_licence": figure.licence}
    return {"figure_number": figure.number, **{name: value for name, value in values.items() if value}}


@dataclass(frozen=True)
class PartTask:
    folder: str
    number: int
    package: Package
    options: Options


def write_part(task: PartTask) -> str:
    """Process a package into its part; the answer is empty, or why it couldn't be read this time."""
    try:
        write_rows(task.folder, task.number, process(task.package, task.options))
    except FetchError as error:
        return str(error)
    return ""

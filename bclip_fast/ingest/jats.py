"""The figures and captions of an article in JATS (1.0 to 1.3) or in the older NLM DTDs (2.x, 3.0).

The rules:
- Every `fig` counts (in the body, a floats-group, sub-article, appendix or box), except inside supplementary material
  and table-wraps. A graphic outside `fig` and `fig-group` is not a figure.
- A caption consists of the title and paragraphs of the figure's `caption`, then the paragraphs directly in the `fig`
  (legends of the panels). It excludes identifiers, credits, attached files, and paragraphs that contain only a DOI.
  If there are several `caption`s, the first one that is not only for print counts.
- A figure in a `fig-group`, or in another `fig`, has the caption of the group, then its own. A graphic directly in the
  group is a figure of the group.
- A figure never takes the caption of another figure. A caption that only repeats the label, or is a placeholder
  ("Image", "No caption"), counts as missing.
- The mentions of a figure are the paragraphs, outside captions and tables, that refer to it or its group by `xref`.
- Each `graphic` of a figure is a separate image, and may add its own caption. The graphics in one `alternatives` are
  one image. Graphics inside formulae and tables do not belong to the figure.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from lxml import etree

from . import safe_xml
from .jats_text import fold, local_name, text_of

# Real articles stay far below these limits. Together, they bound the time and memory that one article takes.
MAX_FIGURES = 2000
MAX_CAPTION = 32_768
MAX_NAME = 256
MAX_TITLE = MAX_LICENCE = MAX_MENTION = 2000
MAX_MENTIONS = 8

_XLINK_HREF = "{http://www.w3.org/1999/xlink}href"
_EXCLUDING = ("supplementary-material", "table-wrap")
_NOT_OF_FIGURE = ("disp-formula", "inline-formula", "table-wrap", "chem-struct-wrap", "supplementary-material", "fig")
_ONLY_DOI = re.compile(r"(?:doi\s*:?\s*)?(?:https?://(?:dx\.)?doi\.org/|doi:)?10\.\d{4,9}/\S+", re.IGNORECASE)
_PLACEHOLDER = re.compile(
    r"\W*(?:(?:supplementary|extended data)?\s*(?:fig(?:ure)?|image|scheme|chart|plate|photo)s?[\s.:]*\d*[a-z]?|"
    r"graphic|caption|(?:no |missing )(?:caption|legend|title)(?: available| found)?|untitled|none|null|n/?a|tbd|"
    r"see (?:text|legend))\W*",
    re.IGNORECASE,
)
_LETTER_OR_DIGIT = re.compile(r"[^\W_]")
_CREATIVE_COMMONS = re.compile(r"creativecommons\.org/(?:licenses/(by[a-z-]*)|publicdomain/(zero|mark))", re.IGNORECASE)
_CODE_IN_TEXT = re.compile(r"\bCC[\s-]?(0|BY(?:[\s-](?:NC|ND|SA))*)\b", re.IGNORECASE)
_NAME_IN_TEXT = re.compile(r"Creative\s+Commons\s+Attribution([\s\w,().-]{0,80}?)licen[cs]e", re.IGNORECASE)


class JatsError(ValueError):
    """The document is not a readable article. The message is the reason, in one line."""


@dataclass(frozen=True)
class Graphic:
    """One image: the hrefs of its versions in the XML, and its own caption, which is usually empty."""

    hrefs: tuple[str, ...]
    caption: str = ""


@dataclass(frozen=True)
class Figure:
    """A figure.

    Attributes:
        number: position in the document, from 1. It identifies the figure, because an id may repeat or be missing.
        licence: code or text of the figure's own licence. Empty: the article's licence applies.
        excluded: reason why the rules exclude the figure. Empty if they don't.
        mentions: the paragraphs that refer to the figure.
    """

    number: int
    id: str
    label: str
    caption: str
    graphics: tuple[Graphic, ...]
    licence: str = ""
    excluded: str = ""
    mentions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Article:
    """An article. An empty string means that the article doesn't state the value.

    Attributes:
        licence: code such as "CC BY-NC".
    """

    pmcid: str
    pmid: str
    doi: str
    title: str
    journal: str
    year: int | None
    citation: str
    licence: str
    licence_url: str
    licence_text: str
    figures: tuple[Figure, ...]


def parse(data: bytes) -> Article:
    """Parse an article. Raises JatsError for broken or hostile XML, and for a root that is not `article`."""
    try:
        root = safe_xml.parse(data)
    except safe_xml.XmlError as error:
        raise JatsError(str(error)) from None
    if local_name(root) != "article":
        raise JatsError(f"not a JATS article: the root is <{local_name(root)[:40]}>")
    # Older files and OAI-PMH put JATS elements into a default namespace. XLink, MathML and ALI keep their namespaces.
    if namespace := etree.QName(root).namespace:
        for node in root.iter(f"{{{namespace}}}*"):
            node.tag = local_name(node)
    front = root.find("front/article-meta")
    if front is None:
        front = etree.Element("article-meta")
    licence, url, text = _licence(front)
    return Article(
        pmcid=_pmcid(front),
        pmid=_article_id(front, "pmid"),
        doi=_article_id(front, "doi"),
        title=_text(front.find("title-group/article-title"))[:MAX_TITLE],
        journal=_journal(root)[:MAX_NAME],
        year=_year(front),
        citation=_citation(root, front)[:MAX_TITLE],
        licence=licence,
        licence_url=url,
        licence_text=text,
        figures=tuple(_figures(root)),
    )


def _text(node: etree._Element | None) -> str:
    return "" if node is None else text_of(node)


def _article_id(front: etree._Element, *kinds: str) -> str:
    for kind in kinds:
        for node in front.iterfind("article-id"):
            if node.get("pub-id-type") == kind and (text := fold(node.text or "")):
                return text[:MAX_NAME]
    return ""


def _pmcid(front: etree._Element) -> str:
    number = re.search(r"\d+", _article_id(front, "pmcid", "pmc"))
    return f"PMC{number.group()}"[:MAX_NAME] if number else ""


def _journal(root: etree._Element) -> str:
    for path in ("journal-title-group/journal-title", "journal-title", "journal-id"):
        if text := _text(root.find(f"front/journal-meta/{path}")):
            return text
    return ""


def _year(front: etree._Element) -> int | None:
    """Return the first year of publication. The date of a submission to NIHMS is not a publication."""
    years = []
    for date in front.iterfind("pub-date"):
        year = date.findtext("year", "").strip()
        if date.get("pub-type") != "nihms-submitted" and re.fullmatch(r"\d{4}", year):
            years.append(int(year))
    return min(years, default=None)


def _citation(root: etree._Element, front: etree._Element) -> str:
    """Return the citation for a credit: authors (six, then "et al."), title, journal, year and DOI."""
    names = []
    for author in front.iterfind("contrib-group/contrib[@contrib-type='author']"):
        name = (author.findtext("name/surname"), author.findtext("name/given-names"), author.findtext("collab"))
        names.append(fold(" ".join(filter(None, name))))
    names = [name for name in names if name]
    authors = ", ".join(names[:6]) + (", et al." if len(names) > 6 else "")
    doi = _article_id(front, "doi")
    title, year = _text(front.find("title-group/article-title")).rstrip("."), _year(front)
    parts = authors.rstrip("."), title, _journal(root).rstrip("."), str(year or ""), f"doi:{doi}" if doi else ""
    return ". ".join(filter(None, parts))


def _licence(node: etree._Element) -> tuple[str, str, str]:
    """Return code, URL and text of the licence in a `permissions` element (in NLM 2.x: in the element itself)."""
    url, texts = "", []
    for licence in node.iterfind(".//license"):
        candidates = [licence.get(_XLINK_HREF), *(child.get(_XLINK_HREF) for child in licence.iter("ext-link", "uri"))]
        candidates[1:1] = [child.text for child in licence.iter() if local_name(child) == "license_ref"]
        links = [fold(link) for link in candidates if link]
        url = url or next((link for link in links if _CREATIVE_COMMONS.search(link)), next(iter(links), ""))
        texts.append(text_of(licence))
    text = " ".join(texts)[:MAX_LICENCE]
    return _licence_code(url) or _licence_code(text), url[:MAX_NAME], text


def _licence_code(text: str) -> str:
    if match := _CREATIVE_COMMONS.search(text):
        return f"CC {match.group(1).upper()}".rstrip("-") if match.group(1) else "CC0"
    if match := _CODE_IN_TEXT.search(text):
        code = re.sub(r"[\s-]+", "-", match.group(1).upper())
        return "CC0" if code == "0" else f"CC {code}"
    if match := _NAME_IN_TEXT.search(text):
        rest = re.sub(r"[\s-]", "", match.group(1).lower())
        parts = [("noncommercial", "NC"), ("sharealike", "SA"), ("noderiv", "ND")]
        return "-".join(["CC BY", *(code for word, code in parts if word in rest)])
    return "CC0" if re.search(r"\bCC0\b|public\s+domain\s+dedication", text, re.IGNORECASE) else ""


def _figures(root: etree._Element) -> Iterator[Figure]:
    number = 0
    mentions = _mentions(root)
    # Label, caption and mentions of each group, with those of its outer groups. A group comes before its figures.
    groups: dict[etree._Element, tuple[str, str, tuple[str, ...]]] = {}
    for node in root.iter("fig", "fig-group"):
        outer_group = next(node.iterancestors("fig", "fig-group"), None)
        outer_label, outer_caption, outer_mentions = groups.get(outer_group, ("", "", ()))
        label = _text(node.find("label")) or outer_label
        caption = " ".join(filter(None, (outer_caption, _caption(node))))
        figure_mentions = tuple(dict.fromkeys((*mentions.get(node.get("id"), ()), *outer_mentions)))[:MAX_MENTIONS]
        graphics = tuple(_graphics(node))
        if node.tag == "fig-group" or node.find(".//fig") is not None:
            # One character beyond the limit is enough to detect a caption that is too long.
            groups[node] = label, caption[: MAX_CAPTION + 1], figure_mentions
            if not graphics:
                continue
        number += 1
        if number > MAX_FIGURES:
            raise JatsError(f"more than {MAX_FIGURES} figures")
        excluded = next((f"inside {above.tag}" for above in node.iterancestors(*_EXCLUDING)), "")
        if len(caption) > MAX_CAPTION:
            excluded = excluded or f"caption longer than {MAX_CAPTION} characters"
            caption = ""
        permissions = node.find("permissions")
        yield Figure(
            number=number,
            id=node.get("id", "")[:MAX_NAME],
            label=label[:MAX_NAME],
            caption=caption,
            graphics=graphics,
            licence="" if permissions is None else _figure_licence(permissions),
            excluded=excluded,
            mentions=figure_mentions,
        )


def _mentions(root: etree._Element) -> dict[str, list[str]]:
    """Return the first paragraphs that refer to each id of a figure, in document order.

    A paragraph is cut to MAX_MENTION characters.
    """
    figure_ids = {node.get("id") for node in root.iter("fig", "fig-group")} - {None}
    mentions: dict[str, list[str]] = {}
    # A paragraph with many references is read only once.
    last, text = None, ""
    for reference in root.iter("xref"):
        ids = [name for name in (reference.get("rid") or "").split() if name in figure_ids]
        if not any(len(mentions.get(name, ())) < MAX_MENTIONS for name in ids):
            continue
        above = list(reference.iterancestors("p", "caption", "fig", "table-wrap"))
        if not above or any(node.tag != "p" for node in above):
            continue
        if above[-1] is not last:
            last, text = above[-1], text_of(above[-1])[:MAX_MENTION]
        for name in ids:
            paragraphs = mentions.setdefault(name, [])
            if len(paragraphs) < MAX_MENTIONS and text not in paragraphs:
                paragraphs.append(text)
    return mentions


def _figure_licence(permissions: etree._Element) -> str:
    """Return the code of a figure's licence, else the text of its permissions (for a third party's figure)."""
    return _licence(permissions)[0] or fold(" ".join(permissions.itertext()))[:MAX_LICENCE]


def _caption(node: etree._Element) -> str:
    captions = node.findall("caption")
    screen_captions = [caption for caption in captions if caption.get("specific-use") != "print"]
    parts = (screen_captions or captions)[:1]
    if node.tag == "fig":
        parts += node.findall("p")
    only_doi = [p for part in parts for p in part.iter("p") if _ONLY_DOI.fullmatch(text_of(p))]
    joined = " ".join(filter(None, (text_of(part, without=only_doi) for part in parts)))
    is_missing = (
        not _LETTER_OR_DIGIT.search(joined) or joined == _text(node.find("label")) or _PLACEHOLDER.fullmatch(joined)
    )
    return "" if is_missing else joined


def _graphics(figure: etree._Element) -> Iterator[Graphic]:
    """Yield the images of a figure. For a group, yield those outside its figures."""
    walker = etree.iterwalk(figure, events=("start",))
    for _, node in walker:
        name = local_name(node)
        if node is figure:
            continue
        if name in (*_NOT_OF_FIGURE, "fig-group", "caption", "permissions", "alt-text", "long-desc"):
            walker.skip_subtree()
        elif name == "alternatives":
            walker.skip_subtree()
            versions = [child for child in node if _is_image(child)]
            if hrefs := tuple(href for child in versions if (href := _href(child))):
                yield Graphic(hrefs, next(filter(None, map(_caption, versions)), ""))
        elif _is_image(node) and (href := _href(node)):
            yield Graphic((href,), _caption(node))


def _is_image(node: etree._Element) -> bool:
    return local_name(node) == "graphic" or (local_name(node) == "media" and node.get("mimetype") == "image")


def _href(node: etree._Element) -> str:
    # NLM files without a namespace declaration have a plain `href`.
    return (node.get(_XLINK_HREF) or node.get("href") or "").strip()

"""The figures of a JATS article (1.0 to 1.3) or of one in the older NLM DTDs (2.x, 3.0), with their captions.

The rules:
- Every `fig` counts wherever it stands (body, floats-group, sub-article, appendix, box), except inside
  supplementary material and table-wraps. A graphic that stands outside `fig` and `fig-group` is no figure.
- Caption: the title and paragraphs of the figure's own `caption`, then paragraphs that stand in the `fig` itself
  (legends of the panels). Identifiers, credits, attached files and paragraphs that only give a DOI are left out.
  Of several `caption`s, the first that is not for print only.
- `fig-group`, and a `fig` that holds others: its caption, then the inner figure's own. A graphic directly in the group
  is a figure of the group.
- A figure without caption has none: it never takes that of another figure. A caption that only repeats the label or
  holds the place of one ("Image", "No caption") is none.
- Mentions: the paragraphs outside captions and tables that refer to the figure, or to its group, by `xref`.
- Each `graphic` of a figure is an image of its own, followed by its own caption if it has one; those in one
  `alternatives` are one image. Graphics inside formulae and tables are not the figure's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from lxml import etree

from . import safe_xml
from .jats_text import fold, local_name, text_of

# Far beyond what articles have; together they bound what one article can cost.
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
    """The document is not an article that can be read; the message is the reason, in one line."""


@dataclass(frozen=True)
class Graphic:
    """One image: the hrefs of its versions as they stand in the XML, and its own caption, empty mostly."""

    hrefs: tuple[str, ...]
    caption: str = ""


@dataclass(frozen=True)
class Figure:
    """A figure. `number` counts from 1 in document order, as ids may repeat or lack; `excluded` is a reason."""

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
    """What is known of an article; an empty string is "not said". `licence` is a code such as "CC BY-NC"."""

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
    """Read an article. Raises JatsError: broken or hostile XML, or a root that is not `article`."""
    try:
        root = safe_xml.parse(data)
    except safe_xml.XmlError as error:
        raise JatsError(str(error)) from None
    if local_name(root) != "article":
        raise JatsError(f"not a JATS article: the root is <{local_name(root)[:40]}>")
    # Older files and OAI-PMH put everything into a default namespace; XLink, MathML and ALI keep theirs.
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
    found = re.search(r"\d+", _article_id(front, "pmcid", "pmc"))
    return f"PMC{found.group()}"[:MAX_NAME] if found else ""


def _journal(root: etree._Element) -> str:
    for path in ("journal-title-group/journal-title", "journal-title", "journal-id"):
        if text := _text(root.find(f"front/journal-meta/{path}")):
            return text
    return ""


def _year(front: etree._Element) -> int | None:
    """The first year of publication; the day a manuscript was submitted to NIHMS is not one."""
    years = []
    for date in front.iterfind("pub-date"):
        year = date.findtext("year", "").strip()
        if date.get("pub-type") != "nihms-submitted" and re.fullmatch(r"\d{4}", year):
            years.append(int(year))
    return min(years, default=None)


def _citation(root: etree._Element, front: etree._Element) -> str:
    """Authors (six, then "et al."), title, journal, year and DOI: what a credit needs."""
    names = []
    for author in front.iterfind("contrib-group/contrib[@contrib-type='author']"):
        parts = (author.findtext("name/surname"), author.findtext("name/given-names"), author.findtext("collab"))
        names.append(fold(" ".join(filter(None, parts))))
    names = [name for name in names if name]
    who = ", ".join(names[:6]) + (", et al." if len(names) > 6 else "")
    doi = _article_id(front, "doi")
    title, year = _text(front.find("title-group/article-title")).rstrip("."), _year(front)
    told = who.rstrip("."), title, _journal(root).rstrip("."), str(year or ""), f"doi:{doi}" if doi else ""
    return ". ".join(filter(None, told))


def _licence(node: etree._Element) -> tuple[str, str, str]:
    """Code, address and text of the licence in a `permissions` (or, in NLM 2.x, in the element itself)."""
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
    if found := _CREATIVE_COMMONS.search(text):
        return f"CC {found.group(1).upper()}".rstrip("-") if found.group(1) else "CC0"
    if found := _CODE_IN_TEXT.search(text):
        code = re.sub(r"[\s-]+", "-", found.group(1).upper())
        return "CC0" if code == "0" else f"CC {code}"
    if found := _NAME_IN_TEXT.search(text):
        rest = re.sub(r"[\s-]", "", found.group(1).lower())
        parts = [("noncommercial", "NC"), ("sharealike", "SA"), ("noderiv", "ND")]
        return "-".join(["CC BY", *(code for word, code in parts if word in rest)])
    return "CC0" if re.search(r"\bCC0\b|public\s+domain\s+dedication", text, re.IGNORECASE) else ""


def _figures(root: etree._Element) -> Iterator[Figure]:
    number = 0
    mentions = _mentions(root)
    # Label and caption of each group, that of the groups around it included; groups come before their figures.
    groups: dict[etree._Element, tuple[str, str, tuple[str, ...]]] = {}
    for node in root.iter("fig", "fig-group"):
        around = next(node.iterancestors("fig", "fig-group"), None)
        outer_label, outer_caption, outer_mentions = groups.get(around, ("", "", ()))
        label = _text(node.find("label")) or outer_label
        caption = " ".join(filter(None, (outer_caption, _caption(node))))
        told = tuple(dict.fromkeys((*mentions.get(node.get("id"), ()), *outer_mentions)))[:MAX_MENTIONS]
        graphics = tuple(_graphics(node))
        if node.tag == "fig-group" or node.find(".//fig") is not None:
            # One character too many is enough to tell that it is too long.
            groups[node] = label, caption[: MAX_CAPTION + 1], told
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
            licence="" if permissions is None else _own_licence(permissions),
            excluded=excluded,
            mentions=told,
        )


def _mentions(root: etree._Element) -> dict[str, list[str]]:
    """The first paragraphs that refer to each id of a figure, cut to MAX_MENTION characters, in document order."""
    wanted = {node.get("id") for node in root.iter("fig", "fig-group")} - {None}
    found: dict[str, list[str]] = {}
    # A paragraph is read once, however many references it has.
    last, text = None, ""
    for reference in root.iter("xref"):
        ids = [name for name in (reference.get("rid") or "").split() if name in wanted]
        if not any(len(found.get(name, ())) < MAX_MENTIONS for name in ids):
            continue
        above = list(reference.iterancestors("p", "caption", "fig", "table-wrap"))
        if not above or any(node.tag != "p" for node in above):
            continue
        if above[-1] is not last:
            last, text = above[-1], text_of(above[-1])[:MAX_MENTION]
        for name in ids:
            told = found.setdefault(name, [])
            if len(told) < MAX_MENTIONS and text not in told:
                told.append(text)
    return found


def _own_licence(permissions: etree._Element) -> str:
    """The code of a figure's own licence, else the words of its permissions (a third party's figure)."""
    return _licence(permissions)[0] or fold(" ".join(permissions.itertext()))[:MAX_LICENCE]


def _caption(node: etree._Element) -> str:
    captions = node.findall("caption")
    for_screen = [caption for caption in captions if caption.get("specific-use") != "print"]
    parts = (for_screen or captions)[:1]
    if node.tag == "fig":
        parts += node.findall("p")
    only_doi = [p for part in parts for p in part.iter("p") if _ONLY_DOI.fullmatch(text_of(p))]
    joined = " ".join(filter(None, (text_of(part, without=only_doi) for part in parts)))
    is_none = (
        not _LETTER_OR_DIGIT.search(joined) or joined == _text(node.find("label")) or _PLACEHOLDER.fullmatch(joined)
    )
    return "" if is_none else joined


def _graphics(figure: etree._Element) -> Iterator[Graphic]:
    """The images of a figure or, for a group, those that stand in none of its figures."""
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
    # NLM files without a namespace declaration carry a plain `href`.
    return (node.get(_XLINK_HREF) or node.get("href") or "").strip()

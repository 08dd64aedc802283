"""An article in JATS (1.0 to 1.3) or in the older NLM DTDs (2.x, 3.0): its metadata, licence and figures.

The rules for figures and captions are in `jats_figures`, those for text in `jats_text` and `citations`, and those for
licences in `licences`. A document is an article, or an element that contains articles, such as the
answer of efetch (`pmc-articleset`) or of an OAI-PMH server.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from lxml import etree

from . import safe_xml
from .jats_figures import Figure, FiguresError, LooseGraphic, find_figures
from .jats_text import fold, local_name, text_of
from .licences import Licence, read_licence

MAX_NAME = 256
MAX_TITLE = 2000
_PARTS_OF_ARTICLE = frozenset(("front", "front-stub", "body", "back", "floats-group", "sub-article"))
# Answers of a server that say why it gives no article.
_ANSWERS = frozenset(("Reply", "ERROR", "error", "header"))


class JatsError(ValueError):
    """The document is not a readable article. The message is the reason, in one line."""


@dataclass(frozen=True)
class Article:
    """An article. An empty string means that the article doesn't state the value.

    Attributes:
        terms: the licence with the statements behind it.
        loose_graphics: the images that belong to no figure.
    """

    pmcid: str
    pmid: str
    doi: str
    title: str
    journal: str
    year: int | None
    citation: str
    figures: tuple[Figure, ...]
    terms: Licence = field(default_factory=Licence)
    loose_graphics: tuple[LooseGraphic, ...] = ()

    @property
    def licence(self) -> str:
        """The verdict, such as "CC BY-NC"."""
        return self.terms.code

    @property
    def licence_url(self) -> str:
        """The address of the licence."""
        return self.terms.url

    @property
    def licence_text(self) -> str:
        """The words of the licence."""
        return self.terms.text


def parse(data: bytes) -> Article:
    """Parse a document with one article. Raises JatsError for broken or hostile XML, or another document."""
    elements, problems = split(data)
    if len(elements) != 1:
        raise JatsError(problems[0] if problems else f"set of {len(elements)} articles")
    return read_article(elements[0])


def split(data: bytes) -> tuple[list[etree._Element], list[str]]:
    """Return the articles of a document, and the reasons that a server states for missing ones.

    Raises JatsError for broken or hostile XML, and for a document without an article.
    """
    try:
        root = safe_xml.parse(data)
    except safe_xml.XmlError as error:
        raise JatsError(str(error)) from None
    if local_name(root) == "article":
        return [root], []
    elements = []
    for node in root.iter("{*}article"):
        is_outermost = next(node.iterancestors("{*}article"), None) is None
        if is_outermost and any(local_name(child) in _PARTS_OF_ARTICLE for child in node):
            elements.append(node)
    problems = [reason for node in root.iter() if local_name(node) in _ANSWERS and (reason := _answer(node))]
    if not elements:
        reasons = f": {'; '.join(problems)[:200]}" if problems else ""
        raise JatsError(f"not a JATS article: the root is <{local_name(root)[:40]}>{reasons}")
    return elements, problems


def _answer(node: etree._Element) -> str:
    """Return why a server's answer has no article: an error of efetch or OAI-PMH, or a deleted record."""
    if local_name(node) == "header":
        return (
            f"deleted record {fold(node.findtext('{*}identifier', ''))[:80]}" if node.get("status") == "deleted" else ""
        )
    parts = (node.get("Id"), node.get("code"), node.get("error"), node.text)
    return fold(" ".join(filter(None, parts)))[:MAX_NAME]


def read_article(root: etree._Element) -> Article:
    """Read an `article` element. Raises JatsError for an article beyond the limits."""
    # Older files and OAI-PMH put JATS elements into a default namespace. XLink, MathML and ALI keep their namespaces.
    if namespace := etree.QName(root).namespace:
        for node in root.iter(f"{{{namespace}}}*"):
            node.tag = local_name(node)
    front = root.find("front/article-meta")
    if front is None:
        front = etree.Element("article-meta")
    _mark_references(root)
    try:
        figures, loose_graphics = find_figures(root)
    except FiguresError as error:
        raise JatsError(str(error)) from None
    return Article(
        pmcid=_pmcid(front),
        pmid=_article_id(front, "pmid"),
        doi=_article_id(front, "doi"),
        title=_text(front.find("title-group/article-title"))[:MAX_TITLE],
        journal=_journal(root)[:MAX_NAME],
        year=_year(front),
        citation=_citation(root, front)[:MAX_TITLE],
        figures=tuple(figures),
        terms=read_licence(front),
        loose_graphics=tuple(loose_graphics),
    )


def _mark_references(root: etree._Element) -> None:
    """Give a `ref-type` to each `xref` without one that points into the reference list."""
    untyped = [node for node in root.iter("xref") if not node.get("ref-type")]
    if untyped:
        references = {node.get("id") for node in root.iter("ref")} - {None}
        for node in untyped:
            if references.intersection((node.get("rid") or "").split()):
                node.set("ref-type", "bibr")


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

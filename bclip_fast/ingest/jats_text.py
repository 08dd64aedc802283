"""The visible text of a JATS element, on one line."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator

from lxml import etree

from .citations import MARK, REFERENCE, REFERENCE_END, SCRIPT, SCRIPT_END, resolve_marks, without_loose_spaces

_MATH = "{http://www.w3.org/1998/Math/MathML}"
# On the page, the content of these elements starts and ends a line. A space therefore separates it from its neighbours.
_BLOCKS = frozenset((
    "p", "title", "subtitle", "caption", "list", "list-item", "label", "def-list", "def-item", "def", "term",
    "disp-formula", "disp-formula-group", "disp-quote", "break", "sec", "table", "tr", "td", "th",
    "verse-group", "verse-line", "statement", "preformat",
))  # fmt: skip
# Identifiers, credits and descriptions, which are not part of the running text, and objects with their own captions.
_SKIPPED = frozenset((
    "object-id", "index-term", "alt-text", "long-desc", "permissions", "copyright-statement", "copyright-year",
    "license", "related-object", "supplementary-material", "media", "graphic", "inline-graphic",
    "inline-supplementary-material", "table-wrap", "fig", "fig-group", "processing-meta", "annotation",
    "annotation-xml",
))  # fmt: skip
# Versions of one formula in order of preference: the text of the first is closest to the printed formula.
_FORMULA_PREFERENCE = ("math", "textual-form", "tex-math")
# Elements of MathML whose children, except the first, stand higher or lower.
_SCRIPTED = frozenset(("msup", "msub", "msubsup", "mover", "munder", "munderover", "mmultiscripts"))
# `ref-type`s of references to the literature.
_REFERENCE_TYPES = ("bibr", "bib", "ref", "reference")
_NUMBER_IN_BRACKETS = re.compile(r"\s*\[\d[\d\s,;\u2010-\u2013-]*\]\s*")
_WITH_VERSIONS = frozenset(("alternatives", "inline-formula", "disp-formula"))
_TEX_DOCUMENT = re.compile(r"\\begin\{document\}(.*?)\\end\{document\}", re.DOTALL)
# Soft hyphen, zero-width characters, word joiner, invisible mathematical operators, byte order mark.
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060-\u2064\ufeff]")


def local_name(node: etree._Element) -> str:
    """Return the tag without its namespace. Empty for comments and processing instructions."""
    return node.tag.rpartition("}")[2] if isinstance(node.tag, str) else ""


def fold(text: str) -> str:
    """Normalise to NFC, remove invisible characters, and make every run of white space (also no-break) one space."""
    return " ".join(_INVISIBLE.sub("", unicodedata.normalize("NFC", text)).split())


def text_of(
    element: etree._Element, *, without: Iterable[etree._Element] = (), marked: Iterable[etree._Element] = ()
) -> str:
    """Return all text inside `element`, at any depth, except that of the elements `without`, folded to one line.

    `citations.MARK` precedes the text of each element in `marked`.

    A space separates blocks (paragraphs, titles, list items...). Inline markup adds nothing. A formula with
    `alternatives` gives the text of one: MathML, else its textual form, else the body of its TeX. In MathML, white
    space is not content, and a fraction becomes `a/b` or `(a+b)/c`. References to the literature and scripts follow the
    rules of `citations`.
    """
    parts: list[str] = []
    reference: etree._Element | None = None
    skipped, to_mark = set(without), set(marked)
    walker = etree.iterwalk(element, events=("start", "end", "comment", "pi"))
    for event, node in walker:
        name = local_name(node)
        is_math = bool(name) and node.tag.startswith(_MATH)
        if event == "start":
            if node in skipped or (node is not element and name in _SKIPPED):
                walker.skip_subtree()
            elif name == "tex-math":
                parts.append(_tex_body(node))
                walker.skip_subtree()
            else:
                if name in _WITH_VERSIONS:
                    skipped.update(_other_versions(node, name))
                if name in ("xref", "sup") and reference is None and _is_reference(node, name):
                    reference = node
                    parts.append(REFERENCE)
                if name in ("sup", "sub") or (is_math and _is_script_of_formula(node)):
                    parts.append(SCRIPT)
                if name in _BLOCKS:
                    parts.append(" ")
                if is_math and _is_part_of_fraction(node):
                    parts.append(("/" if node.getprevious() is not None else "") + ("(" if _has_operator(node) else ""))
                if node in to_mark:
                    parts.append(MARK)
                if text := node.text:
                    parts.append(text.strip() if is_math and name != "mtext" else text)
            continue
        if name in _BLOCKS:
            parts.append(" ")
        if name in ("sup", "sub") or (is_math and _is_script_of_formula(node)):
            parts.append(SCRIPT_END)
        if node is reference:
            reference = None
            parts.append(REFERENCE_END)
        if is_math and _is_part_of_fraction(node) and _has_operator(node):
            parts.append(")")
        if (tail := node.tail) and node is not element:
            parent = node.getparent()
            parts.append(tail.strip() if _is_math(parent) and local_name(parent) != "mtext" else tail)
    return without_loose_spaces(fold(resolve_marks(" ".join("".join(parts).split()))))


def _is_reference(node: etree._Element, name: str) -> bool:
    """Return whether an element is a reference to the literature: an `xref`, or a superscript of references."""
    if name == "xref":
        return node.get("ref-type", "") in _REFERENCE_TYPES
    if name != "sup":
        return False
    text = "".join(node.itertext())
    if _NUMBER_IN_BRACKETS.fullmatch(text):
        return True
    return not any(map(str.isalpha, text)) and any(_is_reference(child, "xref") for child in node.iter("xref"))


def _is_script_of_formula(node: etree._Element) -> bool:
    """Return whether an element of MathML stands higher or lower than its neighbour."""
    parent = node.getparent()
    return _is_math(parent) and local_name(parent) in _SCRIPTED and parent[0] is not node


def _is_math(node: etree._Element | None) -> bool:
    return node is not None and isinstance(node.tag, str) and node.tag.startswith(_MATH)


def _is_part_of_fraction(node: etree._Element) -> bool:
    parent = node.getparent()
    return _is_math(parent) and local_name(parent) == "mfrac"


def _has_operator(node: etree._Element) -> bool:
    return any(_INVISIBLE.sub("", operator.text or "").strip() for operator in node.iter(f"{_MATH}mo"))


def _other_versions(node: etree._Element, name: str) -> Iterator[etree._Element]:
    """Yield the children that repeat another child: all `alternatives` except one, and the TeX of a MathML formula."""
    children = [child for child in node if local_name(child) and local_name(child) not in _SKIPPED]
    chosen = min(children, key=lambda child: _rank(local_name(child)), default=None)
    for child in children:
        if name == "alternatives":
            if child is not chosen:
                yield child
        elif local_name(child) in _FORMULA_PREFERENCE and local_name(child) != local_name(chosen):
            yield child


def _rank(name: str) -> int:
    return _FORMULA_PREFERENCE.index(name) if name in _FORMULA_PREFERENCE else len(_FORMULA_PREFERENCE)


def _tex_body(node: etree._Element) -> str:
    text = "".join(node.itertext())
    if body := _TEX_DOCUMENT.search(text):
        text = body.group(1)
    return text.strip().strip("$").strip()

"""The caption of a figure: which text of which language counts. `jats_figures` states the rules."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from lxml import etree

from .jats_text import text_of

ENGLISH = "en"  # the DTDs' default of xml:lang
_LANG = "{http://www.w3.org/XML/1998/namespace}lang"
_LONG_CODES = {"eng": "en", "fra": "fr", "fre": "fr", "deu": "de", "ger": "de", "spa": "es", "por": "pt", "ita": "it"}
_ONLY_DOI = re.compile(r"(?:doi\s*:?\s*)?(?:https?://(?:dx\.)?doi\.org/|doi:)?10\.\d{4,9}/\S+", re.IGNORECASE)
_PLACEHOLDER = re.compile(
    r"\W*(?:(?:supplementary|extended data)?\s*(?:fig(?:ure)?|image|scheme|chart|plate|photo)s?[\s.:]*\d*[a-z]?|"
    r"graphic|caption|(?:no |missing )(?:caption|legend|title)(?: available| found)?|untitled|none|null|n/?a|tbd|"
    r"see (?:text|legend))\W*",
    re.IGNORECASE,
)
_LETTER_OR_DIGIT = re.compile(r"[^\W_]")


@dataclass(frozen=True)
class Caption:
    """A text, its language as the XML states it, and "en" if an English version follows in the text."""

    text: str = ""
    language: str = ""
    translation: str = ""


def own_text(node: etree._Element | None) -> str:
    """Return the text of an element, or an empty string for None."""
    return "" if node is None else text_of(node)


def language_of(node: etree._Element | None) -> str:
    """Return the language that the nearest `xml:lang` states, as a code of ISO 639-1. Empty if nothing is stated."""
    while node is not None:
        if stated := stated_language(node):
            return stated
        node = node.getparent()
    return ""


def stated_language(node: etree._Element) -> str:
    """Return the language that the element itself states. Empty if it states none."""
    value = node.get(_LANG)
    if not value:
        return ""
    code = re.split("[-_]", value.strip().lower())[0][:8]
    return _LONG_CODES.get(code, code)


def read_caption(nodes: list[etree._Element]) -> Caption:
    """Return the caption of a figure, whose language versions `nodes` may be, in the language of its article."""
    article = next(nodes[0].iterancestors("article", "sub-article", "response"), None)
    # Caption and stated language, by language.
    texts: dict[str, tuple[str, str]] = {}
    for node in nodes:
        label = own_text(node.find("label"))
        for language, text in _texts(node).items():
            is_missing = not _LETTER_OR_DIGIT.search(text) or text == label or _PLACEHOLDER.fullmatch(text)
            if not is_missing:
                texts.setdefault(language or ENGLISH, (text, language))
    if not texts:
        return Caption(language=language_of(nodes[0]))
    chosen = next(each for each in (language_of(article) or ENGLISH, ENGLISH, *texts) if each in texts)
    text, language = texts[chosen]
    if chosen == ENGLISH or ENGLISH not in texts:
        return Caption(text, language)
    return Caption(f"{text} {texts[ENGLISH][0]}", language, ENGLISH)


def _texts(node: etree._Element) -> dict[str, str]:
    """Return the texts of a figure's captions and legends by their languages. "" is a language that is not stated."""
    captions = node.findall("caption")
    captions = [caption for caption in captions if caption.get("specific-use") != "print"] or captions
    default = language_of(node)
    texts: dict[str, str] = {}
    for caption in captions:
        own = stated_language(caption) or default
        children = [(child, stated_language(child) or own) for child in caption.iterchildren("*")]
        languages = dict.fromkeys([language for _, language in children] or [own])
        versions = {
            language: _without_dois(caption, [child for child, other in children if other != language])
            for language in languages
        }
        texts = {**versions, **texts}
    for legend in node.findall("p") if node.tag == "fig" else ():
        language = stated_language(legend) or default
        if language not in texts and texts and not stated_language(legend):
            language = next(iter(texts))
        texts[language] = " ".join(filter(None, (texts.get(language, ""), _without_dois(legend))))
    return texts


def _without_dois(element: etree._Element, without: Iterable[etree._Element] = ()) -> str:
    dois = [p for p in element.iter("p") if _ONLY_DOI.fullmatch(text_of(p))]
    return text_of(element, without=[*without, *dois])

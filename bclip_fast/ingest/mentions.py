"""The paragraphs and sentences of an article that refer to a figure.

A reference is an `xref` to the id of a figure or group, in a paragraph outside captions and tables. The sentence around
it describes the figure, unless it has fewer than MIN_WORDS words ("See Figure 1.") or is longer than MAX_SENTENCE.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from itertools import islice

from lxml import etree

from bclip_fast.data.sentences import split_sentences

from .citations import MARK
from .jats_text import text_of

# Real articles stay far below these limits. Together, they bound the time and memory that one article takes.
MAX_MENTION = 2000
MAX_MENTIONS = 8
MAX_SENTENCE = 1000
MIN_WORDS = 6

_WORD = re.compile(r"[^\W\d_]{3,}")


@dataclass
class Mentions:
    """The references to a figure or group, in document order. `paragraphs` are cut to MAX_MENTION characters."""

    paragraphs: list[str] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)

    def is_full(self) -> bool:
        """Return whether more references would change nothing."""
        return len(self.paragraphs) == MAX_MENTIONS and len(self.sentences) == MAX_MENTIONS


def find_mentions(root: etree._Element) -> dict[str, Mentions]:
    """Return the first MAX_MENTIONS paragraphs and sentences that refer to each id of a figure or group."""
    figure_ids = {node.get("id") for node in root.iter("fig", "fig-group")} - {None}
    mentions: dict[str, Mentions] = {}
    # A paragraph with many references is read only once.
    last, text = None, ""
    sentences: dict[etree._Element, str] = {}
    for reference in root.iter("xref"):
        ids = _figures_of(reference, figure_ids)
        if all(name in mentions and mentions[name].is_full() for name in ids):
            continue
        paragraph = _paragraph_of(reference)
        if paragraph is None:
            continue
        if paragraph is not last:
            last, (text, sentences) = paragraph, _read(paragraph, figure_ids)
        for name in ids:
            of_figure = mentions.setdefault(name, Mentions())
            _add(of_figure.paragraphs, text[:MAX_MENTION])
            _add(of_figure.sentences, sentences.get(reference, ""))
    return mentions


def merged_mentions(each: Iterable[Mentions]) -> Mentions:
    """Return the first mentions of several ids of a figure."""
    result = Mentions()
    for mentions in each:
        for text in mentions.paragraphs:
            _add(result.paragraphs, text)
        for text in mentions.sentences:
            _add(result.sentences, text)
    return result


def _add(texts: list[str], text: str) -> None:
    if text and text not in texts and len(texts) < MAX_MENTIONS:
        texts.append(text)


def _figures_of(reference: etree._Element, figure_ids: Container[str]) -> list[str]:
    return [name for name in (reference.get("rid") or "").split() if name in figure_ids]


def _paragraph_of(reference: etree._Element) -> etree._Element | None:
    """Return the outermost paragraph around a reference. None inside a caption or table."""
    above = list(reference.iterancestors("p", "caption", "fig", "table-wrap"))
    return above[-1] if above and all(node.tag == "p" for node in above) else None


def _read(paragraph: etree._Element, figure_ids: Container[str]) -> tuple[str, dict[etree._Element, str]]:
    """Return the text of a paragraph, and the sentence of each reference to a figure in it."""
    references = [
        node for node in paragraph.iter("xref") if _figures_of(node, figure_ids) and _paragraph_of(node) is paragraph
    ]
    marked = text_of(paragraph, marked=references)
    sentences: dict[etree._Element, str] = {}
    # A mark is lost if its reference is in an element without text, such as a media object.
    if marked.count(MARK) == len(references):
        remaining = iter(references)
        for sentence in split_sentences(marked):
            text = sentence.replace(MARK, "").strip()
            is_useful = len(text) <= MAX_SENTENCE and len(_WORD.findall(text)) >= MIN_WORDS
            for reference in islice(remaining, sentence.count(MARK)):
                sentences[reference] = text if is_useful else ""
    return marked.replace(MARK, ""), sentences

"""Divide a clause with several labels: "axial (a) and sagittal (b) views", "views of (a) heart and (b) lung"."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .caption_labels import Label, Span

# A label after one of these starts the text of another panel.
OPENS = re.compile(r"(?:[,;:.\u2013\u2014)\]\d%]|\b(?:and|or|versus|vs\.?))\s*$")
# The text of a panel starts with a capital that is no abbreviation, such as the genus in "Ae. aegypti".
STARTS = re.compile(r"\s*[A-Z](?![a-z]{0,2}\.)")
# The text before the first of several labels ends so if the labels stand before their texts.
INTRODUCES = re.compile(
    r"(?:[:,\u2013\u2014]|\b(?:for|of|in|on|by|with|at|to|from|between|showing|shows?|are|is|as|using|via|under|after|including|both))\s*$"
)
# The text after a label starts so if the label stands after its text.
CONTINUES = re.compile(r"\s*(?:[,;:.)]|$|(?:and|or|as well as|however|while|whereas|but|versus|vs\.?)\b)")
# "..., (H) and ...": a conjunction after a label that follows a comma.
_ENDS, _JOINS = re.compile(r"[,;]\s*$"), re.compile(r"\s*(?:and|or)\s+\w")
_CONJUNCTION = re.compile(r"^[\s,;:.]*(?:(?:and|or|as well as|however;?|while|whereas|but|versus|vs\.?)\b[\s,;]*)*")
# Texts of at most so many words may share the end of the last one, if it has so many words more.
_MAX_SHARING, _MIN_SHARED = 3, 3
_PREPOSITION = re.compile(r"\b(?:of|for|between|with|using|on|at|to|by)\s+")


@dataclass
class LabelledList:
    """Several labels of one clause with their texts. `head`, `tail`: text of all of them.

    `is_end_shared`: whether the end of the last text may belong to all.
    """

    spans: list[Span]
    head: Span
    tail: Span
    follows: bool
    is_certain: bool
    is_end_shared: bool = False


def divide_list(caption: str, span: Span, labels: Sequence[Label]) -> LabelledList:
    """Decide whether several labels of a clause stand before or after their texts, and divide the clause."""
    start, end = span
    befores = [caption[start : labels[0].start]]
    befores += [caption[a.end : b.start] for a, b in itertools.pairwise(labels)]
    afters = [*befores[1:], caption[labels[-1].end : end]]
    starts_text = [
        not CONTINUES.match(after) or bool(_ENDS.search(before) and _JOINS.match(after))
        for before, after in zip(befores, afters, strict=True)
    ]
    opened = [bool(OPENS.search(text)) for text in befores]
    before = all(starts_text) and (all(opened[1:]) or bool(INTRODUCES.search(befores[0])))
    if len(labels) == 1:
        before = starts_text[0] and bool(INTRODUCES.search(befores[0]))
    if before:
        bounds = [label.start for label in labels[1:]] + [end]
        spans = [(label.end, bound) for label, bound in zip(labels, bounds, strict=True)]
        is_clear = bool(INTRODUCES.search(befores[0]) or opened[0] or not befores[0].strip())
        is_certain = is_clear or len(labels) > 2
        return LabelledList(
            spans, (start, labels[0].start), (end, end), False, is_certain, has_shared_end(caption, spans)
        )
    # Each label after its text. The last text may go on after the last label.
    follows = not any(starts_text[:-1])
    starts = [start, *(label.end for label in labels[:-1])]
    spans = []
    for index, (begin, label) in enumerate(zip(starts, labels, strict=True)):
        text = caption[begin : label.start]
        conjunction = _CONJUNCTION.match(text) if index else None
        spans.append((begin + (conjunction.end() if conjunction else 0), label.start))
    head = _common_head(caption, spans)
    if head[0] < head[1]:
        spans[0] = (head[1], spans[0][1])
    tail = (labels[-1].end, end)
    return LabelledList(spans, head, tail, True, follows or len(labels) == 1)


def has_shared_end(caption: str, spans: Sequence[Span]) -> bool:
    """Return whether the last words may belong to all: "from Java" in "(a) tea and (b) rum from Java"."""
    *others, last = (len(re.findall(r"\w+", re.sub(r"\b(?:and|or)\s*$", "", caption[slice(*own)]))) for own in spans)
    return bool(others) and max(others) <= _MAX_SHARING and last >= max(others) + _MIN_SHARED


def divide_after(caption: str, span: Span, labels: Sequence[Label]) -> list[Span]:
    """Divide "in (a), cells, and in (b), nuclei" before each label's conjunction. Return none if one has none."""
    starts = [span[0]]
    for label, following in itertools.pairwise(labels):
        cuts = list(re.finditer(r"[,;]|\band\b", caption[label.end : following.start]))
        if not cuts:
            return []
        starts.append(label.end + cuts[-1].start())
    return list(zip(starts, [*starts[1:], span[1]], strict=True))


def _common_head(caption: str, spans: Sequence[Span]) -> Span:
    """Return the words of the first text that belong to all: "spectra of" in "spectra of tea (a) and coffee (b)".

    None if another text has a preposition of its own, or is longer than the first.
    """
    nothing = (spans[0][0], spans[0][0])
    first, *others = (caption[begin:stop] for begin, stop in spans)
    if not others or any(_PREPOSITION.search(text) or len(text) > len(first) for text in others):
        return nothing
    if all(len(text.split()) <= 2 for text in others) and (comma := first.rfind(",")) >= 0:
        return spans[0][0], spans[0][0] + comma + 1
    match = _PREPOSITION.search(first)
    return (spans[0][0], spans[0][0] + match.end()) if match else nothing

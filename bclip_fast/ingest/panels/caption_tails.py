"""Tell sentences about all panels, and references to panels, from the text of one panel."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .caption_labels import Label, Span

# An abbreviation or a letter in the picture with its meaning: "F: choroid."
_KEY = r"(?-i:[A-Z][\w\u03b1-\u03c9+/-]{0,9}\s?[:,]\s[\w\s\u03b1-\u03c9-]{3,60}(?:[;.,]|$))"
_ABOUT_ALL = re.compile(
    r"scale bars?|bars?\s*[:=]|error bars?|(?:all )?(?:data|values|results)\b.*\b(?:are|is|were|represent|expressed)|"
    rf"see also|abbreviations?|asterisks?|[\u2217*]+\s*,?\s*p\b|statistical|(?:original )?magnification|{_KEY}",
    re.IGNORECASE,
)
# A label after one of these refers to a panel that has its text elsewhere.
_REFERS = re.compile(r"\b(?:in|of|from|as|to|see|with|than)\s+(?:panels?\s+)?\(?$", re.IGNORECASE)


def is_about_all(text: str) -> bool:
    """Return whether a sentence starts like one about all panels: scale bars, statistics, abbreviations."""
    return _ABOUT_ALL.match(text.strip()) is not None


def num_about_all(caption: str, own: Sequence[Span], others: Sequence[Span]) -> int:
    """Return how many sentences at the end of the last panel's text, `own`, are about all panels.

    If one of them starts like a sentence in the text of another panel, each panel has such sentences of its own.
    """
    number = 0
    while number < len(own) - 1 and _starts_sentence_about_all(caption, own[-1 - number]):
        number += 1
    for start, end in own[len(own) - number :]:
        word = caption[start:end].split()[0].lower()
        if any((start, end) == other or word in caption[slice(*other)].lower() for other in others):
            return 0
    return number


def _starts_sentence_about_all(caption: str, span: Span) -> bool:
    return is_about_all(caption[slice(*span)]) and not caption[: span[0]].rstrip().endswith(";")


def refers(caption: str, label: Label) -> bool:
    """Return whether the words before a label make it a reference: "as in (B)"."""
    return _REFERS.search(caption[max(0, label.start - 20) : label.start]) is not None


def is_missing(caption: str, label: Label, labels: Sequence[Label]) -> bool:
    """Return whether a label refers to a panel that no other label of the caption names."""
    others = [other for other in labels if other != label and set(other.names) & set(label.names)]
    return refers(caption, label) and not others


def is_for_named(caption: str, clause: Span, labels: Sequence[Label]) -> bool:
    """Return whether a clause is about the panels that it names, as "Scale bars, 5 mm (a, c)" is."""
    is_list = len(labels[-1].names) > 1 and not refers(caption, labels[-1])
    return is_about_all(caption[slice(*clause)]) or (is_list and ends_clause(caption, labels[-1], clause))


def ends_clause(caption: str, label: Label, clause: Span) -> bool:
    """Return whether nothing but punctuation follows a label in its clause."""
    return re.fullmatch(r"[\s.;,:)]*", caption[label.end : clause[1]]) is not None


def refers_to(text: str, names: Sequence[str]) -> bool:
    """Return whether a sentence names one of the panels in brackets: "(arrows in B)"."""
    return any(
        re.search(rf"\(.*\bin\s+(?:panels?\s+)?[{name}{name.lower()}]\)", text) for name in names if len(name) == 1
    )


def trimmed(caption: str, spans: Sequence[Span]) -> list[Span]:
    """Return the spans without the punctuation and conjunctions around them. Neighbours become one span."""
    joined: list[Span] = []
    for start, end in spans:
        joined.append((joined.pop()[0] if joined and joined[-1][1] == start else start, end))
    result: list[Span] = []
    for start, end in joined:
        text = caption[start:end]
        lead = re.match(r"[\s;:,.)]*", text)
        start += lead.end() if lead else 0
        text = re.sub(r"(?:[\s;,:(]|\b(?:and|or|panels?))+$", "", caption[start:end], flags=re.IGNORECASE)
        if text:
            result.append((start, start + len(text)))
    return result

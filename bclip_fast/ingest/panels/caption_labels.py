"""Find the labels of panels in a caption: "(A)", "(a, b)", "(C-E)", "B.", "a Title", "(left)", "Top:".

A style is one way of writing labels. The labels of a caption have one style, because other styles mean other things:
in "hydroxyl radical (B) in the absence (a)", only the capitals are panels.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Span = tuple[int, int]

MAX_PANELS = 16
# Longer captions and captions with more labels than these are not those of one figure.
MAX_CAPTION, MAX_LABELS = 20_000, 200
LETTERS = "ABCDEFGHIJKLMNOP"

_PLACE = r"(?:upper|lower|top|bottom|left|right|middle|cent(?:er|re))(?:[ -](?:left|right|middle|cent(?:er|re)))?"
_SEPARATOR = r"\s*(?:,\s*and\b|[,;&/~\u2010-\u2014-]|\band\b|\bto\b|\bor\b)\s*"
# What may follow a letter inside its brackets: "(Ai)", "(A1)", "(A-left)", "(b-f, respectively)".
_DETAIL = rf"(?:['\u2032]|\s?(?:[ivx]{{1,4}}|\d)\b)?(?:[\s,\u2013-]{{1,3}}(?:{_PLACE}|insets?|respectively)\b){{0,3}}"


def _list(letters: str) -> str:
    item = rf"(?:panels?\s+)?{letters}(?![^\W\divx]){_DETAIL}"
    return rf"(?:panels?\s*)?{item}(?:{_SEPARATOR}{item}){{0,15}}"


def _brackets(content: str) -> str:
    """Return a pattern for "(A)", "(A), (B)", "(A) and (B)", "(A)-(C)" and "((A), (B))"."""
    one = rf"\(\s*(?:[Pp]anels?\s+)?{content}\s*\)"
    return rf"\({one}(?:{_SEPARATOR}{one}){{1,15}}\)|{one}(?:{_SEPARATOR}{one}){{0,15}}"


# Of each style: the pattern, and whether a label may stand after its text.
_STYLES = (
    (re.compile(_brackets(_list("[A-P]"))), True),
    (re.compile(_brackets(_list("[a-p]"))), True),
    (re.compile(rf"(?<![\w(])({_list('[A-P]')})[).:,](?=\s|[A-Z])"), False),
    (re.compile(rf"(?<![\w(])({_list('[a-p]')})[).:,](?=\s|[A-Z])"), False),
    (re.compile(rf"(?:^|(?<=[.;:,)]\s)|(?<=, and\s))({_list('[a-p]')})\s(?=[^\s=<>,.;:)])"), False),
    (re.compile(rf"(?:^|(?<=[.;:,)]\s))({_list('[A-P]')})\s(?=[^\s=<>,.;:)])"), False),
    (re.compile(rf"\(\s*({_PLACE})(?:\s(?:panels?|images?))?\s*\)", re.IGNORECASE), True),
    (re.compile(rf"\b({_PLACE})(?:\spanels?)?\s?[:,]", re.IGNORECASE), False),
)
_NAME = re.compile(rf"(?<![^\W\d_])([A-Pa-p])(?:{_DETAIL})(?![^\W\d_])")
_RANGE = re.compile(r"\)?\s*(?:[~\u2010-\u2014-]|to)\s*\(?")

_END = re.compile(r"[.!?][\"')\]\u2019\u201d]*(?:\s+|(?=\())(?=[\"'(\[\u2018\u201c\u2217*]*\s?[A-Z0-9\u00c0-\u00de])")
# In some articles, the identifiers of attached files follow the caption without a space.
_BEFORE_DOI = re.compile(r"[.)](?=10\.\d{4,9}/)")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\[])(?:figs?|tabs?|eqs?|refs?|suppl?|nos?|vs|cf|ca|approx|al|e\.g|i\.e|dr|prof|st|spp?|var|resp|ae|[A-Z])\.$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Label:
    """A label in the caption, from `start` to `end`. `names`: the panels that it names, such as ("A", "B")."""

    start: int
    end: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Labels:
    """All labels of one style in a caption, in order. `may_follow`: a label may stand after its text."""

    labels: tuple[Label, ...]
    may_follow: bool
    are_places: bool


def find_labels(caption: str) -> Iterator[Labels]:
    """Yield the labels of the caption for each style that occurs, the most certain style first."""
    for pattern, may_follow in _STYLES if len(caption) <= MAX_CAPTION else ():
        labels: list[Label] = []
        are_places = bool(pattern.flags & re.IGNORECASE)
        for match in pattern.finditer(caption):
            names = _place(match.group(1)) if are_places else _letters(match.group())
            if names:
                labels.append(Label(match.start(), match.end(), names))
        if 0 < len(labels) <= MAX_LABELS:
            yield Labels(tuple(labels), may_follow, are_places)


def _letters(text: str) -> tuple[str, ...]:
    """Return the letters that a label such as "(A and B)" or "(A)-(D)" names. Empty if they are out of order."""
    text = re.sub(r"(?i)panels?", "", text)
    matches = list(_NAME.finditer(text))
    names: list[str] = []
    for index, match in enumerate(matches):
        letter = match.group(1).upper()
        if index and _RANGE.fullmatch(text[matches[index - 1].end() : match.start()]):
            names += LETTERS[LETTERS.index(names[-1]) + 1 : LETTERS.index(letter)]
        names.append(letter)
    return tuple(names) if names == sorted(set(names)) else ()


def _place(text: str) -> tuple[str, ...]:
    return (re.sub(r"center|centre", "middle", text.lower()).replace(" ", "-"),)


def split_clauses(caption: str, labels: Sequence[Label]) -> list[Span]:
    """Return the clauses: they end with a sentence, at a semicolon, and before a label after punctuation."""
    masked = re.sub(r"\([^()]*\)", lambda match: "(" + "x" * (len(match.group()) - 2) + ")", caption)
    ends = {match.end() for match in re.finditer(r";", masked)}
    ends |= {match.end() for match in _BEFORE_DOI.finditer(masked)}
    for match in _END.finditer(masked):
        before = caption[: match.start() + 1]
        if not _ABBREVIATION.search(before[-16:]) or re.match(r"\s*[(\[]", caption[match.end() - 1 :]):
            ends.add(match.end())
    for label in labels:
        if re.search(r"(?:[.;]|(?<!\bbar)(?<!bars):)\s*$", caption[max(0, label.start - 8) : label.start]):
            ends.add(label.start)
        ends -= set(range(label.start + 1, label.end))
    bounds = [0, *sorted(end for end in ends if 0 < end < len(caption)), len(caption)]
    clauses = itertools.pairwise(bounds)
    return [(start, end) for start, end in clauses if re.search(r"[^\W_]", caption[start:end])]

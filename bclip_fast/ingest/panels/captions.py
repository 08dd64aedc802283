"""Split the caption of a composite figure into the parts of its panels.

The labels A, B, C, ... must come in order, each in front of its text ("(a) ...", "A, ...", "(B-D) ...", or
"Left: ..."). Text before the first label belongs to every panel. Labels after their text ("a cell (a)") give no panels.
"""

from __future__ import annotations

import re

MAX_PANELS = 12
_LETTERS = r"[A-La-l](?:\s?(?:[-\u2013\u2014,&/]|and|to)\s?[A-La-l])*"
_STYLES = (
    re.compile(rf"\(({_LETTERS})\)[.:,]?"),
    re.compile(rf"(?<![\w(])({_LETTERS})[).:,](?=\s)"),
    re.compile(
        r"\b((?:upper|lower|top|bottom|left|right|middle)(?:[ -](?:left|right|middle))?)(?: panels?)?\s?[:,]", re.I
    ),
)
# A label comes in front of its text: at the start of the caption, after punctuation, or after "and".
_BEFORE = re.compile(r"(?:^|[.;:,!?\u2013\u2014)\]]|\band)\s*$")
_SEPARATOR = re.compile(r"\s?(?:([-\u2013\u2014]|TO)|[,&/]|AND)\s?")


def split_caption(caption: str) -> dict[str, str]:
    """Return the caption of each panel by its label: A to L, or a position such as "left".

    Empty unless the caption uses one style of labels, in order, without a gap, each with its own text.
    """
    for style in _STYLES:
        labels: list[tuple[list[str], int, int]] = []
        for match in style.finditer(caption):
            names = _expand(match.group(1))
            if names and _BEFORE.search(caption[: match.start()]):
                labels.append((names, match.start(), match.end()))
        parts = _parts(caption, labels)
        if parts:
            return parts
    return {}


def _expand(text: str) -> list[str]:
    """Return the letters of a label such as "A", "A and B" or "A-D", or the position that it names."""
    if len(text) > 2 and re.match(r"(?i)upper|lower|top|bottom|left|right|middle", text):
        return [text.lower().replace(" ", "-")]
    tokens = _SEPARATOR.split(text.upper())
    names = [tokens[0]]
    for is_range, letter in zip(tokens[1::2], tokens[2::2], strict=True):
        first = ord(names[-1]) + 1 if is_range else ord(letter)
        names += [chr(code) for code in range(first, ord(letter) + 1)]
    return names


def _parts(caption: str, candidates: list[tuple[list[str], int, int]]) -> dict[str, str]:
    """Return the caption of each panel. `candidates`: (names, start, end) of each label in the caption."""
    if not candidates:
        return {}
    names_position = len(candidates[0][0][0]) > 1
    expected, kept = 0, []
    for names, start, end in candidates:
        if names_position:
            kept.append((names, start, end))
            continue
        if names != [chr(ord("A") + expected + i) for i in range(len(names))]:
            if names[0] < chr(ord("A") + expected):
                continue  # refers to an earlier panel
            return {}
        expected += len(names)
        kept.append((names, start, end))
    labels = [name for names, _, _ in kept for name in names]
    if not 2 <= len(labels) <= MAX_PANELS or len(set(labels)) != len(labels):
        return {}
    head = caption[: kept[0][1]].strip(" :;,")
    parts = {}
    for i, (names, _, end) in enumerate(kept):
        text = caption[end : kept[i + 1][1] if i + 1 < len(kept) else len(caption)].strip(" ;,")
        text = re.sub(r"\s*\band$", "", text).strip(" ;,")
        if len(re.sub(r"[\W\d_]", "", text)) < 2:
            return {}
        for name in names:
            parts[name] = f"{head} {text}".strip()
    return parts

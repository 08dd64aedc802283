"""The sentences of a text, by rules. In doubt, two sentences stay together."""

from __future__ import annotations

import re
from collections.abc import Iterator

# The control character \x08 may mark a place in the text (ingest/citations.py). Chinese and Japanese have no spaces.
_END = re.compile(
    r"[.!?][\"')\]\u2019\u201d]*\s+(?=[\"'(\[\u2018\u201c\x08]*(?:[A-Z0-9\u00c0-\u00de]|\([a-l]\)))|[\u3002\uff01\uff1f]\s*(?=\S)"
)
# After these, a full stop does not end a sentence.
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\[\x08])(?:figs?|tabs?|eqs?|refs?|suppl?|supplement|no|nos|vs|cf|ca|approx|al|e\.g|i\.e|dr|prof|st|spp?|var|"
    r"resp|viz|[a-z])\.$",
    re.IGNORECASE,
)
_MAX_ABBREVIATION = 16


def split_sentences(text: str) -> Iterator[str]:
    """Yield the sentences of a text. Joined, they are the text again.

    A sentence ends at a full stop, question mark or exclamation mark before a capital letter, a digit or the label of
    a panel ("(b)"). It doesn't end after an abbreviation ("Fig. 1", "E. coli", "et al.").
    """
    start = 0
    for match in _END.finditer(text):
        if not _ABBREVIATION.search(text[max(start, match.start() - _MAX_ABBREVIATION) : match.start() + 1]):
            yield text[start : match.end()]
            start = match.end()
    if start < len(text):
        yield text[start:]

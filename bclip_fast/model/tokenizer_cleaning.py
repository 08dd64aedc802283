"""The cleaning of a text before the tokenizer's own pipeline, as in open_clip and in transformers."""

from __future__ import annotations

import html
import re
import string
from collections.abc import Callable
from typing import Literal

import ftfy

Cleaning = Literal["whitespace", "canonicalize", "siglip"]
"""whitespace: `clean`. canonicalize: open_clip's cleaning for SigLIP. siglip: transformers' SiglipTokenizer."""

# ftfy and html don't change printable ASCII without entities, so most captions skip their cost.
_NEEDS_REPAIR = re.compile(r"[^\t\n\r -~]|&")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def clean(text: str) -> str:
    """Clean a text as open_clip does: ftfy repairs its encoding and quotes, entities are decoded, spaces are single."""
    if _NEEDS_REPAIR.search(text):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split())


def canonicalize(text: str) -> str:
    """`clean`, then underscores become spaces, punctuation of ASCII is removed, and letters become lower case."""
    return " ".join(clean(text).replace("_", " ").translate(_WITHOUT_PUNCTUATION).lower().split())


def canonicalize_unrepaired(text: str) -> str:
    """Lower case without punctuation of ASCII and with single spaces. Nothing repairs the text."""
    return re.sub(r"\s+", " ", text.lower().translate(_WITHOUT_PUNCTUATION)).strip()


CLEANERS: dict[str, Callable[[str], str]] = {
    "whitespace": clean,
    "canonicalize": canonicalize,
    "siglip": canonicalize_unrepaired,
}
"""The functions by their name."""

"""Parts of whole sentences of a text that has more tokens than the model reads, such as CLIP's 77."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from .sentences import split_sentences

# Numbers of the tokens of n texts, start and end token included, without a limit.
CountTokens = Callable[[list[str]], list[int]]

# Places to divide a sentence, best first.
_BREAKS = tuple(map(re.compile, (r";\s+|\s+(?=\([A-La-l][^\s()]{0,4}\)\s)", r",\s+", r"\s+")))


class LongTexts:
    """Divides texts into parts that fit.

    A part is a run of consecutive sentences, as many as fit. Together, the parts of a text are its sentences in order.
    Only a sentence that is too long by itself is divided, into pieces of about equal length: at a semicolon or in
    front of a panel's label, else at a comma, else between words.

    Args:
        count: function that counts the tokens of texts.
        max_tokens: largest number of tokens of a part, start and end token included.
    """

    def __init__(self, count: CountTokens, max_tokens: int) -> None:
        self._count, self._max = count, max_tokens
        self._num_special = count([""])[0]

    def parts(self, texts: Sequence[str]) -> list[list[str]]:
        """Return the parts of each text. A text that fits is its only part."""
        tokens = self._count(list(texts))
        return [[text] if count <= self._max else self._parts(text) for text, count in zip(texts, tokens, strict=True)]

    def _parts(self, text: str) -> list[str]:
        pieces = self._pieces([sentence.strip() for sentence in split_sentences(text)])
        # The tokens of joined sentences are the sum of theirs in the usual tokenizers. In others, no pieces are joined
        # in a text where a sum is wrong.
        parts = self._joined(pieces, lambda part, added: part + added - self._num_special <= self._max)
        if max(self._count([text for text, _ in parts])) > max(self._max, *(count for _, count in pieces)):
            parts = self._joined(pieces, lambda part, added: False)
        return [text for text, _ in parts]

    def _joined(self, pieces: list[tuple[str, int]], fits: Callable[[int, int], bool]) -> list[tuple[str, int]]:
        """Join consecutive pieces, each with its number of tokens, as long as they fit."""
        parts = pieces[:1]
        for text, count in pieces[1:]:
            current, tokens = parts[-1]
            if fits(tokens, count):
                parts[-1] = (f"{current} {text}", tokens + count - self._num_special)
            else:
                parts.append((text, count))
        return parts

    def _pieces(self, sentences: list[str]) -> list[tuple[str, int]]:
        """Return each sentence with its number of tokens, or its pieces. A word that is too long stays one piece."""
        pieces = []
        for sentence, count in zip(sentences, self._count(sentences), strict=True):
            if count <= self._max or (place := _middle(sentence)) is None:
                pieces.append((sentence, count))
            else:
                pieces += self._pieces([sentence[:place].rstrip(), sentence[place:].lstrip()])
        return pieces


def _middle(sentence: str) -> int | None:
    """Return where to divide a sentence: in its middle half, at the best break, the one nearest to the middle."""
    for pattern in _BREAKS:
        places = [match.end() for match in pattern.finditer(sentence) if 0 < match.end() < len(sentence)]
        half = [place for place in places if len(sentence) <= 4 * place <= 3 * len(sentence)]
        if places := half or (places if pattern is _BREAKS[-1] else []):
            return min(places, key=lambda place: abs(2 * place - len(sentence)))
    return None

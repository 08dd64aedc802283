"""Find the image file that a figure's href in the XML refers to."""

from __future__ import annotations

import re
import urllib.parse
from collections import defaultdict
from collections.abc import Iterable

from .articles import IMAGE_SUFFIXES, SourceError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


class ImageNames:
    """Finds the image of an href among the files of an article. It never builds a path.

    It first compares the path of the href, then its last part, then the last part without a leading `journal.` (PLOS
    packages). If no file matches, it compares the same three regardless of case. It ignores image suffixes. If one
    image exists in several formats, it returns the first one in IMAGE_SUFFIXES.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._by_path: dict[str, list[str]] = defaultdict(list)
        self._by_stem: dict[str, list[str]] = defaultdict(list)
        for name in names:
            path = _without_suffix(name)
            for stem in dict.fromkeys((path, path.rpartition("/")[2])):
                table = self._by_path if stem == path else self._by_stem
                table[stem].append(name)
                table[_caseless(stem)].append(name)

    def find(self, hrefs: Iterable[str]) -> str:
        """Return the file of an image whose versions have these hrefs. Raises SourceError with the reason."""
        candidates: list[str] = []
        for href in hrefs:
            candidates += self._find(href)
        if not candidates:
            raise SourceError("image missing")
        return min(candidates, key=lambda name: (_preference(name), name))

    def _find(self, href: str) -> list[str]:
        paths = list(dict.fromkeys((href, urllib.parse.unquote(href))))
        # A URL says nothing about local folders, so only its last part counts.
        paths = [path.rpartition("/")[2] if _SCHEME.match(path) else path.removeprefix("./") for path in paths]
        if any(path.startswith("/") or "\\" in path or ".." in path.split("/") for path in paths):
            raise SourceError("unsafe href")
        for path in paths:
            last = path.rpartition("/")[2]
            stems = [path, _without_suffix(path), last, _without_suffix(last)]
            stems += [stem.removeprefix("journal.") for stem in stems[2:] if stem.startswith("journal.")]
            for key in [*filter(None, stems), *(_caseless(stem) for stem in stems if stem)]:
                for table in (self._by_path, self._by_stem):
                    if key not in table:
                        continue
                    if len({_without_suffix(name) for name in table[key]}) > 1:
                        raise SourceError("ambiguous href")
                    return table[key]
        return []


def _caseless(stem: str) -> str:
    # No href contains a zero byte, so this key never collides with one that respects case.
    return f"\0{stem.casefold()}"


def _without_suffix(name: str) -> str:
    stem, dot, suffix = name.rpartition(".")
    return stem if dot and f".{suffix.lower()}" in IMAGE_SUFFIXES else name


def _preference(name: str) -> int:
    return IMAGE_SUFFIXES.index("." + name.rpartition(".")[2].lower())

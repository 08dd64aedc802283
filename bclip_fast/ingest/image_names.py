"""Find the image files that a figure's hrefs in the XML refer to."""

from __future__ import annotations

import re
import urllib.parse
from collections import defaultdict
from collections.abc import Iterable

from bclip_fast.io.file_names import comparable

from .articles import SourceError
from .image_formats import preference, without_suffix

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


class ImageNames:
    """Finds the image of an href among the files of an article. It never builds a path.

    It first compares the path of the href, then its last part, then the last part without a leading `journal.` (PLOS
    packages). If no file matches, it compares the same three regardless of case. It ignores image suffixes, and forms
    of Unicode. If one image exists in several formats, it prefers them in the order of READ_SUFFIXES.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._by_path: dict[str, list[str]] = defaultdict(list)
        self._by_stem: dict[str, list[str]] = defaultdict(list)
        for name in names:
            path = without_suffix(comparable(name))
            for stem in dict.fromkeys((path, path.rpartition("/")[2])):
                table = self._by_path if stem == path else self._by_stem
                table[stem].append(name)
                table[_caseless(stem)].append(name)

    def find(self, hrefs: Iterable[str]) -> str:
        """Return the preferred file of an image whose versions have these hrefs. Raises SourceError with the reason."""
        return self.find_all(hrefs)[0]

    def find_all(self, hrefs: Iterable[str], thumbnails: Iterable[str] = ()) -> list[str]:
        """Return all files of an image, the preferred one first and those of the hrefs `thumbnails` last.

        Raises SourceError with the reason if there is no file, or if an href doesn't decide between two images.
        """
        ranks: dict[str, tuple[bool, int, str]] = {}
        small = set(thumbnails)
        for href in hrefs:
            for name in self._find(href):
                ranks.setdefault(name, (href in small, preference(name), name))
        if not ranks:
            raise SourceError("image missing")
        return sorted(ranks, key=ranks.__getitem__)

    def _find(self, href: str) -> list[str]:
        paths = list(dict.fromkeys(comparable(path) for path in (href, urllib.parse.unquote(href))))
        # A URL says nothing about local folders, so only its last part counts.
        paths = [path.rpartition("/")[2] if _SCHEME.match(path) else path.removeprefix("./") for path in paths]
        if any(path.startswith("/") or "\\" in path or ".." in path.split("/") for path in paths):
            raise SourceError("unsafe href")
        for path in paths:
            last = path.rpartition("/")[2]
            stems = [path, without_suffix(path), last, without_suffix(last)]
            stems += [stem.removeprefix("journal.") for stem in stems[2:] if stem.startswith("journal.")]
            for key in [*filter(None, stems), *(_caseless(stem) for stem in stems if stem)]:
                for table in (self._by_path, self._by_stem):
                    if key not in table:
                        continue
                    if len({without_suffix(comparable(name)) for name in table[key]}) > 1:
                        raise SourceError("ambiguous href")
                    return table[key]
        return []


def _caseless(stem: str) -> str:
    # No href contains a zero byte, so this key never collides with one that respects case.
    return f"\0{stem.casefold()}"

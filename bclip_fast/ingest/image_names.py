"""From the href of a figure in the XML to the file of its image."""

from __future__ import annotations

import re
import urllib.parse
from collections import defaultdict
from collections.abc import Iterable

from .articles import IMAGE_SUFFIXES, SourceError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


class ImageNames:
    """Finds the image that an href means among the files of its article; it never makes up a path.

    The rule: the href's path, else its last part, with an image suffix on either side disregarded; else without a
    leading `journal.` (PLOS packages); else the same regardless of case. Of several types of one image the first in
    IMAGE_SUFFIXES is taken.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._by_path: dict[str, list[str]] = defaultdict(list)
        self._by_stem: dict[str, list[str]] = defaultdict(list)
        for name in names:
            path = _without_suffix(name)
            for stem in dict.fromkeys((path, path.rpartition("/")[2])):
                table = self._by_path if stem == path else self._by_stem
                table[stem].append(name)
                table[_regardless_of_case(stem)].append(name)

    def find(self, hrefs: Iterable[str]) -> str:
        """The file for an image given by the hrefs of its versions. Raises SourceError with the reason."""
        found: list[str] = []
        for href in hrefs:
            found += self._find(href)
        if not found:
            raise SourceError("image missing")
        return min(found, key=lambda name: (_preference(name), name))

    def _find(self, href: str) -> list[str]:
        paths = list(dict.fromkeys((href, urllib.parse.unquote(href))))
        # An address says nothing about folders of ours: only its last part is looked up.
        paths = [path.rpartition("/")[2] if _SCHEME.match(path) else path.removeprefix("./") for path in paths]
        if any(path.startswith("/") or "\\" in path or ".." in path.split("/") for path in paths):
            raise SourceError("unsafe href")
        for path in paths:
            last = path.rpartition("/")[2]
            stems = [path, _without_suffix(path), last, _without_suffix(last)]
            stems += [stem.removeprefix("journal.") for stem in stems[2:] if stem.startswith("journal.")]
            for key in [*filter(None, stems), *(_regardless_of_case(stem) for stem in stems if stem)]:
                for table in (self._by_path, self._by_stem):
                    if key not in table:
                        continue
                    if len({_without_suffix(name) for name in table[key]}) > 1:
                        raise SourceError("ambiguous href")
                    return table[key]
        return []


def _regardless_of_case(stem: str) -> str:
    # A key that no href can be.
    return f"\0{stem.casefold()}"


def _without_suffix(name: str) -> str:
    stem, dot, suffix = name.rpartition(".")
    return stem if dot and f".{suffix.lower()}" in IMAGE_SUFFIXES else name


def _preference(name: str) -> int:
    return IMAGE_SUFFIXES.index("." + name.rpartition(".")[2].lower())

"""The object layout of PubMed Central's open-access bucket, over HTTP(S) or mirrored on disk.

    PMC<id>.<version>/PMC<id>.<version>.xml, <href>.jpg, ...      the files of a version of an article
    metadata/PMC<id>.<version>.json                              what is known of it, with the MD5 of every file

The rules, each recorded where it takes something away:
- Of several versions the highest that is no author manuscript counts, else the highest.
- Retracted articles, those outside the open-access subset and scans (OCR) are left out.
- An author manuscript needs a Creative Commons licence.
- Every object is checked against its MD5: of the XML and the images that in the metadata, of others their ETag.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import re
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .articles import IMAGE_SUFFIXES, ArticleFiles, Files, Package, SourceError
from .object_store import METADATA_KEY, Store, shared_store

PMC = "https://pmc-oa-opendata.s3.amazonaws.com"
LICENCES = ("commercial", "noncommercial", "all")
_COMMERCIAL = re.compile(r"CC0|CC BY(-SA|-ND)?")
_NONCOMMERCIAL = re.compile(r"CC0|CC BY(-NC)?(-SA|-ND)?")
_VERSIONS_PER_ID = 1 << 16
_ARTICLES_PER_PACKAGE = 16
_ITEM = re.compile(r"(?:PMC)?(\d{1,12})(?:\.(\d{1,4}(?:,\d{1,4})*))?")
_FILE_NAME = re.compile(r"(?!\.)[^/\\\x00-\x1f]{1,200}")
_MD5 = re.compile(r"[0-9a-f]{32}")
_MAX_INVENTORY_BYTES = 1 << 30


@dataclass(frozen=True)
class Rules:
    """Which articles may be used. `license`: commercial (CC0, CC BY, -SA, -ND), noncommercial (-NC as well) or all."""

    license: str = "all"
    keep_retracted: bool = False

    def licence_problem(self, code: str) -> str:
        allowed = {"commercial": _COMMERCIAL, "noncommercial": _NONCOMMERCIAL}.get(self.license)
        if allowed is None or allowed.fullmatch(code):
            return ""
        return f"licence not {self.license}: {code or 'not stated'}"


@dataclass(frozen=True)
class Version:
    """A version of an article: keys of its files with their MD5, and the metadata as it came."""

    name: str
    xml_key: str
    media: dict[str, str]  # key of an image -> MD5
    xml_md5: str
    raw: bytes
    values: dict[str, Any] = field(default_factory=dict)

    def problem(self, rules: Rules) -> str:
        """The reason against using it, as far as the metadata tell; the XML may still have to tell the licence."""
        code = self.values["licence"]
        if self.values["retracted"] and not rules.keep_retracted:
            return "retracted"
        if not self.values["open_access"]:
            return "not open access"
        if self.values["ocr"]:
            return "scanned article"
        if self.values["manuscript"] and not code.startswith("CC"):
            return "author manuscript without Creative Commons licence"
        return rules.licence_problem(code) if code else ""


def read_version(store: Store, name: str) -> Version:
    """Raises SourceError: no such object, or metadata that are not what the layout says."""
    raw = store.read(f"metadata/{name}.json")
    try:
        found = json.loads(raw)
        flags = {flag: found.get(flag, default) for flag, default in _FLAGS.items()}
        if found["pmcid"] != name.partition(".")[0] or not all(isinstance(value, bool) for value in flags.values()):
            raise ValueError
        xml_key, xml_md5 = _key_of(found["xml_url"], name)
        media = dict(_key_of(url, name) for url in found.get("media_urls") or ())
        texts = {key: found.get(key) or "" for key in ("license_code", "citation", "pmid", "doi")}
        texts = {key: " ".join(str(value).split())[:2000] for key, value in texts.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise SourceError("broken metadata") from None
    values = {
        "version": name,
        "licence": texts["license_code"],
        "citation": texts["citation"],
        "retracted": flags["is_retracted"],
        "manuscript": flags["is_manuscript"],
        "open_access": flags["is_pmc_openaccess"],
        "ocr": flags["is_historical_ocr"],
    }
    images = {key: md5 for key, md5 in media.items() if key.lower().endswith(IMAGE_SUFFIXES)}
    return Version(name, xml_key, images, xml_md5, raw, values)


_FLAGS = {"is_retracted": False, "is_manuscript": False, "is_pmc_openaccess": True, "is_historical_ocr": False}


def _key_of(url: str, version: str) -> tuple[str, str]:
    """The key and MD5 that an address in the metadata names: a file right below the version's own prefix."""
    parts = urllib.parse.urlsplit(url)
    folder, _, file = urllib.parse.unquote(parts.path).rpartition("/")
    md5 = urllib.parse.parse_qs(parts.query).get("md5", [""])[0].lower()
    if folder.rpartition("/")[2] != version or not _FILE_NAME.fullmatch(file) or not _MD5.fullmatch(md5):
        raise ValueError(url)
    return f"{version}/{file}", md5


def choose_version(store: Store, item: str) -> tuple[Version, list[tuple[str, str, str]]]:
    """The version of `PMC1`, `PMC1.2` or `PMC1.1,2` by the rule above, and a record of the others."""
    match = _ITEM.fullmatch(item)
    if match is None:
        raise SourceError("not the id of an article")
    article = f"PMC{match.group(1)}"
    if match.group(2):
        numbers = sorted({int(number) for number in match.group(2).split(",")}, reverse=True)
    else:
        found = map(METADATA_KEY.fullmatch, store.keys(f"metadata/{article}."))
        numbers = sorted((int(key.group(2)) for key in found if key), reverse=True)
    if not numbers:
        raise SourceError("no such article")
    highest = chosen = None
    for number in numbers:
        version = read_version(store, f"{article}.{number}")
        highest = highest or version
        if not version.values["manuscript"]:
            chosen = version
            break
    chosen = chosen or highest
    assert chosen is not None
    others = [f"{article}.{number}" for number in numbers if f"{article}.{number}" != chosen.name]
    return chosen, [(article, name, f"other version: {chosen.name} is used") for name in others]


@contextmanager
def open_objects(package: Package, rules: Rules, connections: int) -> Iterator[Files]:
    yield _Objects(package, rules, shared_store(package.root, connections))


class _Objects:
    def __init__(self, package: Package, rules: Rules, store: Store) -> None:
        self._package, self._rules, self._store = package, rules, store
        self._md5: dict[str, str] = {}
        self.refused: list[tuple[str, str, str]] = []

    def articles(self) -> Iterator[ArticleFiles]:
        for item in self._package.items:
            article = item.partition(".")[0]
            try:
                version, others = choose_version(self._store, item)
            except SourceError as error:
                self.refused.append((article, item, str(error)))
                continue
            self.refused += others
            if problem := version.problem(self._rules):
                self.refused.append((article, version.name, problem))
                continue
            self._md5 = {version.xml_key: version.xml_md5, **version.media}
            names = [key.partition("/")[2] for key in version.media]
            about = {name: value for name, value in version.values.items() if name not in ("open_access", "ocr")}
            yield ArticleFiles(version.xml_key, names, about)

    def read(self, name: str) -> bytes:
        return self._store.read(name, self._md5[name])


def discover_objects(root: str, selection: Iterable[str]) -> Iterator[Package]:
    """Units of work for articles that `select` gave."""
    items = iter(selection)
    while chunk := tuple(itertools.islice(items, _ARTICLES_PER_PACKAGE)):
        yield Package("objects", root, "", chunk)


def select(store: Store, *, ids: Path | None, inventory: str, prefix: str) -> Iterator[str]:
    """Articles in the order of their numbers, `PMC1.1,2` where versions are known: those of a file of ids, one a line;
    of an inventory (a `.csv` or `.csv.gz` file, or `latest`: the newest that the bucket holds); or whose id starts with
    `prefix`. Memory: 8 bytes a version. Raises SourceError, FetchError."""
    if ids is not None:
        yield from _ids(ids)
        return
    found = np.fromiter(_versions(store, inventory, prefix), np.uint64)
    found = np.unique(found)
    for number, versions in itertools.groupby(map(int, found), lambda value: value // _VERSIONS_PER_ID):
        yield f"PMC{number}." + ",".join(str(value % _VERSIONS_PER_ID) for value in versions)


def _ids(path: Path) -> Iterator[str]:
    try:
        lines = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: cannot be read: {error}") from None
    found: dict[str, None] = {}
    for line in lines:
        if not (match := _ITEM.fullmatch(line)):
            raise SourceError(
                f"{path}: {line[:40]!r} is not the id of an article; write PMC123 or PMC123.1, one a line"
            )
        found["PMC" + match.group(1) + (f".{match.group(2)}" if match.group(2) else "")] = None
    yield from found


def _versions(store: Store, inventory: str, prefix: str) -> Iterator[int]:
    keys: Iterable[str] = store.keys(f"metadata/{prefix}") if not inventory else _inventory_keys(store, inventory)
    for key in keys:
        if match := METADATA_KEY.fullmatch(key):
            yield int(match.group(1)) * _VERSIONS_PER_ID + int(match.group(2))


def _inventory_keys(store: Store, inventory: str) -> Iterator[str]:
    if inventory != "latest":
        try:
            yield from _csv_keys(lambda: open(inventory, "rb"))
        except OSError as error:
            raise SourceError(f"{inventory}: cannot be read: {error}") from None
        return
    reports = "inventory-reports/pmc-oa-opendata/metadata/"
    manifests = [key for key in store.keys(reports) if key.endswith("/manifest.json")]
    if not manifests:
        raise SourceError(f"no inventory below {reports}")
    try:
        files = [(file["key"], file.get("MD5checksum", "")) for file in json.loads(store.read(manifests[-1]))["files"]]
    except (ValueError, KeyError, TypeError):
        raise SourceError(f"{manifests[-1]}: broken manifest") from None
    for key, md5 in files:
        data = store.read(key, md5, _MAX_INVENTORY_BYTES)
        yield from _csv_keys(lambda data=data: io.BytesIO(data))  # type: ignore[misc]


def _csv_keys(opened: Callable[[], Any]) -> Iterator[str]:
    """The column `key` of rows `bucket, key, ...`, as S3's inventories have them: no header, percent-encoded."""
    with opened() as file:
        start = file.read(2)
        file.seek(0)
        content = gzip.GzipFile(fileobj=file) if start == b"\x1f\x8b" else file
        for row in csv.reader(io.TextIOWrapper(content, "utf-8")):
            if len(row) > 1:
                yield urllib.parse.unquote_plus(row[1])

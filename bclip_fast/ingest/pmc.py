"""The layout of PubMed Central's open-access bucket, and the rules that decide which articles may be used.

    PMC<id>.<version>/PMC<id>.<version>.xml, <href>.jpg, ...      the files of one version of an article
    metadata/PMC<id>.<version>.json                              its metadata, with the MD5 of every file

Each rule leaves a reject for every article or version that it excludes:
- The highest version that is not an author manuscript counts. If all are manuscripts, the highest version counts.
- Retracted articles, scanned articles (OCR), and articles outside the open-access subset are excluded.
- An author manuscript needs a Creative Commons licence.
- Every object must have the right MD5. For the XML and the images, the metadata state it. For other objects, the ETag
  does.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import re
import urllib.parse
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from .articles import ArticleArchive, ArticleFiles, Package, SourceError
from .image_formats import may_be_image
from .object_store import METADATA_KEY, Store, shared_store

PMC = "https://pmc-oa-opendata.s3.amazonaws.com"
_COMMERCIAL = re.compile(r"CC0|public domain|CC BY(-SA|-ND)?")
_NONCOMMERCIAL = re.compile(r"CC0|public domain|CC BY(-NC)?(-SA|-ND)?")
# Flags of the metadata and their defaults.
_FLAGS = {"is_retracted": False, "is_manuscript": False, "is_pmc_openaccess": True, "is_historical_ocr": False}
_VERSIONS_PER_ID = 1 << 16
_ARTICLES_PER_PACKAGE = 16
_ITEM = re.compile(r"(?:PMC)?(\d{1,12})(?:\.(\d{1,4}(?:,\d{1,4})*))?")
_FILE_NAME = re.compile(r"(?!\.)[^/\\\x00-\x1f]{1,200}")
_MD5 = re.compile(r"[0-9a-f]{32}")
_MAX_INVENTORY_BYTES = 1 << 30


@dataclass(frozen=True)
class Rules:
    """The rules that say which articles may be used.

    Attributes:
        license: "commercial" (CC0, public domain, CC BY, -SA, -ND), "noncommercial" (these and CC BY-NC...) or "all".
        keep_retracted: whether retracted articles may be used.
    """

    license: str = "all"
    keep_retracted: bool = False

    def licence_problem(self, code: str, statement: str = "") -> str:
        """Return why a licence is not allowed. Empty if it is allowed. `statement`: `Licence.problem`."""
        allowed = {"commercial": _COMMERCIAL, "noncommercial": _NONCOMMERCIAL}.get(self.license)
        if allowed is None or allowed.fullmatch(code):
            return ""
        verdict = f"{code} ({statement})" if code and statement else code or statement or "not stated"
        return f"licence not {self.license}: {verdict}"


@dataclass(frozen=True)
class Version:
    """A version of an article.

    Attributes:
        media: MD5 of each file that may be an image, by key.
        refused: (name, reason) of each file that may be an image and has an invalid address in the metadata.
        raw: the metadata file.
        values: the metadata's fields, under our names.
    """

    name: str
    xml_key: str
    media: dict[str, str]
    xml_md5: str
    raw: bytes
    values: dict[str, Any] = field(default_factory=dict)
    refused: tuple[tuple[str, str], ...] = ()

    def problem(self, rules: Rules) -> str:
        """Return why the rules exclude this version, or an empty string.

        The caller must also check the licence in the XML: the strictest one counts.
        """
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
    """Read the metadata of a version, such as PMC1.2. Raises SourceError if they are missing or invalid."""
    raw = store.read(f"metadata/{name}.json")
    try:
        metadata = json.loads(raw)
        flags = {flag: metadata.get(flag, default) for flag, default in _FLAGS.items()}
        if metadata["pmcid"] != name.partition(".")[0] or not all(isinstance(value, bool) for value in flags.values()):
            raise ValueError
        xml_key, xml_md5 = _key_of(metadata["xml_url"], name)
        urls = metadata.get("media_urls") or []
        if not isinstance(urls, list):
            raise ValueError
        texts = {key: metadata.get(key) or "" for key in ("license_code", "citation", "pmid", "doi")}
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
    images: dict[str, str] = {}
    refused = []
    for url in urls:
        try:
            key, md5 = _key_of(url, name)
        except (ValueError, TypeError, AttributeError):
            # Supplementary files may have any address. Only an image's address matters.
            if may_be_image(_file_of(str(url))):
                refused.append((str(url)[:200], "invalid address in the metadata"))
        else:
            if may_be_image(key):
                images[key] = md5
    return Version(name, xml_key, images, xml_md5, raw, values, tuple(refused))


def _file_of(url: str) -> str:
    """Return the name of the file in a URL that may be invalid."""
    return url.partition("?md5=")[0].rpartition("/")[2]


def _key_of(url: str, version: str) -> tuple[str, str]:
    """Return the key and MD5 of a URL in the metadata. Raises ValueError unless the file lies in `version`.

    A name may hold `#` or `?`, which the metadata don't escape, so the MD5 is the part after the last `?md5=`.
    """
    address, _, md5 = url.rpartition("?md5=")
    md5 = md5.partition("&")[0].lower()
    folder, _, file = address.rpartition("/")
    file = urllib.parse.unquote(file, errors="surrogateescape")
    if folder.rpartition("/")[2] != version or not _FILE_NAME.fullmatch(file) or not _MD5.fullmatch(md5):
        raise ValueError(url)
    return f"{version}/{file}", md5


def choose_version(store: Store, item: str) -> tuple[Version, list[tuple[str, str, str]]]:
    """Return the version of `PMC1`, `PMC1.2` or `PMC1.1,2` that the first rule selects, and rejects for the others.

    Raises:
        SourceError: the id is invalid, the article is missing, or its metadata are broken.
        FetchError: the store couldn't be read this time.
    """
    match = _ITEM.fullmatch(item)
    if match is None:
        raise SourceError("not the id of an article")
    article = f"PMC{match.group(1)}"
    if match.group(2):
        numbers = sorted({int(number) for number in match.group(2).split(",")}, reverse=True)
    else:
        matches = map(METADATA_KEY.fullmatch, store.keys(f"metadata/{article}."))
        numbers = sorted((int(match.group(2)) for match in matches if match), reverse=True)
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
def open_objects(package: Package, rules: Rules, connections: int) -> Iterator[ArticleArchive]:
    """Open the articles of a store that `package` names."""
    yield _ObjectArchive(package, rules, shared_store(package.root, connections))


class _ObjectArchive:
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
            self.refused += [(article, name, reason) for name, reason in version.refused]
            if problem := version.problem(self._rules):
                self.refused.append((article, version.name, problem))
                continue
            self._md5 = {version.xml_key: version.xml_md5, **version.media}
            names = [key.partition("/")[2] for key in version.media]
            metadata = {name: value for name, value in version.values.items() if name not in ("open_access", "ocr")}
            yield ArticleFiles(version.xml_key, names, metadata)

    def read(self, name: str) -> bytes:
        return self._store.read(name, self._md5[name])


def discover_objects(root: str, selection: Iterable[str]) -> Iterator[Package]:
    """Yield units of work for the articles that `select` yields."""
    items = iter(selection)
    while chunk := tuple(itertools.islice(items, _ARTICLES_PER_PACKAGE)):
        yield Package("objects", root, "", chunk)


def select(store: Store, *, ids: Path | None, inventory: str, prefix: str) -> Iterator[str]:
    """Yield articles by one of three criteria, as `PMC1.1,2` if their versions are known.

    The articles of an inventory or with a prefix come in the order of their numbers. They take 8 bytes of memory a
    version.

    Args:
        ids: file with one id a line. If given, the articles come in its order.
        inventory: `.csv` or `.csv.gz` file, or `latest` for the newest inventory in the bucket.
        prefix: start of the ids. Used if `ids` and `inventory` are not given.

    Raises:
        SourceError: a file is unreadable, or an id or inventory is invalid.
        FetchError: the store couldn't be read this time.
    """
    if ids is not None:
        yield from _ids(ids)
        return
    versions = np.unique(np.fromiter(_versions(store, inventory, prefix), np.uint64))
    for number, values in itertools.groupby(map(int, versions), lambda value: value // _VERSIONS_PER_ID):
        yield f"PMC{number}." + ",".join(str(value % _VERSIONS_PER_ID) for value in values)


def _ids(path: Path) -> Iterator[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: cannot be read: {error}") from None
    items: dict[str, None] = {}
    for number, line in enumerate(lines, 1):
        for word in line.split():
            if not (match := _ITEM.fullmatch(word)):
                raise SourceError(
                    f"{path}, line {number}: {word[:40]!r} is not the id of an article; write one id a line, PMC123 or "
                    "PMC123.1"
                )
            items["PMC" + match.group(1) + (f".{match.group(2)}" if match.group(2) else "")] = None
    yield from items


def _versions(store: Store, inventory: str, prefix: str) -> Iterator[int]:
    keys: Iterable[str] = store.keys(f"metadata/{prefix}") if not inventory else _inventory_keys(store, inventory)
    for key in keys:
        if match := METADATA_KEY.fullmatch(key):
            yield int(match.group(1)) * _VERSIONS_PER_ID + int(match.group(2))


def _inventory_keys(store: Store, inventory: str) -> Iterator[str]:
    if inventory != "latest":
        try:
            with open(inventory, "rb") as file:
                yield from _csv_keys(file, inventory)
        except OSError as error:
            raise SourceError(f"{inventory}: cannot be read: {error}") from None
        return
    reports = "inventory-reports/pmc-oa-opendata/metadata/"
    manifests = [key for key in store.keys(reports) if key.endswith("/manifest.json")]
    if not manifests:
        raise SourceError(f"the bucket has no inventory below {reports}; pass an inventory file, ids or a prefix")
    try:
        files = [(file["key"], file.get("MD5checksum", "")) for file in json.loads(store.read(manifests[-1]))["files"]]
    except (ValueError, KeyError, TypeError):
        raise SourceError(f"{manifests[-1]}: broken manifest") from None
    for key, md5 in files:
        yield from _csv_keys(io.BytesIO(store.read(key, md5, _MAX_INVENTORY_BYTES)), key)


def _csv_keys(file: IO[bytes], name: str) -> Iterator[str]:
    """Yield the keys of an S3 inventory: rows `bucket, key, ...` without a header, where keys are percent-encoded.

    Raises:
        SourceError: a row without a key, with its line number, or a file that is not CSV. name: the file, for errors.
    """
    start = file.read(2)
    file.seek(0)
    content: Any = gzip.GzipFile(fileobj=file) if start == b"\x1f\x8b" else file
    rows = csv.reader(io.TextIOWrapper(content, "utf-8-sig"), strict=True)
    try:
        for row in rows:
            if len(row) > 1:
                yield urllib.parse.unquote_plus(row[1])
            elif row:
                raise SourceError(f"{name}, line {rows.line_num}: no key; a row of an inventory is bucket,key,...")
    except (csv.Error, UnicodeDecodeError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SourceError(f"{name}, line {rows.line_num + 1}: not an inventory in CSV: {error}") from None

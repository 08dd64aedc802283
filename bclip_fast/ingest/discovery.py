"""Find the packages of articles in a tree of folders, and name everything in it that isn't read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bclip_fast.io.folders import Listing

from .articles import ARCHIVE_SUFFIXES, UNREAD_SUFFIXES, XML_SUFFIXES, ArticleArchive, FolderArchive, Package
from .image_formats import suffix_of
from .tar_archives import XMLS_PER_UNIT, num_articles, open_archive

_XMLS_PER_PACKAGE = 16
_OTHER_ARCHIVE = "archive of a format that is not read; make a tar of it"


def discover(root: Path) -> Iterator[Package]:
    """Yield all packages of the tree under `root`. Their order depends only on the names.

    Hidden files and folders are left out, and their number is logged at the end.

    A package of kind "unread" is a folder or archive that gives no article. It is a link to a folder, or an archive of
    another format. Or it is a folder that cannot be listed, or that has images without an article.
    Archives and images in the folder of an article, or below it, belong to that article.
    """
    folders_of_articles: set[str] = set()
    failures: list[OSError] = []
    listing = Listing(root)
    for folder, folders, names in listing.walk(onerror=failures.append):
        yield from _unlisted(root, failures)
        relative = Path(folder).relative_to(root).as_posix()
        prefix = "" if relative == "." else f"{relative}/"
        for name in folders:
            if os.path.islink(os.path.join(folder, name)):
                yield _unread(root, prefix + name, _link_problem(Path(folder, name), root))
        xml_names = [prefix + name for name in names if name.lower().endswith(XML_SUFFIXES)]
        for start in range(0, len(xml_names), _XMLS_PER_PACKAGE):
            items = tuple(xml_names[start : start + _XMLS_PER_PACKAGE])
            yield Package("folder", str(root), prefix.rstrip("/"), items)
        for name in names:
            if name.lower().endswith(ARCHIVE_SUFFIXES):
                count = num_articles(Path(folder, name), root)
                for first in range(0, count, XMLS_PER_UNIT) if count else (-1,):
                    yield Package("archive", str(root), prefix + name, first=first)
        if xml_names or (os.path.dirname(prefix.rstrip("/")) in folders_of_articles and relative != "."):
            folders_of_articles.add(prefix.rstrip("/"))
            continue
        for name in names:
            if name.lower().endswith(UNREAD_SUFFIXES):
                yield _unread(root, prefix + name, _OTHER_ARCHIVE)
        num_images = sum(bool(suffix_of(name)) for name in names)
        if num_images:
            yield _unread(root, prefix.rstrip("/") or ".", f"images without an article: {num_images} files")
    yield from _unlisted(root, failures)
    listing.log()


def is_archive(name: str) -> bool:
    """Return whether a file's name is that of an archive, read or not."""
    return name.lower().endswith(ARCHIVE_SUFFIXES + UNREAD_SUFFIXES)


def archive_package(path: Path) -> Package:
    """Return the package of one archive, with all its articles."""
    if path.name.lower().endswith(ARCHIVE_SUFFIXES):
        return Package("archive", str(path.parent), path.name, first=-1)
    return _unread(path.parent, path.name, _OTHER_ARCHIVE)


def _unread(root: Path, name: str, reason: str) -> Package:
    return Package("unread", str(root), name, (reason,))


def _unlisted(root: Path, failures: list[OSError]) -> Iterator[Package]:
    for error in failures:
        name = os.path.relpath(os.fsdecode(error.filename), root)
        yield _unread(root, name, f"folder cannot be listed: {error.strerror}")
    failures.clear()


def _link_problem(path: Path, root: Path) -> str:
    try:
        target = path.resolve()
    except (OSError, RuntimeError):
        return "link to a folder: not followed"
    if target.is_relative_to(root.resolve()):
        return f"link to a folder: the source has it as {target.relative_to(root.resolve()).as_posix()}"
    return "link to a folder: not followed; give its target as another source"


@contextmanager
def open_package(package: Package) -> Iterator[ArticleArchive]:
    """Open a folder or archive. Raises SourceError for an archive that is truncated, corrupt or too large."""
    if package.kind == "folder":
        yield FolderArchive(package)
        return
    with open_archive(package) as archive:
        yield archive

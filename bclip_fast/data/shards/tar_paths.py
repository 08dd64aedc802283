"""The tar files that a path, a folder or a pattern names, and their splits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from bclip_fast.data.image_files import IMAGE_SUFFIXES
from bclip_fast.data.splits import MissingSplit, by_split, canonical
from bclip_fast.data.storage import ReadConfig, Storage, open_storage
from bclip_fast.errors import UserError
from bclip_fast.io.folders import Listing

ALL = "all"
"""The split that has all tar files."""
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_NUMBER = re.compile(r"[-_.]?\d+$")
_MAX_FILES = 10_000_000


def expand_braces(pattern: str) -> list[str]:
    """Return the paths of a pattern: {00..12} is each number with leading zeros, and {a,b} each text.

    Raises:
        UserError: the braces don't match or give nothing.
    """
    match = _BRACES.search(pattern)
    if match is None or "{" in pattern[: match.start()] or "}" in pattern[: match.start()]:
        if "{" in pattern or "}" in pattern:
            raise UserError(
                f"the braces of {pattern} do not match, or are nested; write {{00000..00099}}.tar or {{a,b}}.tar"
            )
        return [pattern]
    bounds = _RANGE.fullmatch(match.group(1))
    if bounds:
        first, last = bounds.groups()
        numbers = range(int(first), int(last) + 1)
        if not numbers or len(numbers) > _MAX_FILES:
            raise UserError(f"{{{match.group(1)}}} in {pattern} is not a range of increasing numbers")
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        items = [f"{number:0{width}d}" for number in numbers]
    elif "," in match.group(1):
        items = match.group(1).split(",")
    else:
        raise UserError(f"{{{match.group(1)}}} in {pattern} is neither a range such as 000..099 nor a list such as a,b")
    start, end = pattern[: match.start()], pattern[match.end() :]
    return [path for item in items for path in expand_braces(f"{start}{item}{end}")]


def is_tar_path(path: str) -> bool:
    """Whether a path names tar files themselves: one of them, or a pattern."""
    return path.endswith(".tar") or "{" in path


def tar_files(path: str, read: ReadConfig) -> tuple[Storage, list[str]]:
    """Return the storage and the names of the tar files at a path: a folder, a file or a pattern. [] if it has none.

    Raises:
        UserError: a pattern is wrong, or the storage fails.
    """
    if not is_tar_path(path):
        storage = open_storage(path, read)
        return storage, storage.find(".tar")
    # The root is the folder before the first brace, so that all names are below it.
    root, slash, _ = path.partition("{")[0].rpartition("/")
    names = expand_braces(path[len(root) + len(slash) :])
    if wrong := [name for name in names if not name.endswith(".tar") or not _is_below(name)]:
        raise UserError(f"{path} names {wrong[0]}, which is not a .tar file below {root or '.'}; check the pattern")
    if repeated := next((name for name in names if names.count(name) > 1), None) if len(names) < 1000 else None:
        raise UserError(f"{path} names {repeated} twice; check the pattern")
    return open_storage(root or slash or ".", read), names


def _is_below(name: str) -> bool:
    return ".." not in name.split("/") and not name.startswith("/")


def has_tar_files(folder: Path) -> bool:
    """Whether a local folder holds tar files of others, at any depth, and neither images nor a dataset of ours."""
    if not folder.is_dir() or (folder / "dataset.json").is_file():
        return False
    names = [file.name for file in Listing(folder).files_below(folder)]
    return (
        any(name.endswith(".tar") for name in names)
        and not any(name.lower().endswith(IMAGE_SUFFIXES) for name in names)
        and not any(name.endswith(".index.json") for name in names)
    )


def is_ours(storage: Storage, name: str) -> bool:
    """Whether a tar file has an index of `bclip ingest build` beside it."""
    try:
        storage.stamp(f"{name.removesuffix('.tar')}.index.json")
    except FileNotFoundError:
        return False
    return True


def names_of_split(names: Sequence[str], split: str, subject: str) -> list[str]:
    """Return the tar files of a split.

    Folders and names before the number tell the split, as in train/00000.tar and cc3m-validation-0000.tar. Without such
    names, all files are the split `train`.

    Raises:
        MissingSplit: no file is of the split.
    """
    stems = {name: _NUMBER.sub("", name.removesuffix(".tar")).rstrip("/") for name in names}
    splits = by_split(sorted(set(stems.values())))
    wanted = canonical(split) or split
    if not splits:
        if wanted not in ("train", ALL):
            raise MissingSplit(
                f"{subject} has no split {split!r}: the names of its tar files tell no split; use the split train"
            )
        return list(names)
    chosen = [name for name in names if splits.get(stems[name]) == wanted or wanted == ALL]
    if not chosen:
        raise MissingSplit(
            f"{subject} has no split {split!r}; its splits are {', '.join(sorted(set(splits.values())))}"
        )
    return chosen

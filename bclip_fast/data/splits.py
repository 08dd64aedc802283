"""The splits of a data set, in the spellings that public data sets use for folders, files, columns and arrays.

`resolve` is the only place that decides which name stands for a split. A name that spells a split as a whole, as
`Training`, always stands for it. A name with a spelling as a part, as `train_set` or `seg_train`, can also be a class.
So it counts only next to names of other splits, or where every name is that of a split.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from bclip_fast.errors import UserError
from bclip_fast.io.file_names import printable

SPELLINGS = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validate", "validation", "dev", "development"),
    "test": ("test", "testing", "tst"),
}
"""Spellings of each split, in lower case. Upper and lower case are equal."""
SHORT = {"train": ("tr",), "val": ("vl",), "test": ("ts",)}
"""Whole names that count like parts of names, because they also abbreviate other words."""
EITHER = ("eval", "evaluation")
"""Names of validation data if there is a test split, and of test data if there is a validation split."""
ENDINGS = ("set", "sets", "data", "dataset", "split", "image", "images", "img", "imgs")
"""Words that may follow a spelling without a separator, as in `trainset`."""

_SPLIT_OF = {spelling: split for split, spellings in SPELLINGS.items() for spelling in spellings}
_SHORT_OF = {spelling: split for split, spellings in SHORT.items() for spelling in spellings}
_GLUED = re.compile(rf"({'|'.join(_SPLIT_OF)})(?:{'|'.join(ENDINGS)})")
_IMAGES = re.compile(rf"(?:images|imgs)({'|'.join(_SHORT_OF)})")  # imagesTr of nnU-Net and MONAI
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


class MissingSplit(UserError):
    """The data have no such split. Any other UserError says that the split is there, but cannot be used."""


def canonical(name: str) -> str | None:
    """Return `train`, `val` or `test` if the whole name spells that split, else None."""
    return _SPLIT_OF.get(name.casefold())


def _by_part(name: str) -> str | None:
    """Return the split that a part of the name spells, or None if no part does, or parts spell several splits."""
    lower = name.casefold()
    if short := _SHORT_OF.get(lower):
        return short
    if match := _IMAGES.fullmatch(lower):
        return _SHORT_OF[match.group(1)]
    splits = set()
    for word in _WORD.findall(name):
        match = _GLUED.fullmatch(word.casefold())
        splits.add(_SPLIT_OF.get(match.group(1) if match else word.casefold()))
    splits.discard(None)
    return splits.pop() if len(splits) == 1 else None


def by_split(names: Iterable[str], *, certain: bool = False) -> dict[str, str]:
    """Return the split of each name that stands for one: train, val, test, or `eval` if it may be either.

    certain: every name is that of a split. False: some may be names of classes.
    """
    names = list(names)
    splits = {name: split for name in names if (split := canonical(name))}
    parts = {name: split for name in names if name not in splits and (split := _by_part(name))}
    if splits or certain or len(set(parts.values())) > 1:
        splits |= parts
    either = [name for name in names if name.casefold() in EITHER]
    if splits or certain:
        free = {"val", "test"} - set(splits.values())
        splits |= dict.fromkeys(either, free.pop() if len(free) == 1 else EITHER[0])
    return splits


def parts_only(names: Iterable[str]) -> list[str]:
    """Return the names that look like a split's but count as classes, because they are the only hint."""
    names = list(names)
    return [] if by_split(names) else [name for name in names if _by_part(name)]


def check_whole(split: str, subject: str) -> None:
    """Raise MissingSplit for data without splits, unless the name is usual (train, val, test) or `all`."""
    if split not in ("all", *EITHER) and (canonical(split) or _SHORT_OF.get(split.casefold())) is None:
        raise MissingSplit(f"{subject} has no splits and thus no split {split!r}; omit the split")


def described(splits: dict[str, str]) -> str:
    """Return the names with their splits for a message: `Testing (test), train`."""
    return ", ".join(
        printable(name) if name == split else f"{printable(name)} ({split})" for name, split in sorted(splits.items())
    )


def resolve(split: str, names: Sequence[str], subject: str, *, certain: bool = False, by_program: bool = False) -> str:
    """Return the name that stands for a split: a spelling of train, val or test, or any name as it is.

    Args:
        names: names of folders, files, cells or arrays. They may contain other names.
        subject: the data, for errors.
        certain: every name is that of a split.
        by_program: the names were written by a program, so the exact name wins over other spellings.

    Raises:
        MissingSplit: no name stands for the split.
        UserError: several names stand for it, or one may stand for it or for another split.
    """
    certain = certain or by_program
    splits = by_split(names, certain=certain)
    wanted = canonical(split) or _SHORT_OF.get(split.casefold())
    if split in names and (by_program or wanted is None):
        return split
    if wanted is None:
        matches = [name for name in names if name.casefold() == split.casefold()]
    else:
        matches = [name for name in names if splits.get(name) == wanted]
    if len(matches) > 1:
        shown = " and ".join(map(repr, map(printable, matches)))
        raise UserError(f"{subject} has {shown}, which both mean split {wanted or split!r}; remove or rename one")
    if matches:
        return matches[0]
    unclear = [name for name, other in splits.items() if other == EITHER[0]]
    if unclear and wanted in ("val", "test"):
        raise UserError(
            f"{subject} has {unclear[0]!r}, which may mean validation or test data, and no other; "
            f"rename it to val or test, or pass split {unclear[0]!r}"
        )
    if by_program:
        splits = {name: name for name in names}
    elif certain:
        splits |= {name: name for name in names if name not in splits}
    available = described(splits)
    raise MissingSplit(f"{subject} has no split {split!r}; its splits are {available or 'none'}")

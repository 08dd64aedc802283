"""List and read the files of a data set: images, and the folder or file of a split."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bclip_fast.data import splits
from bclip_fast.data.image_files import IMAGE_SUFFIXES, UNREAD_SUFFIXES
from bclip_fast.errors import UserError
from bclip_fast.io.file_names import printable
from bclip_fast.io.folders import Listing, shown

log = logging.getLogger(__name__)


class ImageListing(Listing):
    """Lists the images of a data set. `log` names the images in formats that are not read, and the broken links."""

    def __init__(self, root: Path) -> None:
        """root: folder that the names in the log start from."""
        super().__init__(root)
        self._unread: list[str] = []
        self._broken: list[str] = []

    def images(self, paths: Iterable[Path]) -> list[Path]:
        """Return the image files among `paths`."""
        images = []
        for path in paths:
            suffix = path.suffix.lower()
            if suffix not in IMAGE_SUFFIXES and suffix not in UNREAD_SUFFIXES:
                continue
            if not path.is_file():
                self._broken.append(str(path.relative_to(self.root)))
            elif suffix in IMAGE_SUFFIXES:
                images.append(path)
            else:
                self._unread.append(str(path.relative_to(self.root)))
        return images

    def log(self) -> None:
        """Log everything that was left out."""
        super().log()
        if self._unread:
            text = "%s: left out %d images in formats that are not read: %s"
            log.warning(text, self.root, len(self._unread), shown(self._unread))
        if self._broken:
            text = "%s: left out %d links to missing files (git annex and datalad fetch theirs with `get`): %s"
            log.warning(text, self.root, len(self._broken), shown(self._broken))


class MissingData(UserError):
    """The data set is not there. Any other UserError says that it is there, but faulty."""


@dataclass(frozen=True)
class SplitFolder:
    """The folder of a split.

    split: train, val or test, the folder's own name, or `all` if the root has no splits. siblings: the folders of the
    other splits.
    """

    path: Path
    split: str
    siblings: tuple[Path, ...] = ()


def find_split(listing: Listing, split: str) -> SplitFolder:
    """Return the folder of a split below the listing's root. Without folders of splits, return the root.

    Raises:
        MissingSplit: the root has folders of other splits only.
        UserError: several folders may stand for the split.
    """
    root, names = listing.root, listing.folders(listing.root)
    roles = splits.by_split(names)
    if not roles and split not in names:
        if doubtful := splits.parts_only(names):
            text = "%s: no folder is that of a split, so the folders %s count as classes"
            log.warning(text, root, shown(doubtful))
        splits.check_whole(split, f"data {root}")
        log.info("%s: no folders of splits, so all images are used", root)
        return SplitFolder(root, "all")
    name = splits.resolve(split, names, f"data {root}")
    found = roles.get(name, split)
    path = root / name
    inner = listing.folders(path)
    if len(inner) == 1 and splits.by_split(inner, certain=True).get(inner[0]) == found:
        path = path / inner[0]  # seg_train/seg_train of archives from Kaggle
    others = {other: role for other, role in roles.items() if other != name}
    rest = [other for other in names if other not in roles and other != name]
    log.info(
        "%s: split %s is %s/%s%s", root, found, printable(path.relative_to(root).as_posix()),
        f"; other splits: {splits.described(others)}" if others else "", f"; left out: {shown(rest)}" if rest else "",
    )  # fmt: skip
    return SplitFolder(path, found, tuple(root / other for other in others))


def split_files(listing: Listing, suffixes: Sequence[str], *, certain: bool = False) -> dict[str, Path]:
    """Return the files directly in the root whose names stand for splits, such as train.csv, by their name's stem.

    certain: a part of the name is enough, even without a file of another split.

    Raises:
        UserError: two such files differ only in their suffix.
    """
    files: dict[str, Path] = {}
    for path in listing.files(listing.root):
        if path.suffix.lower() in suffixes:
            if path.stem in files:
                raise UserError(f"data {listing.root} has {files[path.stem].name} and {path.name}; remove one of them")
            files[path.stem] = path
    return {stem: files[stem] for stem in splits.by_split(files, certain=certain)}


def file_of_split(files: dict[str, Path], split: str, root: Path) -> tuple[Path, str]:
    """Return the file among `split_files` that stands for a split, and the split's name. Raises UserError."""
    names = ", ".join(printable(file.name) for file in files.values())
    stem = splits.resolve(split, list(files), f"data {root}, with the files {names},", certain=True)
    found = splits.by_split(files, certain=True).get(stem, split)
    log.info("%s: split %s is %s", root, found, printable(files[stem].name))
    return files[stem], found


def existing(path: Path) -> Path:
    """Return the path, or the same name in the other Unicode form (NFC or NFD) if only that exists."""
    if not path.exists():
        for form in ("NFC", "NFD"):
            other = Path(unicodedata.normalize(form, str(path)))  # type: ignore[arg-type]
            if other.exists():
                return other
    return path


def read_image(path: Path, remark: str = "") -> bytes:
    """Return the bytes of an image file. Raises UserError, whose message has `remark` after the path."""
    try:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return existing(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"image {path}{remark} cannot be read: {reason}") from error

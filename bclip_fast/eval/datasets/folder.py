"""Folders of images: one folder per class, as torchvision's ImageFolder reads (`root/[split/]class/image.jpg`)."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

from bclip_fast.data import splits
from bclip_fast.data.image_files import IMAGE_SUFFIXES
from bclip_fast.errors import UserError
from bclip_fast.io.file_names import comparable, printable
from bclip_fast.io.folders import shown
from bclip_fast.io.hashing import sha256, sha256_of_parts

from .files import ImageListing, SplitFolder, read_image

log = logging.getLogger(__name__)


class FolderDataset:
    """Images in the order of their paths. The folder's name is the label of kind `class`. See `EvalDataset`."""

    label_kinds: tuple[str, ...] = ("class",)

    def __init__(self, listing: ImageListing, place: SplitFolder) -> None:
        """List the images of the classes in the folder `place`.

        Raises:
            UserError: a class without images, unless no other split has that class either. Or there is no class, or
                the classes hold splits.
        """
        root = place.path
        self.path, self.split, self._root = str(root), place.split, root
        self._samples: list[tuple[Path, str]] = []
        names = listing.folders(root)
        _check_levels(listing, root, names)
        folders: dict[str, str] = {}
        empty: list[str] = []
        for name in names:
            label = comparable(printable(name))
            if folders.setdefault(label, name) != name:
                raise UserError(f"data folder {root} has two folders that read {label!r}; rename one of them")
            images = listing.images(listing.files_below(root / name))
            self._samples += [(path, label) for path in images]
            if not images:
                empty.append(name)
        if not names:
            raise UserError(
                f"data folder {root} is neither shards (no dataset.json) nor a folder with a folder per class"
            )
        siblings = {name for folder in place.siblings for name in listing.folders(folder)}
        for name in empty:
            if not self._samples or not place.siblings or name in siblings:
                raise UserError(
                    f"data folder {root / name} holds no image ({' '.join(IMAGE_SUFFIXES)}); remove or fill it"
                )
        if empty:
            log.warning("%s: left out the empty folders %s, which no other split has", root, shown(empty))
        listing.log()

    def __len__(self) -> int:
        return len(self._samples)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of keys, labels and images."""
        return sha256_of_parts(
            f"{self.key(i)}\0{label}\0{sha256(self.image(i))}\n".encode(errors="surrogateescape")
            for i, (_, label) in enumerate(self._samples)
        )

    def key(self, i: int) -> str:
        """Return the path within the folder."""
        return printable(self._samples[i][0].relative_to(self._root).as_posix())

    def image(self, i: int) -> bytes:
        """Return the contents of the file."""
        return read_image(self._samples[i][0])

    def captions(self) -> None:
        """Return None: the images have no captions."""
        return None

    def labels(self, kind: str) -> list[str | None]:
        """Return the labels of kind `class`."""
        if kind != "class":
            raise UserError(
                f"label {kind!r} is unknown; {self.path} is a folder of images by class, and its label is 'class'"
            )
        return [label for _, label in self._samples]


def _check_levels(listing: ImageListing, root: Path, classes: list[str]) -> None:
    """Raise UserError if folders of splits lie below the folders that would be the classes."""
    for name in classes:
        below = splits.by_split(listing.folders(root / name))
        if len(set(below.values())) > 1:
            folder = root / printable(name)
            raise UserError(
                f"data folder {folder} holds the splits {splits.described(below)} and is not a class; "
                f"pass {folder} as the data, or put the folders of the classes below those of the splits"
            )


class TilDataset(FolderDataset):
    """TCGA-TIL as on Zenodo: `[cancer/]split/til-{negative,positive}/`, all cancers of the folder together."""

    def __init__(self, root: Path, split: str, download_url: str) -> None:
        """List the images. Raises UserError without images."""
        classes = ("til-negative", "til-positive")
        listing = ImageListing(root)
        self.path, self.split, self._root = str(root), splits.canonical(split) or split, root
        self._samples = []
        used, unused = [], []
        for folder in (root, *(root / name for name in listing.folders(root))):
            names = listing.folders(folder)
            try:
                place = folder / splits.resolve(split, names, f"data folder {folder}")
            except splits.MissingSplit:
                if splits.by_split(names):
                    unused.append(folder.name)
                continue
            if not (place / classes[1]).is_dir():
                continue
            used.append(str(place.relative_to(root)))
            for name in classes:
                images = listing.images(listing.files(place / name)) if (place / name).is_dir() else []
                self._samples += [(path, name) for path in images]
        if {label for _, label in self._samples} != set(classes):
            raise UserError(
                f"{root} holds no [CANCER/]{split}/{{{','.join(classes)}}}/ with images of both; "
                f"get TCGA-TIL from {download_url}"
            )
        log.info("%s: split %s is %s%s", root, self.split, shown(used), f"; none in {shown(unused)}" if unused else "")
        listing.log()


class UnlabelledDataset(FolderDataset):
    """All images of a folder and its subfolders, in the order of their paths, without labels."""

    label_kinds: tuple[str, ...] = ()

    def __init__(self, root: Path) -> None:
        """List the images. Raises UserError without images."""
        listing = ImageListing(root)
        self.path, self.split, self._root = str(root), "all", root
        self._samples = [(path, "") for path in listing.images(listing.files_below(root))]
        listing.log()
        if not self._samples:
            raise UserError(f"data folder {root} holds no image ({' '.join(IMAGE_SUFFIXES)})")
        if roles := splits.by_split(listing.folders(root)):
            log.info("%s: all images are used, with those of the splits %s", root, splits.described(roles))

    def labels(self, kind: str) -> list[str | None]:
        """Raise UserError: the images have no labels."""
        raise UserError(f"label {kind!r} is unknown; {self.path} is a folder of images without labels")

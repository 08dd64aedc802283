"""Folders of images: one folder per class, as torchvision's ImageFolder reads (`root/[split/]class/image.jpg`)."""

from __future__ import annotations

import functools
from pathlib import Path

from bclip_fast.data.image_files import IMAGE_SUFFIXES
from bclip_fast.errors import UserError
from bclip_fast.io.file_names import printable
from bclip_fast.io.hashing import sha256, sha256_of_parts

from .files import read_image, select_images

_SPLIT_NAMES = {"train", "trn", "val", "valid", "validation", "dev", "test", "tst"}


class FolderDataset:
    """Images in the order of their paths. The folder's name is the label of kind `class`. See `EvalDataset`.

    If `root` has a folder named like the split, it holds the classes. If `root` has folders of other splits, the split
    is unknown. Without split folders, `root` holds the classes, and all images are used.
    """

    label_kinds: tuple[str, ...] = ("class",)

    def __init__(self, root: Path, split: str) -> None:
        """List the images. Raises UserError for an unknown split or an empty class."""
        folders = _subfolders(root)
        splits = [name for name in folders if name in _SPLIT_NAMES]
        if split in folders:
            root = root / split
            folders = _subfolders(root)
        elif splits:
            raise UserError(f"data {root} has no split {split!r}; its splits are {', '.join(splits)}")
        else:
            split = "all"
        self.path = str(root)
        self.split = split
        self._root = root
        self._samples: list[tuple[Path, str]] = []
        for name in folders:
            images = _images_below(root / name)
            if not images:
                raise UserError(
                    f"data folder {root / name} holds no image ({' '.join(IMAGE_SUFFIXES)}); remove or fill it"
                )
            self._samples += [(path, printable(name)) for path in images]
        if not self._samples:
            raise UserError(
                f"data folder {root} is neither shards (no dataset.json) nor a folder with a folder per class"
            )

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


class TilDataset(FolderDataset):
    """TCGA-TIL as on Zenodo: `[cancer/]split/til-{negative,positive}/`, all cancers of the folder together."""

    def __init__(self, root: Path, split: str, download_url: str) -> None:
        """List the images. Raises UserError without images."""
        classes = ("til-negative", "til-positive")
        folders = [path for path in sorted([root, *root.glob("*/")]) if (path / split / classes[1]).is_dir()]
        self.path, self.split, self._root = str(root), split, root
        self._samples = [
            (path, name)
            for folder in folders
            for name in classes
            for path in select_images((folder / split / name).glob("*"), folder)
        ]
        if not self._samples:
            raise UserError(
                f"{root} holds no [CANCER/]{split}/{{{','.join(classes)}}}/ with images; "
                f"get TCGA-TIL from {download_url}"
            )


class UnlabelledDataset(FolderDataset):
    """All images of a folder and its subfolders, in the order of their paths, without labels."""

    label_kinds: tuple[str, ...] = ()

    def __init__(self, root: Path) -> None:
        """List the images. Raises UserError without images."""
        self.path, self.split, self._root = str(root), "all", root
        self._samples = [(path, "") for path in _images_below(root)]
        if not self._samples:
            raise UserError(f"data folder {root} holds no image ({' '.join(IMAGE_SUFFIXES)})")

    def labels(self, kind: str) -> list[str | None]:
        """Raise UserError: the images have no labels."""
        raise UserError(f"label {kind!r} is unknown; {self.path} is a folder of images without labels")


def _subfolders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _images_below(folder: Path) -> list[Path]:
    return select_images(folder.rglob("*"), folder)

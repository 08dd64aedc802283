"""A folder with one folder of images per class, as torchvision's ImageFolder reads: `root/[split/]class/image.jpg`."""

from __future__ import annotations

import functools
from pathlib import Path

from ...data.images import IMAGE_SUFFIXES
from ...errors import UserError
from ...io.hashing import sha256, sha256_of_parts

_SPLIT_NAMES = {"train", "trn", "val", "valid", "validation", "dev", "test", "tst"}


class FolderDataset:
    """Images in the order of their paths; label kind `class` is the folder's name; see `EvalDataset`.

    Where `root` has a folder named like the split, the classes are in it. Where it has other usual split names
    but not this one, the split is refused; where it has none, the classes are in `root` and all images are used.
    """

    label_kinds: tuple[str, ...] = ("class",)

    def __init__(self, root: Path, split: str) -> None:
        folders = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        splits = [name for name in folders if name in _SPLIT_NAMES]
        if split in folders:
            root = root / split
            folders = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        elif splits:
            raise UserError(f"data {root} has no split {split!r}: there are {', '.join(splits)}")
        else:
            split = "all"
        self.path = str(root)
        self.split = split
        self._root = root
        self._samples: list[tuple[Path, str]] = []
        for name in folders:
            images = sorted(
                path for path in (root / name).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
            )
            if not images:
                raise UserError(
                    f"data folder {root / name} holds no image ({' '.join(IMAGE_SUFFIXES)}): remove or fill it"
                )
            self._samples += [(path, name) for path in images]
        if not self._samples:
            raise UserError(
                f"data folder {root} is neither shards (no dataset.json) nor a folder with a folder per class"
            )

    def __len__(self) -> int:
        return len(self._samples)

    @functools.cached_property
    def fingerprint(self) -> str:
        return sha256_of_parts(
            f"{self.key(i)}\0{label}\0{sha256(self.image(i))}\n".encode(errors="surrogateescape")
            for i, (_, label) in enumerate(self._samples)
        )

    def key(self, i: int) -> str:
        return self._samples[i][0].relative_to(self._root).as_posix()

    def image(self, i: int) -> bytes:
        path = self._samples[i][0]
        try:
            return path.read_bytes()
        except OSError as error:
            raise UserError(f"image {path} cannot be read: {error.strerror}") from error

    def captions(self) -> None:
        return None

    def labels(self, kind: str) -> list[str | None]:
        if kind != "class":
            raise UserError(
                f"label {kind!r} is unknown: {self.path} is a folder of images by class, its label is 'class'"
            )
        return [label for _, label in self._samples]


class TilDataset(FolderDataset):
    """TCGA-TIL as on zenodo: `[cancer/]split/til-{negative,positive}/`; all cancers below the folder together."""

    def __init__(self, root: Path, split: str, where: str) -> None:
        classes = ("til-negative", "til-positive")
        folders = [path for path in sorted([root, *root.glob("*/")]) if (path / split / classes[1]).is_dir()]
        self.path, self.split, self._root = str(root), split, root
        self._samples = [
            (path, name)
            for folder in folders
            for name in classes
            for path in sorted((folder / split / name).glob("*"))
            if path.suffix.lower() in IMAGE_SUFFIXES
        ]
        if not self._samples:
            raise UserError(
                f"{root} holds no [CANCER/]{split}/{{{','.join(classes)}}}/ with images; TCGA-TIL: get it from {where}"
            )


class PictureDataset(FolderDataset):
    """All images below a folder, wherever they lie, in the order of their paths, without labels."""

    label_kinds: tuple[str, ...] = ()

    def __init__(self, root: Path) -> None:
        self.path, self.split, self._root = str(root), "all", root
        found = (path for path in sorted(root.rglob("*")) if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
        self._samples = [(path, "") for path in found]
        if not self._samples:
            raise UserError(f"data folder {root} holds no image ({' '.join(IMAGE_SUFFIXES)})")

    def labels(self, kind: str) -> list[str | None]:
        raise UserError(f"label {kind!r} is unknown: {self.path} is a folder of images without labels")

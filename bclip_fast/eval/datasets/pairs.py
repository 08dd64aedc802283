"""A folder of images, each beside a text file of the same name: `scan.jpg` and `scan.txt`."""

from __future__ import annotations

import functools
from pathlib import Path

from ...data.images import IMAGE_SUFFIXES
from ...errors import UserError
from ...io.hashing import sha256, sha256_of_parts


class PairDataset:
    """Pairs in the order of their paths, all of them in split `all`; see `EvalDataset`."""

    label_kinds: tuple[str, ...] = ()
    split = "all"

    @staticmethod
    def is_one(root: Path) -> bool:
        """Whether an image of the folder itself has a text beside it."""
        return any(
            path.suffix.lower() in IMAGE_SUFFIXES and path.with_suffix(".txt").is_file() for path in root.iterdir()
        )

    def __init__(self, root: Path) -> None:
        self.path, self._root = str(root), root
        self._images = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        self._captions = []
        for path in self._images:
            file = path.with_suffix(".txt")
            try:
                caption = file.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{file}, the text of {path.name}, cannot be read: {error}") from error
            if not caption:
                raise UserError(f"{file}, the text of {path.name}, is empty")
            self._captions.append(caption)

    def __len__(self) -> int:
        return len(self._images)

    @functools.cached_property
    def fingerprint(self) -> str:
        return sha256_of_parts(
            f"{self.key(i)}\0{sha256(self.image(i))}\0{caption}\n" for i, caption in enumerate(self._captions)
        )

    def key(self, i: int) -> str:
        return self._images[i].relative_to(self._root).as_posix()

    def image(self, i: int) -> bytes:
        try:
            return self._images[i].read_bytes()
        except OSError as error:
            raise UserError(f"image {self._images[i]} cannot be read: {error.strerror}") from error

    def captions(self) -> list[str]:
        return list(self._captions)

    def labels(self, kind: str) -> list[str | None]:
        raise UserError(f"label {kind!r} is unknown: {self.path} holds images with texts and no labels")

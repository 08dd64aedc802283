"""A folder of images with a text file of the same name next to each: `scan.jpg` and `scan.txt`."""

from __future__ import annotations

import functools
from pathlib import Path

from bclip_fast.data.image_files import IMAGE_SUFFIXES
from bclip_fast.errors import UserError
from bclip_fast.io import stand_ins
from bclip_fast.io.file_names import printable
from bclip_fast.io.folders import Listing
from bclip_fast.io.hashing import sha256, sha256_of_parts

from .files import ImageListing, read_image


class PairDataset:
    """Pairs in the order of their paths. See `EvalDataset`."""

    label_kinds: tuple[str, ...] = ()

    @staticmethod
    def matches(root: Path) -> bool:
        """Return whether an image directly in the folder has a text file."""
        paths = (root / name for name in next(Listing(root).walk(root))[2])
        return any(path.suffix.lower() in IMAGE_SUFFIXES and path.with_suffix(".txt").is_file() for path in paths)

    def __init__(self, root: Path, split: str = "all") -> None:
        """Read all texts. Raises UserError if one is missing or empty."""
        self.path, self.split, self._root = str(root), split, root
        listing = ImageListing(root)
        self._images = listing.images(listing.files_below(root))
        listing.log()
        self._captions = []
        for path in self._images:
            file = path.with_suffix(".txt")
            try:
                caption = file.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{file}, the text of {path.name}, cannot be read: {error}") from error
            if caption and (reason := stand_ins.describe(caption.encode()[: stand_ins.NUM_BYTES])):
                raise UserError(f"{file}, the text of {path.name}, {reason}")
            if not caption:
                raise UserError(f"{file}, the text of {path.name}, is empty")
            self._captions.append(caption)

    def __len__(self) -> int:
        return len(self._images)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of keys, images and captions."""
        return sha256_of_parts(
            f"{self.key(i)}\0{sha256(self.image(i))}\0{caption}\n" for i, caption in enumerate(self._captions)
        )

    def key(self, i: int) -> str:
        """Return the path within the folder."""
        return printable(self._images[i].relative_to(self._root).as_posix())

    def image(self, i: int) -> bytes:
        """Return the contents of the file."""
        return read_image(self._images[i])

    def captions(self) -> list[str]:
        """Return the texts without surrounding white space."""
        return list(self._captions)

    def labels(self, kind: str) -> list[str | None]:
        """Raise UserError: the pairs have no labels."""
        raise UserError(f"label {kind!r} is unknown; {self.path} holds images with texts but without labels")

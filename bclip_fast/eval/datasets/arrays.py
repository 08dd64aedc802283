"""Images that lie in one array: PatchCamelyon's HDF5 files and MedMNIST's .npz files."""

from __future__ import annotations

import functools
import io
import itertools
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError, first_line
from ...io.hashing import blocks, sha256_of_parts

_SPLITS = {"val": "valid", "validation": "valid", "dev": "valid"}
_MEDMNIST = (
    "bloodmnist", "breastmnist", "chestmnist", "dermamnist", "octmnist", "organamnist", "organcmnist", "organsmnist",
    "pathmnist", "pneumoniamnist", "retinamnist", "tissuemnist",
)  # fmt: skip


class ArrayDataset:
    """Images (N, H, W) or (N, H, W, 3) uint8 with label kind `class`; see `EvalDataset`.

    files: what the fingerprint covers. labels: N values, several of a sample joined by `|`, "" where none is given.
    """

    label_kinds: tuple[str, ...] = ("class",)

    def __init__(self, path: str, split: str, files: Sequence[Path], images: Any, labels: list[str]) -> None:
        self.path, self.split = path, split
        self._files, self._images, self._labels = files, images, labels

    def __len__(self) -> int:
        return len(self._labels)

    @functools.cached_property
    def fingerprint(self) -> str:
        return sha256_of_parts(itertools.chain([self.split], *map(blocks, self._files)))

    def key(self, i: int) -> str:
        return f"{self.split}/{i}"

    def image(self, i: int) -> bytes:
        return as_bmp(self._images[i])

    def captions(self) -> None:
        return None

    def labels(self, kind: str) -> list[str | None]:
        if kind != "class":
            raise UserError(f"label {kind!r} is unknown: {self.path} has the label 'class' alone")
        return list(self._labels)


def as_bmp(pixels: np.ndarray) -> bytes:
    """An uncompressed picture of (H, W) or (H, W, 3) uint8: it costs a copy and loses nothing."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "BMP")
    return buffer.getvalue()


def open_pcam(place: Path, split: str, where: str) -> ArrayDataset:
    """PatchCamelyon as published: camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5 of a folder.

    Raises:
        UserError: a file that is missing, packed, or without what it should hold.
    """
    import h5py

    name = _SPLITS.get(split, split)
    paths = [place / f"camelyonpatch_level_2_split_{name}_{part}.h5" for part in "xy"]
    arrays = []
    for path, key, shape in zip(paths, "xy", ((96, 96, 3), (1, 1, 1)), strict=True):
        wanted = f"needs an HDF5 file with {key!r} (N, {', '.join(map(str, shape))}) uint8; get it from {where}"
        if not path.is_file():
            packed = path.with_name(path.name + ".gz").is_file()
            raise UserError(f"{path} is {'still packed: gunzip it' if packed else 'not there'}; PatchCamelyon {wanted}")
        try:
            file = h5py.File(path, "r")
            array = file[key]
        except (OSError, KeyError) as error:
            raise UserError(f"{path} cannot be read ({first_line(error)}); PatchCamelyon {wanted}") from error
        if array.shape[1:] != shape or array.dtype != np.uint8 or not len(array):
            raise UserError(f"{path} holds {key!r} of shape {array.shape}, {array.dtype}; PatchCamelyon {wanted}")
        if key == "y":
            array = array[:]
            file.close()
        arrays.append(array)
    if len(arrays[0]) != len(arrays[1]):
        raise UserError(
            f"{paths[0]} has {len(arrays[0])} images, {paths[1].name} {len(arrays[1])} labels; get both anew"
        )
    labels = [str(int(value)) for value in arrays[1].ravel()]
    return ArrayDataset(str(place), name, paths, arrays[0], labels)


def open_medmnist(place: Path, split: str, where: str, name: str = "") -> ArrayDataset:
    """A 2D set of MedMNIST: NAME.npz (or NAME_64.npz, _128, _224), or a folder that holds it.

    Several labels, as ChestMNIST's, are joined by `|`. Raises UserError as `open_pcam` does.
    """
    if place.is_dir():
        # A task is called after its set, as pathmnist and chestmnist_probe are, or in its user's way.
        names = [each for each in _MEDMNIST if name.startswith(each)] or list(_MEDMNIST)
        found = [path for each in names for path in sorted(place.glob(f"{each}*.npz"))]
        if len(found) != 1:
            wanted = f"{names[0] if len(names) == 1 else 'MedMNIST'}*.npz"
            raise UserError(f"{place} holds {len(found) or 'no'} {wanted}: give the folder of one: {where}")
        place = found[0]
    key = {"valid": "val"}.get(_SPLITS.get(split, split), split)
    wanted = f"MedMNIST needs {key}_images (N, S, S[, 3]) uint8 and {key}_labels (N, L); get it from {where}"
    try:
        with np.load(place, allow_pickle=False) as arrays:
            images, labels = arrays[f"{key}_images"], arrays[f"{key}_labels"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{place} cannot be read ({first_line(error)}); {wanted}") from error
    shape = images.shape[1:]
    if (
        images.dtype != np.uint8 or len(shape) not in (2, 3) or shape[0] != shape[1] or shape[2:] not in ((), (3,))
        or labels.ndim != 2 or len(labels) != len(images) or not len(labels)
    ):  # fmt: skip
        raise UserError(f"{place} holds {key} images {images.shape} {images.dtype}, labels {labels.shape}; {wanted}")
    if labels.shape[1] > 1:
        values = ["|".join(str(i) for i in np.flatnonzero(row)) for row in labels]
    else:
        values = [str(int(value)) for value in labels[:, 0]]
    return ArrayDataset(str(place), key, [place], images, values)

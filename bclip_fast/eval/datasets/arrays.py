"""Images in one array: PatchCamelyon's HDF5 files and MedMNIST's .npz files."""

from __future__ import annotations

import functools
import io
import itertools
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bclip_fast.data.splits import resolve
from bclip_fast.errors import UserError, first_line
from bclip_fast.io import stand_ins
from bclip_fast.io.folders import Listing
from bclip_fast.io.hashing import blocks, sha256_of_parts

from .files import MissingData

_PCAM_SPLITS = ("train", "valid", "test")
_MEDMNIST_SPLITS = ("train", "val", "test")
_MEDMNIST = (
    "bloodmnist", "breastmnist", "chestmnist", "dermamnist", "octmnist", "organamnist", "organcmnist", "organsmnist",
    "pathmnist", "pneumoniamnist", "retinamnist", "tissuemnist",
)  # fmt: skip


class ArrayDataset:
    """Images (N, H, W) or (N, H, W, 3) uint8 with label kind `class`. See `EvalDataset`."""

    label_kinds: tuple[str, ...] = ("class",)

    def __init__(self, path: str, split: str, files: Sequence[Path], images: Any, labels: list[str]) -> None:
        """Wrap the images.

        Args:
            files: files that the fingerprint covers.
            labels: N values. Multi-label samples join their classes with `|`. "" means no class.
        """
        self.path, self.split = path, split
        self._files, self._images, self._labels = files, images, labels

    def __len__(self) -> int:
        return len(self._labels)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the split's name and of the files."""
        return sha256_of_parts(itertools.chain([self.split], *map(blocks, self._files)))

    def key(self, i: int) -> str:
        """Return SPLIT/NUMBER."""
        return f"{self.split}/{i}"

    def image(self, i: int) -> bytes:
        """Return the image as BMP."""
        return as_bmp(self._images[i])

    def captions(self) -> None:
        """Return None: the arrays have no captions."""
        return None

    def labels(self, kind: str) -> list[str | None]:
        """Return the labels of kind `class`."""
        if kind != "class":
            raise UserError(f"label {kind!r} is unknown; the only label of {self.path} is 'class'")
        return list(self._labels)


def as_bmp(pixels: np.ndarray) -> bytes:
    """Encode (H, W) or (H, W, 3) uint8 without compression. It costs one copy and is lossless."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "BMP")
    return buffer.getvalue()


def open_pcam(folder: Path, split: str, download_url: str) -> ArrayDataset:
    """Open PatchCamelyon as published: camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5.

    Raises:
        UserError: a file that is missing, compressed, or without the expected array.
    """
    import h5py

    name = resolve(split, _PCAM_SPLITS, "PatchCamelyon")
    paths = [folder / f"camelyonpatch_level_2_split_{name}_{part}.h5" for part in "xy"]
    arrays: list[Any] = []
    for path, key, shape in zip(paths, "xy", ((96, 96, 3), (1, 1, 1)), strict=True):
        needs = f"needs an HDF5 file with {key!r} (N, {', '.join(map(str, shape))}) uint8; get it from {download_url}"
        if not path.is_file():
            if path.with_name(path.name + ".gz").is_file():
                raise UserError(f"{path} is still compressed: gunzip it; PatchCamelyon {needs}")
            if arrays:
                raise UserError(f"{path} is missing; PatchCamelyon {needs}")
            raise MissingData(f"{path} is missing; PatchCamelyon {needs}")
        try:
            file = h5py.File(path, "r")
            array = file[key]
        except (OSError, KeyError) as error:
            stand_ins.refuse(path)
            raise UserError(f"{path} cannot be read ({first_line(error)}); PatchCamelyon {needs}") from error
        if array.shape[1:] != shape or array.dtype != np.uint8 or not len(array):
            raise UserError(f"{path} holds {key!r} of shape {array.shape}, {array.dtype}; PatchCamelyon {needs}")
        if key == "y":
            array = array[:]
            file.close()
        arrays.append(array)
    if len(arrays[0]) != len(arrays[1]):
        raise UserError(
            f"{paths[0]} has {len(arrays[0])} images but {paths[1].name} has {len(arrays[1])} labels; "
            f"get both again from {download_url}"
        )
    labels = [str(int(value)) for value in arrays[1].ravel()]
    return ArrayDataset(str(folder), name, paths, arrays[0], labels)


def open_medmnist(path: Path, split: str, download_url: str, name: str = "", file: str = "") -> ArrayDataset:
    """Open a 2D set of MedMNIST: NAME.npz (or NAME_64.npz, _128, _224), or a folder with one such file.

    Multi-label samples (ChestMNIST) join their labels with `|`.

    Args:
        name: name of the task, which starts with the name of the set. Any other name allows every set.
        file: name of the file in a folder, such as breastmnist_224.npz. Its images must have the size in its name.

    Raises:
        MissingData: the folder does not hold `file`.
        UserError: no file or several files in the folder, or a file without the expected arrays.
    """
    if path.is_dir() and file:
        path = path / file
        if not path.is_file():
            raise MissingData(f"{path} is missing; get it from {download_url}")
    elif path.is_dir():
        names = [set_name for set_name in _MEDMNIST if name.startswith(set_name)] or list(_MEDMNIST)
        npz = [file for file in Listing(path).files(path) if file.suffix == ".npz"]
        files = [file for set_name in names for file in npz if file.name.startswith(set_name)]
        if len(files) != 1:
            pattern = f"{names[0] if len(names) == 1 else 'MedMNIST'}*.npz"
            raise UserError(
                f"{path} holds {len(files) or 'no'} {pattern}; pass a folder with one such file from {download_url}"
            )
        path = files[0]
    key = resolve(split, _MEDMNIST_SPLITS, "MedMNIST")
    needs = f"MedMNIST needs {key}_images (N, S, S[, 3]) uint8 and {key}_labels (N, L); get it from {download_url}"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = arrays[f"{key}_images"], arrays[f"{key}_labels"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        stand_ins.refuse(path)
        raise UserError(f"{path} cannot be read ({first_line(error)}); {needs}") from error
    shape = images.shape[1:]
    if (
        images.dtype != np.uint8 or len(shape) not in (2, 3) or shape[0] != shape[1] or shape[2:] not in ((), (3,))
        or labels.ndim != 2 or len(labels) != len(images) or not len(labels)
    ):  # fmt: skip
        raise UserError(f"{path} holds {key} images {images.shape} {images.dtype}, labels {labels.shape}; {needs}")
    size = file.removesuffix(".npz").rpartition("_")[2]
    if size.isdigit() and shape[0] != int(size):
        raise UserError(f"{path} holds images of {shape[0]} pixels; the task needs {file} with {size} pixels")
    if labels.shape[1] > 1:
        values = ["|".join(str(i) for i in np.flatnonzero(row)) for row in labels]
    else:
        values = [str(int(value)) for value in labels[:, 0]]
    return ArrayDataset(str(path), key, [path], images, values)

"""Slices of the MNI152 template (T1, grey matter, white matter) in nilearn.

The template is ICBM152 2009a: 1 mm voxels, RAS axes, origin at the anterior commissure. This is the symmetric variant,
whose hemispheres are mirror images. Sagittal slices therefore come from one hemisphere, and captions never name a side.

The held-out slices are contiguous blocks, the same in all three maps, at least `GAP_MM` from any training slice. A
held-out slice still crosses training slices of the other two planes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .captions import Facts

MAPS = {
    "T1": "datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz",
    "GM": "datasets/data/mni_icbm152_gm_tal_nlin_sym_09a_converted.nii.gz",
    "WM": "datasets/data/mni_icbm152_wm_tal_nlin_sym_09a_converted.nii.gz",
}
# Least distance between a training slice and a held-out slice.
GAP_MM = 5
# For each plane: voxel axis, first and last mm with brain, held-out blocks in mm (inclusive), and their step.
PLANES: dict[str, tuple[int, int, int, tuple[tuple[int, int], ...], int]] = {
    "axial": (2, -58, 74, ((-40, -32), (-4, 4), (32, 40)), 4),
    "coronal": (1, -98, 66, ((-74, -66), (-28, -20), (20, 28)), 4),
    "sagittal": (0, 0, 64, ((14, 22), (44, 52)), 2),
}
TRAIN_PER_MAP_AND_PLANE = 160
# Centre of the brain in the template.
_CENTRE_MM = (0.0, -17.0, 8.0)
# Side of the square crop. It contains the width and length of the head.
_SIDE_MM = 190.0

_LANDMARKS: dict[str, tuple[tuple[int, int, str], ...]] = {
    # Ranges of MNI millimetres in which every slice shows the structure.
    "axial": (
        (-45, -30, "at the level of the cerebellum"),
        (-16, -9, "at the level of the midbrain"),
        (1, 12, "at the level of the basal ganglia and thalamus"),
        (17, 26, "at the level of the lateral ventricles"),
        (33, 46, "at the level of the centrum semiovale"),
        (62, 74, "near the vertex"),
    ),
    "coronal": (
        (-98, -86, "through the occipital poles"),
        (-74, -56, "through the parietal lobes and the cerebellum"),
        (-24, -10, "through the thalamus"),
        (0, 12, "through the putamen and caudate nucleus"),
        (25, 48, "through the frontal lobes"),
        (56, 66, "through the frontal poles"),
    ),
    "sagittal": (
        (0, 3, "in the midline, through the corpus callosum"),
        (36, 44, "through the insula"),
        (50, 64, "through the lateral temporal lobe"),
    ),
}
_DIRECTIONS = {
    "axial": ("above", "below"),
    "coronal": ("anterior to", "posterior to"),
}


def split_positions(plane: str) -> tuple[list[int], list[int]]:
    """Return the positions of the training slices and of the held-out slices of a plane, in mm."""
    _, first, last, blocks, step = PLANES[plane]
    val = [mm for low, high in blocks for mm in range(low, high + 1, step)]
    train = [
        mm for mm in range(first, last + 1) if all(mm <= low - GAP_MM or mm >= high + GAP_MM for low, high in blocks)
    ]
    return train, val


def count() -> int:
    """Return the number of samples of all maps."""
    num_held_out = sum(len(split_positions(plane)[1]) for plane in PLANES)
    return len(MAPS) * (num_held_out + len(PLANES) * TRAIN_PER_MAP_AND_PLANE)


def slice_facts(name: str, plane: str, position_mm: int) -> Facts:
    """Return the facts about a slice of the map `name`."""
    axis_letter = "xyz"[PLANES[plane][0]]
    signed = f"{position_mm:+d}" if position_mm else "0"
    details = [f"MNI {axis_letter} = {signed} mm"]
    if plane == "sagittal":
        if position_mm:
            details.append(f"{position_mm} mm lateral to the midline")
    elif position_mm:
        direction = _DIRECTIONS[plane][position_mm < 0]
        details.append(f"{abs(position_mm)} mm {direction} the anterior commissure")
    else:
        details.append("at the anterior commissure")
    details += [words for low, high, words in _LANDMARKS[plane] if low <= position_mm <= high]
    return Facts("MR", body_part="head", plane=plane, sequence=name, details=tuple(details))


class Volume:
    """One map of the template. `cut` returns slices in radiological orientation."""

    def __init__(self, path: Path) -> None:
        import nibabel

        image = nibabel.as_closest_canonical(nibabel.load(path))
        self.affine = np.asarray(image.affine)
        voxels = np.asanyarray(image.dataobj).astype(np.float32)
        self.voxels = (voxels * (255.0 / voxels.max())).round().astype(np.uint8)
        # In a rotated grid, slices would need interpolation.
        if np.any(np.abs(self.affine[:3, :3] - np.diag(np.diag(self.affine)[:3])) > 1e-6):
            raise ValueError(f"{path.name}: the voxel grid is not aligned with the body's axes")

    def index(self, axis: int, position_mm: float) -> int:
        """Return the voxel index of a position."""
        return round((position_mm - self.affine[axis, 3]) / self.affine[axis, axis])

    def cut(self, plane: str, position_mm: float, side_mm: float, shift_mm: tuple[float, float]) -> Image.Image:
        """Return a square of `side_mm` around the brain, moved by `shift_mm`. Pixels outside the grid are black.

        Superior (in axial slices: anterior) is up. The face in sagittal slices is on the left.
        """
        axis = PLANES[plane][0]
        across, up = [other for other in range(3) if other != axis]
        pixels = np.moveaxis(self.voxels, axis, 0)[self.index(axis, position_mm)].T[::-1]
        centre_across = self.index(across, _CENTRE_MM[across]) + 0.5
        centre_down = pixels.shape[0] - (self.index(up, _CENTRE_MM[up]) + 0.5)
        if plane == "sagittal":
            pixels = pixels[:, ::-1]
            centre_across = pixels.shape[1] - centre_across
        half_across = side_mm / (2 * self.affine[across, across])
        half_down = side_mm / (2 * self.affine[up, up])
        left = centre_across + shift_mm[0] - half_across
        top = centre_down + shift_mm[1] - half_down
        box = [left, top, left + 2 * half_across, top + 2 * half_down]
        return Image.fromarray(pixels.copy()).crop(tuple(round(edge) for edge in box))


def slices(name: str, path: Path, seed: int) -> Iterator[tuple[str, Image.Image, Facts, dict[str, Any]]]:
    """Yield (split, grey square image, facts, metadata) of every sample of one map.

    Training slices occur several times, with random sides (190 +- 10 mm) and shifts (up to 6 mm).
    """
    volume = Volume(path)
    for plane, (axis, *_) in PLANES.items():
        random = np.random.default_rng([seed, axis, list(MAPS).index(name)])
        train, val = split_positions(plane)
        positions = [(mm, "val") for mm in val]
        while len(positions) < len(val) + TRAIN_PER_MAP_AND_PLANE:
            positions += [(train[i], "train") for i in random.permutation(len(train))]
        for mm, split in positions[: len(val) + TRAIN_PER_MAP_AND_PLANE]:
            side, shift = _SIDE_MM, (0.0, 0.0)
            if split == "train":
                side += float(random.uniform(-10, 10))
                shift = (float(random.uniform(-6, 6)), float(random.uniform(-6, 6)))
            meta = {
                "position_mm": mm,
                "axis": axis,
                "slice_index": volume.index(axis, mm),
                "volume": name,
            }
            yield split, volume.cut(plane, mm, side, shift), slice_facts(name, plane, mm), meta

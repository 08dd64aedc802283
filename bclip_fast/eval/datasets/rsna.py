"""RSNA pneumonia: stage_2_train_labels.csv and a DICOM file a patient, split as GLoRIA splits it."""

from __future__ import annotations

import csv
import functools
from pathlib import Path

import numpy as np

from ...errors import UserError, first_line
from ...io.hashing import sha256, sha256_of_parts
from .arrays import as_bmp

LABELS = "stage_2_train_labels.csv"
IMAGES = "stage_2_train_images"
NUM_PATIENTS = 26684


class RsnaDataset:
    """One split; label kind `class`: 1 where the patient has a box, 0 elsewhere; see `EvalDataset`.

    The split is derived from the public CSV alone: patients in the order of their identifiers, then scikit-learn's
    `train_test_split` twice with random_state 0, 30 % and half of that (GLoRIA's preprocess_datasets.py). On the whole
    file it gives 18,678, 4,003 and 4,003: the paper's train and dev.
    """

    label_kinds: tuple[str, ...] = ("class",)

    def __init__(self, root: Path, split: str, where: str) -> None:
        file, self._images = root / LABELS, root / IMAGES
        wanted = f"RSNA pneumonia needs {LABELS} (columns patientId, Target) beside {IMAGES}/; get it from {where}"
        try:
            with file.open(newline="", encoding="utf-8-sig") as lines:
                rows = [(row["patientId"], row["Target"]) for row in csv.DictReader(lines, strict=True)]
        except (OSError, KeyError, csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{file} cannot be read ({first_line(error)}); {wanted}") from error
        if bad := next((target for _, target in rows if target not in ("0", "1")), None):
            raise UserError(f"{file} has the Target {bad!r}, must be 0 or 1; {wanted}")
        if not self._images.is_dir():
            raise UserError(f"{self._images} is not there; {wanted}")
        positive = {patient for patient, target in rows if target == "1"}
        splits = split_patients(sorted({patient for patient, _ in rows}))
        split = {"valid": "val", "validation": "val", "dev": "val"}.get(split, split)
        if split not in splits:
            raise UserError(f"{file} has no split {split!r}: there are {', '.join(splits)}")
        self.path, self.split = str(root), split
        self._samples = [(patient, str(int(patient in positive))) for patient in splits[split]]

    def __len__(self) -> int:
        return len(self._samples)

    @functools.cached_property
    def fingerprint(self) -> str:
        return sha256_of_parts(
            f"{patient}\0{label}\0{sha256(self._read(patient))}\n" for patient, label in self._samples
        )

    def key(self, i: int) -> str:
        return self._samples[i][0]

    def _read(self, patient: str) -> bytes:
        path = self._images / f"{patient}.dcm"
        try:
            return path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}, a patient of {LABELS}, cannot be read: {error.strerror}") from error

    def image(self, i: int) -> bytes:
        return dicom_as_bmp(self._read(self.key(i)), self._images / f"{self.key(i)}.dcm")

    def captions(self) -> None:
        return None

    def labels(self, kind: str) -> list[str | None]:
        if kind != "class":
            raise UserError(f"label {kind!r} is unknown: {self.path} has the label 'class' alone")
        return [label for _, label in self._samples]


def split_patients(patients: list[str]) -> dict[str, list[str]]:
    """train 70 %, val 15 %, test 15 % of the sorted identifiers."""
    from sklearn.model_selection import train_test_split

    if len(patients) < 4:
        raise UserError(
            f"{LABELS} names {len(patients)} patients, too few to split; the public file has {NUM_PATIENTS}"
        )
    train, rest = train_test_split(patients, test_size=0.3, random_state=0)
    test, val = train_test_split(rest, test_size=0.5, random_state=0)
    return {"train": train, "val": val, "test": test}


def dicom_as_bmp(data: bytes, path: Path) -> bytes:
    """A grey DICOM picture in 8 bits: 8-bit pixels as they are, deeper ones by window or else by their own range."""
    import io

    import pydicom
    from pydicom.pixels import apply_modality_lut, apply_voi_lut, pixel_array

    try:
        header = pydicom.dcmread(io.BytesIO(data))
        pixels = pixel_array(header)
        if pixels.ndim == 2 and pixels.dtype != np.uint8:
            values = np.asarray(apply_voi_lut(apply_modality_lut(pixels, header), header), dtype=np.float64)
            low, high = values.min(), values.max()
            pixels = ((values - low) / max(high - low, 1e-9) * 255).round().astype(np.uint8)
        if header.PhotometricInterpretation == "MONOCHROME1":
            pixels = 255 - pixels
        return as_bmp(pixels)
    except Exception as error:  # pydicom raises what its decoders raise
        raise UserError(f"{path} cannot be decoded as DICOM: {' '.join(str(error).split())}") from error

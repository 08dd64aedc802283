"""RSNA pneumonia: stage_2_train_labels.csv and one DICOM file per patient, with GLoRIA's splits."""

from __future__ import annotations

import functools
from pathlib import Path

from bclip_fast.data.splits import resolve
from bclip_fast.errors import UserError
from bclip_fast.io.hashing import sha256, sha256_of_parts
from bclip_fast.io.tables import read_table

from .files import read_image

LABELS = "stage_2_train_labels.csv"
IMAGES = "stage_2_train_images"
NUM_PATIENTS = 26684


class RsnaDataset:
    """One split. The only label kind, `class`, is 1 for patients with a bounding box and 0 for the rest.

    The public CSV file determines the splits. scikit-learn's `train_test_split` (random_state 0) sets aside 30 % of
    the sorted patients, then halves that part (GLoRIA's preprocess_datasets.py). The complete file gives 18,678, 4,003
    and 4,003 patients. The first two equal the paper's train and dev.
    """

    label_kinds: tuple[str, ...] = ("class",)

    def __init__(self, root: Path, split: str, download_url: str) -> None:
        """Read the labels. Raises UserError for missing files, wrong columns or an unknown split."""
        file, self._images = root / LABELS, root / IMAGES
        needs = (
            f"RSNA pneumonia needs {LABELS} (columns patientId, Target) next to {IMAGES}/; get it from {download_url}"
        )
        try:
            table = read_table(file, (("patientId",), ("Target",)), hint="patientId,x,y,width,height,Target")
        except UserError as error:
            raise UserError(f"{error}; {needs}") from error
        rows = [(row.line, row.cells["patientId"], row.cells["Target"]) for row in table.rows]
        for line, patient, target in rows:
            if target not in ("0", "1") or not patient:
                raise UserError(f"{file}, line {line}, has Target {target!r}, but it must be 0 or 1; {needs}")
        if not self._images.is_dir():
            raise UserError(f"{self._images} is missing; {needs}")
        positive = {patient for _, patient, target in rows if target == "1"}
        if both := sorted(positive & {patient for _, patient, target in rows if target == "0"}):
            raise UserError(f"{file} has Target 0 and Target 1 for patient {both[0]}; {needs}")
        splits = split_patients(sorted({patient for _, patient, _ in rows}))
        split = resolve(split, list(splits), str(file))
        self.path, self.split = str(root), split
        self._samples = [(patient, str(int(patient in positive))) for patient in splits[split]]

    def __len__(self) -> int:
        return len(self._samples)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of patients, labels and DICOM files."""
        return sha256_of_parts(
            f"{patient}\0{label}\0{sha256(self._read(patient))}\n" for patient, label in self._samples
        )

    def key(self, i: int) -> str:
        """Return the patient's identifier."""
        return self._samples[i][0]

    def _read(self, patient: str) -> bytes:
        return read_image(self._images / f"{patient}.dcm", f", a patient of {LABELS},")

    def image(self, i: int) -> bytes:
        """Return the DICOM file."""
        return self._read(self.key(i))

    def captions(self) -> None:
        """Return None: the patients have no captions."""
        return None

    def labels(self, kind: str) -> list[str | None]:
        """Return the labels of kind `class`."""
        if kind != "class":
            raise UserError(f"label {kind!r} is unknown; the only label of {self.path} is 'class'")
        return [label for _, label in self._samples]


def split_patients(patients: list[str]) -> dict[str, list[str]]:
    """Split sorted identifiers: train 70 %, val 15 %, test 15 %. Raises UserError for fewer than 4 patients."""
    from sklearn.model_selection import train_test_split

    if len(patients) < 4:
        raise UserError(
            f"{LABELS} names {len(patients)} patients, too few to split; the public file has {NUM_PATIENTS}"
        )
    train, rest = train_test_split(patients, test_size=0.3, random_state=0)
    test, val = train_test_split(rest, test_size=0.5, random_state=0)
    return {"train": train, "val": val, "test": test}

"""Images in files, each with its labels: HAM10000, DeepDRiD, Dresden Surgical Anatomy, LC25000, RSNA pneumonia."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bclip_fast.data.image_files import MAX_PIXELS, ImageError, dicom
from bclip_fast.errors import UserError
from bclip_fast.io.folders import Listing, shown
from bclip_fast.io.hashing import sha256, sha256_of_parts
from bclip_fast.io.json_files import read_object
from bclip_fast.io.tables import Row, read_table

from .arrays import as_bmp
from .files import ImageListing, MissingData, read_image
from .spreadsheets import TABLE_SUFFIXES, read_any_table

log = logging.getLogger(__name__)

ISIC_CLASSES = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
_ISIC_LABELS = "ISIC2018_Task3_Test_GroundTruth.csv"
_ISIC_IMAGES = "ISIC2018_Task3_Test_Input"
_DEEPDRID_LABELS = "Challenge1_labels"
_RSNA_LABELS = "stage_2_train_labels.csv"
_PERCENTILES = 0.5, 99.5
_MAX_COCO_BYTES = 1 << 30


@dataclass(frozen=True)
class LabelledImage:
    """A sample. label: its class, or its classes joined by `|`. group: the patient, or ""."""

    key: str
    path: Path
    label: str
    group: str = ""


class LabelledImages:
    """Images with label kind `class`, in the order of the labels' file. See `EvalDataset`."""

    label_kinds: tuple[str, ...] = ("class",)

    def __init__(
        self,
        root: Path,
        split: str,
        samples: Sequence[LabelledImage],
        *,
        as_bytes: Callable[[Path], bytes] | None = None,
    ) -> None:
        """as_bytes: returns the encoded image of a file. None: the file's content."""
        self.path, self.split = str(root), split
        self._samples, self._as_bytes = list(samples), as_bytes or read_image

    def __len__(self) -> int:
        return len(self._samples)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of keys, labels and images."""
        return sha256_of_parts(
            f"{sample.key}\0{sample.label}\0{sha256(self.image(i))}\n".encode(errors="surrogateescape")
            for i, sample in enumerate(self._samples)
        )

    @property
    def groups(self) -> list[str]:
        """The patients of the samples, or "" where they are unknown."""
        return [sample.group for sample in self._samples]

    def key(self, i: int) -> str:
        """Return the sample's name in the labels' file."""
        return self._samples[i].key

    def image(self, i: int) -> bytes:
        """Return the encoded image."""
        return self._as_bytes(self._samples[i].path)

    def captions(self) -> None:
        """Return None: the images have no captions."""
        return None

    def labels(self, kind: str) -> list[str | None]:
        """Return the labels of kind `class`."""
        if kind != "class":
            raise UserError(f"label {kind!r} is unknown; the only label of {self.path} is 'class'")
        return [sample.label for sample in self._samples]


def open_ham10000(root: Path, split: str, download_url: str) -> LabelledImages:
    """Open the test split of ISIC 2018, task 3: one-hot labels in a CSV file, beside a folder of images.

    Raises:
        MissingData: no labels.
        UserError: a row that is not one-hot, or an image that is missing.
    """
    hint = f"image,{','.join(ISIC_CLASSES)}"
    file = _only(
        [root / _ISIC_LABELS, *sorted(root.glob(f"*/{_ISIC_LABELS}"))], f"{_ISIC_LABELS} ({hint})", download_url
    )
    images = _files_by_stem(_folder_of(root, _ISIC_IMAGES, file, download_url))
    samples = []
    for row in read_table(file, (("image",), *((name,) for name in ISIC_CLASSES)), hint=hint).rows:
        try:
            values = [float(row.cells[name]) for name in ISIC_CLASSES]
        except ValueError:
            values = []
        if sorted(values) != [0.0] * (len(ISIC_CLASSES) - 1) + [1.0]:
            raise UserError(f"{file}, line {row.line}: one of {', '.join(ISIC_CLASSES)} must be 1, and the others 0")
        key = row.cells["image"]
        samples.append(
            LabelledImage(key, _image_of(images, Path(key).stem, file, row), ISIC_CLASSES[values.index(1.0)])
        )
    return LabelledImages(root, split, _not_empty(samples, file))


def open_deepdrid(root: Path, split: str, download_url: str) -> LabelledImages:
    """Open DeepDRiD: a CSV or XLSX file with image_id (or image) and DR_Levels (or level), 0 to 4.

    The image of 347_l1 is 347/347_l1.jpg, or any file of that name below the folder. Rows without a level are left
    out.

    Raises:
        MissingData: no table.
        UserError: several tables, a level outside 0 to 4, or an image that is missing.
    """
    hint = "image_id,DR_Levels"
    found = Listing(root).files_below(root)
    tables = [path for path in found if path.stem == _DEEPDRID_LABELS and path.suffix.lower() in TABLE_SUFFIXES]
    tables = tables or [path for path in sorted(root.iterdir()) if path.suffix.lower() in TABLE_SUFFIXES]
    file = _only(tables, f"{_DEEPDRID_LABELS}.xlsx or a .csv ({hint})", download_url)
    images = _files_by_stem(root)
    table = read_any_table(file, (("image_id", "image"), ("DR_Levels", "level")), hint=hint)
    key_column = "image_id" if "image_id" in table.columns else "image"
    level_column = "DR_Levels" if "DR_Levels" in table.columns else "level"
    samples, num_unlabelled = [], 0
    for row in table.rows:
        key, level = row.cells[key_column], row.cells[level_column]
        if not key or not level:
            num_unlabelled += 1
            continue
        value = level.removesuffix(".0")
        if value not in ("0", "1", "2", "3", "4"):
            raise UserError(f"{file}, line {row.line}: {level_column} is {level!r}, but must be 0, 1, 2, 3 or 4")
        stem = Path(key).stem
        usual = file.parent / "Images" / stem.partition("_")[0] / f"{stem}.jpg"
        path = usual if usual.is_file() else _image_of(images, stem, file, row)
        samples.append(LabelledImage(key, path, value))
    if num_unlabelled:
        log.warning("%s: left out %d rows without an image or a level", file, num_unlabelled)
    return LabelledImages(root, split, _not_empty(samples, file))


def open_dad(root: Path, split: str, download_url: str, names: Sequence[str]) -> LabelledImages:
    """Open Dresden Surgical Anatomy: annotations as in COCO. An image has the labels of its category_ids 1 to 10.

    Args:
        names: names of the categories 1, 2, ... A file that gives one of them another number is refused.

    Raises:
        MissingData: no .json file.
        UserError: several files, an entry without its keys, or an image outside the folder or missing.
    """
    files = [path for folder in (root, root / "annotations") for path in sorted(folder.glob("*.json"))]
    file = _only(files, "one .json file with COCO annotations (images, annotations)", download_url)
    content = read_object(file, _MAX_COCO_BYTES)
    try:
        numbers = {str(row["name"]).replace("_", " ").lower(): row["id"] for row in content.get("categories", [])}
        present: dict[int, set[int]] = {}
        for row in content["annotations"]:
            present.setdefault(int(row["image_id"]), set()).add(int(row["category_id"]))
        rows = [(int(row["id"]), str(row["file_name"])) for row in content["images"]]
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{file} is not a file of COCO annotations ({error!r}); it needs images (id, file_name) and annotations "
            "(image_id, category_id)"
        ) from error
    for number, name in enumerate(names, 1):
        if numbers.get(name, number) != number:
            raise UserError(f"{file} numbers the category {name!r} {numbers[name]}, but the benchmark needs {number}")
    folders = [folder for folder in (root / "images", root / "test", file.parent, root) if folder.is_dir()]
    samples = []
    for image_id, name in rows:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{file} names the image {name!r}, which is outside its folder; remove it")
        path = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if path is None:
            raise UserError(f"{file} names the image {name!r}, which is missing below {root}")
        labels = sorted(present.get(image_id, set()) & set(range(1, len(names) + 1)))
        samples.append(LabelledImage(str(image_id), path, "|".join(map(str, labels))))
    return LabelledImages(root, split, _not_empty(samples, file))


def open_lc25000(root: Path, split: str, download_url: str, names: Sequence[str]) -> LabelledImages:
    """Open the folders `names` of LC25000, in `Test Set` if there is one.

    Raises:
        MissingData: none of the folders.
        UserError: one of the folders is missing or empty.
    """
    folder = next((path for path in (root / "Test Set", root) if any((path / name).is_dir() for name in names)), None)
    if folder is None:
        raise MissingData(f"{root} holds no folders {', '.join(names)}; get LC25000 from {download_url}")
    listing = ImageListing(folder)
    samples = []
    for name in names:
        images = listing.images(listing.files_below(folder / name)) if (folder / name).is_dir() else []
        if not images:
            raise UserError(f"{folder / name} is missing or holds no image; LC25000 needs {', '.join(names)}")
        samples += [LabelledImage(path.relative_to(folder).as_posix(), path, name) for path in images]
    listing.log()
    return LabelledImages(root, split, samples)


def open_rsna(root: Path, split: str, download_url: str) -> LabelledImages:
    """Open RSNA pneumonia as medpmc-clip-eval does: all patients with an image, and the first row of each.

    An image is PATIENT.dcm, .png or .jpg in stage_2_train_images/, images/ or the folder itself. The pixels of a DICOM
    file are windowed to their percentiles 0.5 and 99.5.

    Raises:
        MissingData: no labels.
        UserError: a Target other than 0 and 1, or no image of any patient.
    """
    file = root / _RSNA_LABELS
    if not file.is_file():
        raise MissingData(f"{file} is missing; get RSNA pneumonia from {download_url}")
    places = [path for name in ("stage_2_train_images", "images", ".") if (path := root / name).is_dir()]
    present = {path.name: path for place in reversed(places) for path in place.iterdir()}
    first: dict[str, str] = {}
    for row in read_table(file, (("patientId",), ("Target",)), hint="patientId,x,y,width,height,Target").rows:
        patient, target = row.cells["patientId"], row.cells["Target"]
        if target not in ("0", "1") or not patient:
            raise UserError(f"{file}, line {row.line}: Target is {target!r}, but must be 0 or 1")
        first.setdefault(patient, target)
    samples, missing = [], []
    for patient, target in first.items():
        names = (f"{patient}{suffix}" for suffix in (".dcm", ".png", ".jpg", ".jpeg"))
        image = next((present[name] for name in names if name in present), None)
        if image is not None:
            samples.append(LabelledImage(patient, image, target, patient))
        else:
            missing.append(patient)
    if missing and samples:
        log.warning("%s: left out %d patients without an image: %s", file, len(missing), shown(missing))
    if not samples:
        raise UserError(f"{root} holds no image of the {len(first)} patients of {file.name}: PATIENT.dcm, .png or .jpg")
    return LabelledImages(root, split, samples, as_bytes=_windowed)


def _windowed(path: Path) -> bytes:
    content = read_image(path)
    if not dicom.is_dicom(content):
        return content
    try:
        header = dicom.read_header(content)
        if header.width * header.height > MAX_PIXELS:
            raise ImageError(f"DICOM of {header.width} x {header.height} pixels, more than {MAX_PIXELS}")
        return as_bmp(dicom.by_percentiles(header, *_PERCENTILES))
    except ImageError as error:
        raise UserError(f"image {path}: {error}") from error


def _only(files: Iterable[Path], needed: str, download_url: str) -> Path:
    """Return the only one of the files that exists."""
    present = list(dict.fromkeys(path for path in files if path.is_file()))
    if not present:
        raise MissingData(f"{needed} is missing; get it from {download_url}")
    if len(present) > 1:
        raise UserError(f"there are several files of labels, {', '.join(map(str, present))}; keep one of them")
    return present[0]


def _folder_of(root: Path, name: str, file: Path, download_url: str) -> Path:
    for place in (root, file.parent):
        if (place / name).is_dir():
            return place / name
    raise UserError(f"{root / name} is missing; {file.name} needs its images; get them from {download_url}")


def _files_by_stem(folder: Path) -> dict[str, Path]:
    listing = ImageListing(folder)
    by_stem: dict[str, Path] = {}
    for path in listing.images(listing.files_below(folder)):
        by_stem.setdefault(path.stem, path)
    listing.log()
    return by_stem


def _image_of(images: dict[str, Path], stem: str, file: Path, row: Row) -> Path:
    if stem not in images:
        raise UserError(f"{file}, line {row.line}: the image {stem} is missing; it must be a file {stem}.jpg or .png")
    return images[stem]


def _not_empty(samples: list[LabelledImage], file: Path) -> list[LabelledImage]:
    if not samples:
        raise UserError(f"{file} has no row with a label")
    return samples

"""Published data sets, and errors that name the source of the right files."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import numpy as np
import pytest
from colours import COLOURS, colour_model, jpeg
from PIL import Image

from bclip_fast.data.image_files import read_rgb
from bclip_fast.errors import UserError
from bclip_fast.eval import evaluate, report, tasks
from bclip_fast.eval.datasets import open_dataset, rsna
from bclip_fast.eval.datasets.arrays import as_bmp

WORDS = {"0": "red", "1": "blue"}


def write_task(root: Path, dataset: str, words: dict[str, str] = WORDS, **keys: object) -> str:
    lines = ['title = "Mine"', 'protocol = "zero_shot"', f'dataset = "{dataset}"', 'label = "class"', 'split = "test"']
    lines += [
        f"{key} = {str(value).lower() if isinstance(value, bool) else repr(value)}" for key, value in keys.items()
    ]
    lines += ['where = "the shelf"', "[prompts.classes]", *(f'{key} = "{word}"' for key, word in words.items())]
    path = root / "mine.toml"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def evaluate_task(task: str, data: Path, **settings: object) -> dict:
    return evaluate(colour_model(), [task], data=str(data), progress=False, **settings)["tasks"]  # type: ignore[arg-type]


def solid_images(names: list[str], side: int) -> np.ndarray:
    rows = [np.broadcast_to(np.array(COLOURS[name], np.uint8), (side, side, 3)) for name in names]
    return np.stack(rows)


def assert_refused(message: str, *args: object, **options: object) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_dataset(*args, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_fingerprint_depends_on_the_content(folder: Path) -> None:
    first = open_dataset(str(folder), "test").fingerprint
    assert open_dataset(str(folder), "test").fingerprint == first != open_dataset(str(folder), "train").fingerprint
    (folder / "test" / "red" / "0.jpg").write_bytes(jpeg((1, 2, 3)))
    assert open_dataset(str(folder), "test").fingerprint != first


def write_pcam(folder: Path, split: str, names: list[str]) -> None:
    h5py = pytest.importorskip("h5py")
    folder.mkdir(exist_ok=True)
    stem = folder / f"camelyonpatch_level_2_split_{split}"
    with h5py.File(f"{stem}_x.h5", "w") as file:
        file["x"] = solid_images(names, 96)
    with h5py.File(f"{stem}_y.h5", "w") as file:
        file["y"] = np.array([int(name == "blue") for name in names], np.uint8).reshape(-1, 1, 1, 1)


def test_pcam_labels_images_and_metrics_equal_the_written_data(tmp_path: Path) -> None:
    names = ["red", "blue", "blue", "red", "blue"]
    write_pcam(tmp_path / "pcam", "test", names)
    data = open_dataset(str(tmp_path / "pcam"), "test", "pcam")
    assert data.labels("class") == ["0", "1", "1", "0", "1"]
    assert len(data) == 5
    assert read_rgb(data.image(1), str).getpixel((3, 3)) == COLOURS["blue"]
    result = evaluate_task(write_task(tmp_path, "pcam", folder="pcam"), tmp_path)["mine"]
    names = [metric["name"] for metric in result["figures"]]
    assert names == ["accuracy", "balanced accuracy", "AUROC", "ECE", "ECE of 1"]
    assert [metric["value"] for metric in result["figures"][:3]] == [1, 1, 1]
    assert result["samples"]["key"][0] == "test/0"
    assert len(result["sensitivity"]) == 6


def test_pcam_missing_or_invalid_files_raise(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    folder = tmp_path / "pcam"
    write_pcam(folder, "test", ["red", "blue"])
    options = {"reader": "pcam", "download_url": "the shelf"}
    assert_refused(
        r"split_valid_x.h5 is missing.*\(N, 96, 96, 3\) uint8; get it from the shelf", folder, "val", **options
    )
    with gzip.open(folder / "camelyonpatch_level_2_split_valid_x.h5.gz", "w") as file:
        file.write(b"x")
    assert_refused("split_valid_x.h5 is still compressed: gunzip", folder, "val", **options)
    y = folder / "camelyonpatch_level_2_split_test_y.h5"
    y.write_bytes(b"no HDF5")
    assert_refused("test_y.h5 cannot be read.*the shelf", folder, "test", **options)
    with h5py.File(y, "w") as file:
        file["y"] = np.zeros((3, 1, 1, 1), np.uint8)
    assert_refused("2 images.* 3 labels", folder, "test", **options)
    with h5py.File(y, "w") as file:
        file["y"] = np.zeros((2, 1), np.int64)
    assert_refused(r"shape \(2, 1\), int64", folder, "test", **options)


def write_medmnist(path: Path, **arrays: np.ndarray) -> None:
    images, labels = solid_images(["red", "blue", "blue"], 28), np.array([[0], [1], [1]], np.uint8)
    np.savez(path, **({"test_images": images, "test_labels": labels} | arrays))


def test_medmnist_file_or_folder_opens_and_invalid_files_raise(tmp_path: Path) -> None:
    write_medmnist(tmp_path / "bloodmnist.npz")
    for path in (tmp_path, tmp_path / "bloodmnist.npz"):
        assert open_dataset(str(path), "test", "medmnist").labels("class") == ["0", "1", "1"]
    assert len(open_dataset(str(tmp_path / "bloodmnist.npz"), "test")) == 3
    assert_refused("no pathmnist", tmp_path, "test", "medmnist", name="pathmnist")
    assert_refused("KeyError|val_images", tmp_path, "val", "medmnist", download_url="the shelf")
    write_medmnist(tmp_path / "bloodmnist.npz", test_labels=np.zeros((2, 1)))
    assert_refused(r"labels \(2, 1\); MedMNIST needs test_images", tmp_path, "test", "medmnist")
    (tmp_path / "bloodmnist.npz").write_bytes(b"PK\x03\x04 broken")
    assert_refused("bloodmnist.npz cannot be read.*the shelf", tmp_path, "test", "medmnist", download_url="the shelf")


def test_medmnist_multi_label_gives_macro_auroc(tmp_path: Path) -> None:
    write_medmnist(tmp_path / "chestmnist.npz", test_labels=np.array([[1, 0], [0, 1], [0, 0]], np.uint8))
    result = evaluate_task(write_task(tmp_path, "auto", multi_label=True), tmp_path / "chestmnist.npz")["mine"]
    assert result["samples"]["label"] == ["0", "1", ""]
    # The third image is blue without a label. Its score equals the second's, so the AUROC of class 1 loses half a pair.
    assert [row["auroc"] for row in result["per_class"]] == [1, 0.75]
    assert result["figures"][0]["name"] == "AUROC, macro"
    assert result["figures"][0]["value"] == 0.875


def test_chestmnist_probe_learns_the_findings_that_are_colours(tmp_path: Path) -> None:
    """Run the package's task on data of its shape: 14 findings, three splits. Findings 0 and 1 are colours."""
    generator, arrays = np.random.default_rng(0), {}
    for split, num in (("train", 60), ("val", 40), ("test", 30)):
        labels = (generator.random((num, 14)) < 0.4).astype(np.uint8)
        names = [list(COLOURS)[row[0] + 2 * row[1]] for row in labels]
        arrays |= {f"{split}_images": solid_images(names, 28), f"{split}_labels": labels}
    write_medmnist(tmp_path / "chestmnist.npz", **arrays)
    names = ["chestmnist_probe", "chestmnist"]
    results = evaluate(colour_model(), names, data=str(tmp_path), progress=False, share=(1.0,), num_seeds=1)
    result, other = (results["tasks"][name] for name in names)
    assert [metric["name"] for metric in result["figures"]] == [
        "AUROC, macro, 100 % of train",
        "accuracy, 100 % of train",
        "ECE, mean over labels, 100 % of train",
    ]
    areas = [row["auroc"] for row in result["per_class"]]
    assert min(areas[:2]) > 0.95
    assert 0.3 < sum(areas[2:]) / 12 < 0.7
    assert result["validation"] == "val"
    assert result["samples"]["key"][0] == "test/0"
    assert [metric["name"] for metric in other["figures"]] == ["AUROC, macro"] == [tasks.load("chestmnist").metric]
    low, high = other["figures"][0]["interval"]
    assert low < other["figures"][0]["value"] < high
    report.write(tmp_path / "report.html", results)
    text = (tmp_path / "report.html").read_text()
    assert "Probe: chestmnist<" in text
    assert "atelectasis" in text
    assert "Probe runs" in text


def test_pneumoniamnist_published_file_opens(shared_data: Path) -> None:
    path = shared_data / "classification" / "pneumoniamnist"
    data = open_dataset(str(path), "test", "medmnist", name="pneumoniamnist")
    labels = data.labels("class")
    assert (labels.count("0"), labels.count("1")) == (234, 390)
    assert len(data) == tasks.load("pneumoniamnist").num_samples
    assert read_rgb(data.image(5), str).size == (28, 28)


def test_tcga_til_with_and_without_cancer_folders_opens(tmp_path: Path) -> None:
    for cancer in ("brca", "luad"):
        for name, colour in (("til-negative", "red"), ("til-positive", "blue")):
            (tmp_path / cancer / "test" / name).mkdir(parents=True)
            (tmp_path / cancer / "test" / name / "a.png").write_bytes(jpeg(COLOURS[colour]))
    assert len(open_dataset(str(tmp_path), "test", "tcga_til")) == 4
    data = open_dataset(str(tmp_path / "luad"), "test", "tcga_til")
    assert data.labels("class") == ["til-negative", "til-positive"]
    assert_refused(r"CANCER/.train.*TCGA-TIL from the shelf", tmp_path, "train", "tcga_til", download_url="the shelf")


def write_dicom(path: Path, values: np.ndarray, **tags: object) -> None:
    pydicom = pytest.importorskip("pydicom")
    header = pydicom.Dataset()
    header.file_meta = pydicom.dataset.FileMetaDataset()
    header.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    header.file_meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    header.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    header.Rows, header.Columns = values.shape
    header.SamplesPerPixel, header.PhotometricInterpretation, header.PixelRepresentation = 1, "MONOCHROME2", 0
    header.BitsAllocated = header.BitsStored = values.dtype.itemsize * 8
    header.HighBit = header.BitsStored - 1
    for name, value in tags.items():
        setattr(header, name, value)
    header.PixelData = values.tobytes()
    header.save_as(path, enforce_file_format=True)


def test_rsna_splits_depend_only_on_the_public_csv(tmp_path: Path) -> None:
    from sklearn.model_selection import train_test_split

    # As many patients as in the public file.
    patients = [f"{i * 7919 % 26684:08x}" for i in range(rsna.NUM_PATIENTS)]
    splits = rsna.split_patients(sorted(patients))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 18678, "val": 4003, "test": 4003}
    assert len(set().union(*splits.values())) == rsna.NUM_PATIENTS
    train, rest = train_test_split(sorted(patients), test_size=0.3, random_state=0)
    assert splits["test"] == train_test_split(rest, test_size=0.5, random_state=0)[0]
    assert splits["train"] == train


def test_rsna_images_and_labels_equal_the_written_ones(tmp_path: Path) -> None:
    (tmp_path / rsna.IMAGES).mkdir()
    lines = ["patientId,x,y,width,height,Target"]
    for i in range(10):
        lines += [f"p{i},1,2,3,4,1", f"p{i},5,6,7,8,1"] if i % 2 else [f"p{i},,,,,0"]
        ramp = np.arange(64, dtype=np.uint8).reshape(8, 8) + i
        write_dicom(tmp_path / rsna.IMAGES / f"p{i}.dcm", ramp)
    (tmp_path / rsna.LABELS).write_text("\n".join(lines) + "\n")
    sizes = {}
    for split in ("train", "val", "test"):
        data = open_dataset(str(tmp_path), split, "rsna")
        sizes[split] = len(data)
        for i, label in enumerate(data.labels("class")):
            number = int(data.key(i)[1:])
            assert label == str(number % 2)
            assert np.asarray(read_rgb(data.image(i), str))[0, 3, 0] == 3 + number
    assert sizes == {"train": 7, "val": 2, "test": 1}
    inverted = tmp_path / rsna.IMAGES / f"{data.key(0)}.dcm"
    write_dicom(inverted, np.array([[0, 1000], [2000, 4000]], np.uint16), PhotometricInterpretation="MONOCHROME1")
    assert np.asarray(read_rgb(data.image(0), str))[..., 0].tolist() == [[255, 191], [127, 0]]
    inverted.write_bytes(b"none")
    with pytest.raises(UserError, match="image p1 cannot be decoded"):
        read_rgb(data.image(0), lambda: "p1")
    inverted.unlink()
    with pytest.raises(UserError, match=r"a patient of stage_2_train_labels.csv, cannot be read"):
        data.image(0)
    (tmp_path / rsna.LABELS).write_text("patientId,Target\np1,2\n")
    assert_refused("Target '2', but it must be 0 or 1", tmp_path, "test", "rsna")
    (tmp_path / rsna.LABELS).write_text("patient,Target\np1,1\n")
    assert_refused("columns patientId, Target.*the shelf", tmp_path, "test", "rsna", download_url="the shelf")


def test_images_with_text_files_are_pairs(tmp_path: Path) -> None:
    for i, name in enumerate(("red", "blue")):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(COLOURS[name]))
        (tmp_path / f"{i}.txt").write_text(f"a {name} square\n")
    result = evaluate_task("retrieval", tmp_path)["retrieval"]
    assert [metric["value"] for metric in result["figures"][:1]] == [1]
    (tmp_path / "1.txt").write_text(" ")
    assert_refused("1.txt, the text of 1.jpg, is empty", tmp_path, "all")
    (tmp_path / "1.txt").unlink()
    assert_refused("1.txt, the text of 1.jpg, cannot be read", tmp_path, "all")


def test_as_bmp_is_lossless() -> None:
    for shape in ((5, 7), (5, 7, 3)):
        values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(as_bmp(values)))), values)

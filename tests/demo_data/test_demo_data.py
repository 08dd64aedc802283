"""The quickstart's data: no leak between the splits, and captions that state facts."""

from __future__ import annotations

import importlib.util
import io
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bclip_fast.data.shards.format import Sample
from bclip_fast.data.shards.reader import ShardDataset
from bclip_fast.data.shards.verify import verify
from bclip_fast.demo_data import build, dicom, photographs, volumes
from bclip_fast.demo_data.captions import LABELS, Facts, compose
from bclip_fast.errors import UserError

_MISSING = [name for name in build._MODULES.values() if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(_MISSING), reason=f"needs the extra quickstart: {', '.join(_MISSING)} not installed"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("samples") / "dataset"
    calls: list[tuple[str, int, int]] = []
    build.build(out, seed=0, progress=lambda *call: calls.append(call))
    for stage in ("cutting images", "writing shards"):
        counts = [(count, total) for name, count, total in calls if name == stage]
        assert counts == sorted(counts)
        assert counts[-1][0] == counts[-1][1] > 2000
    return out


@pytest.fixture(scope="module")
def splits(built: Path) -> dict[str, list[Sample]]:
    return {split: list(ShardDataset(built, split)) for split in ("train", "val")}


def test_build_writes_intact_dataset(built: Path, splits: dict[str, list[Sample]]) -> None:
    assert verify(built) == []
    assert 2000 <= len(splits["train"]) <= 4000
    assert 200 <= len(splits["val"]) <= 500
    assert json.loads((built / build.SKIPPED_FILE).read_text()) == []


def test_images_are_small_baseline_jpegs_with_content(splits: dict[str, list[Sample]]) -> None:
    for sample in splits["train"][::7] + splits["val"]:
        with Image.open(io.BytesIO(sample.image)) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (112, 112))
            assert "progressive" not in image.info
            assert np.asarray(image).std() > 4, sample.key


def test_val_classes_occur_in_train_and_are_counted(splits: dict[str, list[Sample]]) -> None:
    train = build.summarize_labels(sample.meta for sample in splits["train"])
    val = build.summarize_labels(sample.meta for sample in splits["val"])
    assert set(val) == set(LABELS)
    assert len(val["modality"].counts) >= 7
    assert set(val["plane"].counts) == set(LABELS["plane"])
    for kind, summary in val.items():
        assert summary.chance == 1 / len(summary.counts)
        assert summary.majority == max(summary.counts.values()) / sum(summary.counts.values())
        for value, count in summary.counts.items():
            assert value in LABELS[kind]
            assert count >= 10
            assert train[kind].counts[value] >= 5 * count


def test_held_out_slices_keep_their_distance_from_training_slices(splits: dict[str, list[Sample]]) -> None:
    # A held-out position must not occur in any training map: T1, grey matter or white matter.
    positions: dict[str, dict[int, set[int]]] = {split: defaultdict(set) for split in splits}
    for split, members in splits.items():
        for sample in members:
            if "volume" in sample.meta:
                positions[split][sample.meta["axis"]].add(sample.meta["slice_index"])
    for axis in range(3):
        train, val = positions["train"][axis], positions["val"][axis]
        assert min(abs(a - b) for a in train for b in val) >= volumes.GAP_MM
        assert len(train) > 30
        assert len(val) >= 9
    # The hemispheres of the template are mirror images, so slices may only come from one.
    assert min(min(positions[split][0]) for split in splits) >= 98


def test_held_out_crops_keep_their_distance_from_training_crops(splits: dict[str, list[Sample]]) -> None:
    boxes: dict[str, dict[str, list[list[int]]]] = defaultdict(lambda: defaultdict(list))
    for split, members in splits.items():
        for sample in members:
            if "picture" in sample.meta:
                boxes[sample.meta["picture"]][split].append(sample.meta["box"])
    assert len(boxes) == len(photographs.SOURCES)
    for name, by_split in boxes.items():
        for top, left, height, width in by_split["val"]:
            for other in by_split["train"]:
                is_separate = (
                    top >= other[0] + other[2] + 2
                    or other[0] >= top + height + 2
                    or left >= other[1] + other[3] + 2
                    or other[1] >= left + width + 2
                )
                assert is_separate, (name, other)


def test_sources_are_different_images(splits: dict[str, list[Sample]]) -> None:
    images = {split: {sample.image for sample in members} for split, members in splits.items()}
    assert not images["train"] & images["val"]
    files = [(source.package, source.path) for source in photographs.SOURCES]
    assert len(set(files)) == len(files)


def _names_label(kind: str, value: str, caption: str) -> bool:
    words = [*LABELS[kind][value], *([value] if kind == "plane" else [])]
    return any(word.lower() in caption.lower() for word in words)


def test_captions_name_only_their_labels(splits: dict[str, list[Sample]]) -> None:
    complete = 0
    for sample in splits["train"] + splits["val"]:
        kinds = {kind for kind in ("plane", "stain", "body_part") if kind in sample.meta}
        complete += all(_names_label(kind, sample.meta[kind], sample.caption) for kind in kinds)
        for kind in ("plane", "stain", "body_part"):
            named = {value for value in LABELS[kind] if _names_label(kind, value, sample.caption)}
            label = sample.meta.get(kind)
            assert named <= ({label} if label else set()), (kind, sample.caption)
        modalities = {value for value in LABELS["modality"] if _names_label("modality", value, sample.caption)}
        if sample.meta.get("sequence") in ("GM", "WM"):
            assert "MRI" in sample.caption
            assert modalities == set()
        else:
            assert modalities <= {sample.meta["modality"]}
        for value, phrase in (("GM", "grey"), ("WM", "white"), ("T1", "T1")):
            is_map = sample.meta.get("sequence") == value
            assert (phrase in sample.caption.replace("Grey", "grey").replace("White", "white")) == is_map, (
                sample.caption
            )
        assert sample.caption[0].isupper()
        assert sample.caption.endswith(".")
        assert not any(text in sample.caption for text in ("  ", "None"))
    assert 0.7 < complete / sum(len(members) for members in splits.values()) < 0.9


def test_captions_state_the_right_position(splits: dict[str, list[Sample]]) -> None:
    num_positions = 0
    for sample in splits["val"]:
        if "= " in sample.caption and "volume" in sample.meta:
            number = sample.caption.split("= ")[1].split(" mm")[0]
            assert int(number) == sample.meta["position_mm"]
            letter = sample.caption.split(" =")[0][-1]
            assert "xyz".index(letter) == sample.meta["axis"]
            num_positions += 1
    assert num_positions > 20
    assert "32 mm below the anterior commissure" in (volumes.slice_facts("T1", "axial", -32).details)
    assert "70 mm posterior to the anterior commissure" in (volumes.slice_facts("T1", "coronal", -70).details)


def test_compose_gives_many_captions() -> None:
    facts = Facts("CT", "head", "axial", details=("slice thickness 5 mm", "120 kVp"))
    captions = {compose(facts, np.random.default_rng(seed)) for seed in range(200)}
    assert len(captions) > 60


def test_cut_slice_is_upright_with_the_face_on_the_left() -> None:
    folder = Path(next(iter(importlib.util.find_spec("nilearn").submodule_search_locations)))
    volume = volumes.Volume(folder / volumes.MAPS["WM"])

    def quarters(plane: str, mm: float) -> np.ndarray:
        pixels = np.asarray(volume.cut(plane, mm, 190.0, (0.0, 0.0)), dtype=float)
        assert pixels.shape == (190, 190)
        return pixels.reshape(2, 95, 2, 95).sum(axis=(1, 3))

    # Below z = -45 mm, the brain consists of cerebellum and brain stem, which are posterior to the centre.
    axial = quarters("axial", -50)
    assert axial[1].sum() > 5 * axial[0].sum()
    # At y = 0, most white matter is in the hemispheres, superior to the temporal lobes.
    coronal = quarters("coronal", 0)
    assert coronal[0].sum() > 1.2 * coronal[1].sum()
    assert coronal[:, 0].sum() == pytest.approx(coronal[:, 1].sum(), rel=0.03)
    # The lowest brain tissue in a sagittal slice is the cerebellum, on the right of the image.
    lowest = np.asarray(volume.cut("sagittal", 20, 190.0, (0.0, 0.0)), dtype=float)[145:]
    assert lowest[:, 95:].sum() > 5 * lowest[:, :95].sum()
    assert volume.affine[0, 3] + volume.index(0, 14) * volume.affine[0, 0] == 14


def _write_dicom(path: Path, pixels: np.ndarray, **tags: object) -> Path:
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    header = pydicom.Dataset()
    header.file_meta = pydicom.dataset.FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    header.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    header.SOPClassUID = SecondaryCaptureImageStorage
    header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID
    header.Rows, header.Columns = pixels.shape[:2]
    header.SamplesPerPixel = 1 if pixels.ndim == 2 else 3
    header.BitsAllocated = header.BitsStored = pixels.dtype.itemsize * 8
    header.HighBit = header.BitsStored - 1
    header.PixelRepresentation = int(pixels.dtype.kind == "i")
    header.PhotometricInterpretation = "MONOCHROME2"
    if pixels.ndim == 3:
        header.PlanarConfiguration = 0
    for keyword, value in tags.items():
        setattr(header, keyword, value)
    header.PixelData = pixels.tobytes()
    header.save_as(path, enforce_file_format=True)
    return path


def test_read_ct_applies_rescale_and_both_windows(tmp_path: Path) -> None:
    values = np.array([[-1000, -160, 40], [140, 239, 1000]], dtype=np.int16)
    path = _write_dicom(
        tmp_path / "ct.dcm",
        values,
        Modality="CT",
        BodyPartExamined="HEAD",
        WindowCenter=[40, 500],
        WindowWidth=[400, 2000],
        RescaleSlope=1,
        RescaleIntercept=0,
        SliceThickness=5,
        ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
    )
    (soft, soft_facts), (bone, bone_facts) = dicom.read(path)
    # From C.11.2.1.2.1: black up to 40 - 0.5 - 199.5, white from 40 - 0.5 + 199.5.
    expected = np.clip((values.astype(float) + 160) / 399, 0, 1) * 255
    np.testing.assert_allclose(soft[:, :, 0], expected, atol=0.51)
    assert soft.shape == (2, 3, 3)
    assert (soft[..., 0] == soft[..., 2]).all()
    assert bone[1, 2, 0] < 255
    assert bone_facts.details[0] == "bone window"
    assert (soft_facts.modality, soft_facts.body_part) == ("CT", "head")
    assert soft_facts.plane == "axial"
    assert "slice thickness 5 mm" in soft_facts.details


def test_read_monochrome1_is_inverted_and_ybr_becomes_rgb(tmp_path: Path) -> None:
    ramp = np.arange(64, dtype=np.uint8).reshape(8, 8)
    tags = {"Modality": "CR", "PhotometricInterpretation": "MONOCHROME1", "ViewPosition": "PA"}
    [(image, facts)] = dicom.read(_write_dicom(tmp_path / "cr.dcm", ramp, **tags))
    assert (image[0, 0, 0], image[7, 7, 0]) == (255, 0)
    assert facts.details == ("posteroanterior (PA) view",)
    red = np.zeros((4, 4, 3), dtype=np.uint8) + np.array([76, 85, 255], dtype=np.uint8)
    tags = {"Modality": "US", "PhotometricInterpretation": "YBR_FULL"}
    [(image, _)] = dicom.read(_write_dicom(tmp_path / "us.dcm", red, **tags))
    np.testing.assert_allclose(image[0, 0], [255, 0, 0], atol=3)


@pytest.mark.parametrize(
    ("cosines", "plane", "flip_rows", "flip_columns"),
    [
        ([1, 0, 0, 0, 1, 0], "axial", False, False),
        ([-1, 0, 0, 0, -1, 0], "axial", True, True),
        ([1, 0, 0, 0, 0, -1], "coronal", False, False),
        ([1, 0, 0, 0, 0, 1], "coronal", True, False),
        ([0, 1, 0, 0, 0, -1], "sagittal", False, False),
        ([0, -1, 0, 0, 0, -1], "sagittal", False, True),
        ([1, 0, 0, 0, 0.707107, -0.707107], None, False, False),
    ],
)
def test_read_image_has_display_orientation(
    tmp_path: Path, cosines: list[float], plane: str | None, flip_rows: bool, flip_columns: bool
) -> None:
    pixels = np.arange(0, 240, 20, dtype=np.uint8).reshape(3, 4)
    path = _write_dicom(tmp_path / "mr.dcm", pixels, Modality="MR", ImageOrientationPatient=cosines)
    [(image, facts)] = dicom.read(path)
    assert facts.plane == plane
    assert ("oblique plane" in facts.details) == (plane is None)
    corner = image[-1 if flip_rows else 0, -1 if flip_columns else 0, 0]
    assert corner == 0 == image.min()


def _use_few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volumes, "TRAIN_PER_MAP_AND_PLANE", 2)
    monkeypatch.setattr(build, "_PER_MODALITY", {"train": 2, "val": 1})
    small = [source for source in photographs.SOURCES if source.name in ("skull-base-ct", "microaneurysms", "ihc")]
    monkeypatch.setattr(photographs, "SOURCES", tuple(small))


def test_build_bytes_depend_on_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _use_few_samples(monkeypatch)
    fingerprints = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        build.build(tmp_path / name, seed=seed)
        fingerprints.append(ShardDataset(tmp_path / name, "train").fingerprint)
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_build_lists_unreadable_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _use_few_samples(monkeypatch)
    truncated = photographs.Source("broken", "pydicom", "data/test_files/MR_truncated.dcm", side=None)
    missing = replace(photographs.SOURCES[0], name="missing", path="data/missing.dcm")
    sources = (*photographs.SOURCES, truncated, missing)
    monkeypatch.setattr(photographs, "SOURCES", sources)
    build.build(tmp_path / "out")
    skipped = json.loads((tmp_path / "out" / build.SKIPPED_FILE).read_text())
    assert [entry["file"] for entry in skipped] == [truncated.path, missing.path]
    assert "pixel data" in skipped[0]["reason"]
    assert "FileNotFound" in skipped[1]["reason"]
    assert "CT" in {sample.meta["modality"] for sample in ShardDataset(tmp_path / "out")}


def test_a_missing_package_is_names_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(build._MODULES, "mahotas", "no_such_module_here")
    with pytest.raises(UserError, match=r"mahotas.*bclip_fast\[quickstart\]"):
        build.build(tmp_path / "out")
    assert not (tmp_path / "out").exists()

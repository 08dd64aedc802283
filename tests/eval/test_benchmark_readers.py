"""The readers of the benchmark's data sets: their true layouts, and one line for each fault."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmark_data as made
import numpy as np
import pytest

from bclip_fast.errors import UserError
from bclip_fast.eval import tasks
from bclip_fast.eval.datasets import EvalDataset, open_dataset, spreadsheets
from bclip_fast.eval.datasets.files import MissingData
from bclip_fast.eval.evaluate import Evaluation


def opened(name: str, folder: Path) -> EvalDataset:
    from bclip_fast.eval import EvalConfig

    return Evaluation(EvalConfig(task=(f"medpmc_{name}",), data=str(folder), progress=False)).tasks[0][1]


def refused(name: str, folder: Path, message: str, kind: type[UserError] = UserError) -> None:
    with pytest.raises(UserError, match=message) as caught:
        opened(name, folder)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, MissingData) == (kind is MissingData), caught.value


@pytest.mark.parametrize("name", [path.stem for path in tasks.FOLDER.glob("medpmc_*.toml")])
def test_benchmark_row_without_data_names_the_file_and_its_source(name: str, tmp_path: Path) -> None:
    refused(name.removeprefix("medpmc_"), tmp_path, "missing|holds no", MissingData)


@pytest.mark.parametrize("xlsx", [False, True])
def test_deepdrid_reads_both_kinds_of_tables(xlsx: bool, tmp_path: Path) -> None:
    if xlsx:
        pytest.importorskip("openpyxl")
    rows = [("347_l1", 0), ("347_r1", 4), ("353_l2", 2.0 if xlsx else "2.0"), ("353_r2", None if xlsx else "")]
    made.write_deepdrid(tmp_path / "deepdrid", rows, xlsx=xlsx)
    data = opened("deepdrid", tmp_path)
    assert data.labels("class") == ["0", "4", "2"]
    assert [data.key(i) for i in range(3)] == ["347_l1", "347_r1", "353_l2"]
    assert data.image(1) == (next(tmp_path.rglob("347_r1.jpg"))).read_bytes()


def test_deepdrid_finds_images_anywhere_and_other_names_of_columns(tmp_path: Path) -> None:
    folder = tmp_path / "deepdrid"
    made.write_picture(folder / "deep" / "er" / "a_1.png", 1)
    (folder / "labels.csv").write_text("image,level\na_1.jpg,3\n")
    assert opened("deepdrid", tmp_path).labels("class") == ["3"]
    (folder / "labels.csv").write_text("image,level\na_1,5\n")
    refused("deepdrid", tmp_path, "labels.csv, line 2: level is '5', but must be 0, 1, 2, 3 or 4")
    (folder / "labels.csv").write_text("image,level\nb_1,3\n")
    refused("deepdrid", tmp_path, "labels.csv, line 2: the image b_1 is missing")
    (folder / "labels.csv").write_text("image,grade\na_1,3\n")
    refused("deepdrid", tmp_path, "labels.csv has no column 'DR_Levels' or 'level'.*image_id,DR_Levels")
    (folder / "labels.csv").write_text("image,level\na_1,\n")
    refused("deepdrid", tmp_path, "labels.csv has no row with a label")
    (folder / "more.csv").write_text("image,level\na_1,3\n")
    refused("deepdrid", tmp_path, "several files of labels, .*labels.csv, .*more.csv")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_bytes(b"not a zip"), "is not an XLSX file"),
        (lambda path: path.write_bytes(b"<!DOCTYPE html><html>"), "is a web page, not the file"),
        (lambda path: add_entity(path), "holds a document type, which no spreadsheet needs"),
    ],
)
def test_deepdrid_damaged_spreadsheet_raises(change: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    pytest.importorskip("openpyxl")
    change(made.write_deepdrid(tmp_path / "deepdrid", xlsx=True))
    refused("deepdrid", tmp_path, message)


def add_entity(path: Path) -> None:
    rewrite(path, "xl/workbook.xml", lambda content: b'<!DOCTYPE x [<!ENTITY a "aaaa">]>' + content)


def test_spreadsheet_that_unpacks_to_much_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openpyxl")
    monkeypatch.setattr(spreadsheets, "_MAX_BYTES", 1000)
    made.write_deepdrid(tmp_path / "deepdrid", xlsx=True)
    refused("deepdrid", tmp_path, "Challenge1_labels.xlsx unpacks to more than")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("xl/worksheets/sheet1.xml", lambda text: text.replace('r="3"', 'r="2000000000"'), "more than 1,000 rows"),
        ("xl/worksheets/sheet1.xml", lambda text: text.replace("B3", "XFD3"), "or 1,500 cells"),
        ("xl/workbook.xml", lambda text: " " * 5000 + "<!DOCTYPE x>" + text, "holds a document type"),
        ("xl/workbook.xml", lambda text: "<!DOCTYPE x>" + text, "holds a document type"),
    ],
)
def test_spreadsheet_that_grows_in_memory_is_refused(
    part: str, change: Callable[[str], str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openpyxl")
    monkeypatch.setattr(spreadsheets, "_MAX_ROWS", 1000)
    monkeypatch.setattr(spreadsheets, "_MAX_CELLS", 1500)
    path = made.write_deepdrid(tmp_path / "deepdrid", xlsx=True)
    encoding = "utf-8" if "sheet1" in part else "utf-16"
    rewrite(path, part, lambda content: change(content.decode()).encode(encoding))
    refused("deepdrid", tmp_path, message)


def test_spreadsheet_with_a_false_size_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openpyxl")
    monkeypatch.setattr(spreadsheets, "_MAX_CELLS", 1000)
    path = made.write_deepdrid(tmp_path / "deepdrid", xlsx=True)
    size = re.compile(rb'<dimension ref="[^"]*"')
    rewrite(path, "xl/worksheets/sheet1.xml", lambda text: size.sub(b'<dimension ref="A1:XFD1048576"', text))
    assert len(opened("deepdrid", tmp_path)) > 0


def rewrite(path: Path, part: str, change: Callable[[bytes], bytes]) -> None:
    """Change a part of a spreadsheet."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    assert change(members[part]) != members[part]
    members[part] = change(members[part])
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def test_ham10000_reads_one_hot_rows_and_names_faulty_ones(tmp_path: Path) -> None:
    file = made.write_ham10000(tmp_path / "ham10000", 9)
    data = opened("ham10000", tmp_path)
    assert data.labels("class") == ["MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC", "MEL", "NV"]
    assert data.fingerprint == opened("ham10000", tmp_path).fingerprint
    with pytest.raises(UserError, match="the only label of .* is 'class'"):
        data.labels("sex")
    text = file.read_text()
    for old, new in (("ISIC_001,0.0,1.0", "ISIC_001,1.0,1.0"), ("ISIC_001,0.0,1.0", "ISIC_001,0.0,x")):
        file.write_text(text.replace(old, new))
        refused("ham10000", tmp_path, "GroundTruth.csv, line 3: one of MEL, NV, .* must be 1, and the others 0")
    file.write_text(text.replace("VASC", "SCC"))
    refused("ham10000", tmp_path, "GroundTruth.csv has no column 'VASC'.*e.g. image,MEL,NV,BCC")
    file.write_text(text)
    (tmp_path / "ham10000" / "ISIC2018_Task3_Test_Input" / "ISIC_003.jpg").unlink()
    refused("ham10000", tmp_path, "line 5: the image ISIC_003 is missing; it must be a file ISIC_003.jpg")


def test_dad_joins_the_categories_of_an_image_and_names_faulty_files(tmp_path: Path) -> None:
    file = made.write_dad(
        tmp_path / "dad", categories=[{"id": 1, "name": "colon"}, {"id": 11, "name": "abdominal_wall"}]
    )
    data = opened("dad", tmp_path)
    assert data.labels("class") == ["1|3", "2|4", "3|5", "4|6", "5|7", "6|8"]
    assert [data.key(i) for i in range(2)] == ["0", "1"]
    content = json.loads(file.read_text())

    def check(message: str, **changes: Any) -> None:
        file.write_text(json.dumps(content | changes))
        refused("dad", tmp_path, message)

    check(
        "numbers the category 'small intestine' 1, but the benchmark needs 6",
        categories=[{"id": 1, "name": "small_intestine"}],
    )
    check("names the image '../secret.png', which is outside", images=[{"id": 0, "file_name": "../secret.png"}])
    check("names the image 'x.png', which is missing below", images=[{"id": 0, "file_name": "x.png"}])
    check("test.json is not a file of COCO annotations .*file_name", images=[{"id": 0}])
    check("test.json is not a file of COCO annotations", images=[{"id": float("inf"), "file_name": "x.png"}])
    file.write_text("[1]")
    refused("dad", tmp_path, "test.json does not hold a JSON object")
    file.write_text(json.dumps(content | {"annotations": [], "images": content["images"][:1]}))
    assert opened("dad", tmp_path).labels("class") == [""]


def test_lc25000_reads_the_folders_of_one_organ(tmp_path: Path) -> None:
    made.write_lc25000(tmp_path / "lc25000")
    assert opened("lc25000_colon", tmp_path).labels("class") == ["colon_n"] * 3 + ["colon_aca"] * 3
    assert len(opened("lc25000_lung", tmp_path)) == 9
    for path in (tmp_path / "lc25000" / "Test Set" / "lung_scc").iterdir():
        path.unlink()
    refused("lc25000_lung", tmp_path, "lung_scc is missing or holds no image; LC25000 needs lung_n, lung_aca, lung_scc")


def test_rsna_of_the_benchmark_takes_the_first_row_and_leaves_out_patients_without_image(tmp_path: Path) -> None:
    folder = tmp_path / "rsna"
    made.write_rsna(folder)
    (folder / "stage_2_train_images" / "p4.png").unlink()
    assert len(opened("rsna_pneumonia", tmp_path)) == 4
    labels = folder / "stage_2_train_labels.csv"
    labels.write_text(labels.read_text() + "p1,,,,,0\n")  # the first row of p1 says 1
    assert opened("rsna_pneumonia", tmp_path).labels("class") == ["0", "1", "0", "1"]
    labels.write_text("patientId,Target\np1,2\n")
    refused("rsna_pneumonia", tmp_path, "labels.csv, line 2: Target is '2', but must be 0 or 1")
    labels.write_text("patientId,Target\nnobody,1\n")
    refused("rsna_pneumonia", tmp_path, "holds no image of the 1 patients of stage_2_train_labels.csv: PATIENT.dcm")
    (folder / "stage_2_train_images" / "p0.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"cut")
    labels.write_text("patientId,Target\np0,1\n")
    with pytest.raises(UserError, match="image .*p0.dcm: DICOM"):
        opened("rsna_pneumonia", tmp_path).image(0)


@pytest.mark.parametrize("arrow", [False, True])
def test_microbench_reads_parquet_and_arrow_of_the_hub(arrow: bool, tmp_path: Path) -> None:
    rows = made.bench_rows("other", 3) + made.bench_rows("jung_et_al_2022", 6)
    made.write_microbench(tmp_path / "ubench", rows, arrow=arrow)
    data = opened("jung_et_al_2022", tmp_path)
    assert [data.key(i) for i in range(6)] == [f"jung_et_al_2022-{i}" for i in range(6)]
    assert [data.image(i) for i in (5, 0, 3)] == [rows[3 + i]["image"]["bytes"] for i in (5, 0, 3)]
    questions = data.questions[1]  # type: ignore[attr-defined]
    assert [question.options for question in questions] == [
        tuple(rows[4]["captions"][f"classification_{kind}"]["options"]) for kind in (0, 1)
    ]
    assert data.fingerprint == opened("jung_et_al_2022", tmp_path).fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.pop("image"), "has no column image; MicroBench needs"),
        (lambda row: row.pop("captions"), "has no column captions; MicroBench needs"),
        (lambda row: row["captions"].pop("classification_1"), "captions.classification_1.options must be at least two"),
        (lambda row: row["captions"]["classification_0"].update(answer_idx=7), "answer_idx is 7, but must be 0 to"),
        (lambda row: row["captions"]["classification_0"].update(options=["a"]), "options must be at least two texts"),
    ],
)
def test_microbench_row_with_a_fault_is_named(change: Callable[[dict], object], message: str, tmp_path: Path) -> None:
    rows = made.bench_rows("jung_et_al_2022", 1)
    change(rows[0])
    made.write_microbench(tmp_path / "ubench", rows)
    refused("jung_et_al_2022", tmp_path, f"0000.parquet.*{message}")


def test_microbench_image_without_bytes_is_named(tmp_path: Path) -> None:
    rows = made.bench_rows("jung_et_al_2022", 2)
    rows[1]["image"]["bytes"] = None
    made.write_microbench(tmp_path / "ubench", rows)
    with pytest.raises(UserError, match="row 1 of batch 0: image has no bytes"):
        opened("jung_et_al_2022", tmp_path).image(1)


def test_medmnist_at_224_pixels_is_chosen_and_checked(tmp_path: Path) -> None:
    folder = tmp_path / "medmnist"
    made.write_medmnist(folder)
    np.savez(folder / "breastmnist.npz", test_images=np.zeros((1, 28, 28), np.uint8), test_labels=np.zeros((1, 1)))
    assert len(opened("breastmnist", tmp_path)) == 6
    made.write_medmnist(folder, side=128)
    refused("breastmnist", tmp_path, "breastmnist_224.npz holds images of 128 pixels; the task needs .* 224 pixels")


def test_pcam_with_one_of_its_files_is_faulty_and_not_missing(tmp_path: Path) -> None:
    made.write_pcam(tmp_path / "pcam")
    (tmp_path / "pcam" / "camelyonpatch_level_2_split_test_y.h5").unlink()
    refused("pcam", tmp_path, "split_test_y.h5 is missing")
    with pytest.raises(UserError, match="unknown data set reader 'ham1000'.*ham10000"):
        open_dataset(str(tmp_path), "test", "ham1000")

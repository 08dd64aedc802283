"""The splits of every kind of data, in all spellings. Faults are errors, and the log says what was taken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from colours import COLOURS, assert_refused, evaluate_with, jpeg, write_class_folders, write_shards

from bclip_fast.data.splits import MissingSplit
from bclip_fast.errors import UserError
from bclip_fast.eval import EvalConfig, tasks
from bclip_fast.eval.datasets import open_dataset
from bclip_fast.eval.datasets import vqa as vqa_data

PROBE = {"task": ("probe",), "split": "test", "progress": False, "share": (1.0,), "num_seeds": 1, "cache": "none"}


def probe(data: Path, **changes: object) -> dict:
    return evaluate_with(EvalConfig(data=str(data), **(PROBE | changes)))["tasks"]["probe"]  # type: ignore[arg-type]


def write_files(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(jpeg(COLOURS["red"]))


@pytest.mark.parametrize(
    ("names", "split"),
    [
        (("Training", "Testing"), "test"),
        (("train", "valid"), "val"),
        (("seg_train", "seg_test", "seg_pred"), "train"),
        (("train_set", "test_images"), "test"),
    ],
)
def test_folder_split_has_the_classes_below_it(tmp_path: Path, caplog, names: tuple[str, ...], split: str) -> None:
    write_class_folders(tmp_path, dict.fromkeys(names, 2))
    with caplog.at_level("INFO"):
        data = open_dataset(str(tmp_path), split)
    assert (data.split, sorted(set(data.labels("class")))) == (split, ["blue", "red"])
    assert Path(data.path).parent == tmp_path
    assert f"split {split} is {Path(data.path).name}" in caplog.text
    assert ("left out: seg_pred" in caplog.text) == ("seg_pred" in names)


def test_folder_of_a_split_may_repeat_its_name(tmp_path: Path) -> None:
    write_class_folders(tmp_path, {"seg_train/seg_train": 1, "seg_test/seg_test": 2})
    assert len(open_dataset(str(tmp_path), "test")) == 4


def test_class_that_looks_like_a_split_stays_a_class_and_the_log_says_so(tmp_path: Path, caplog) -> None:
    write_files(tmp_path, "stress_test/0.jpg", "ecg/0.jpg")
    assert open_dataset(str(tmp_path), "test").labels("class") == ["ecg", "stress_test"]
    assert "the folders stress_test count as classes" in caplog.text


def test_splits_in_doubt_are_errors(tmp_path: Path) -> None:
    two = write_class_folders(tmp_path / "two", {"train": 1, "val": 1, "valid": 1, "test": 1})
    assert_refused(two, "'val' and 'valid', which both mean split 'val'", split="val")
    assert len(open_dataset(str(two), "train")) == 2
    with pytest.raises(UserError, match="'val' and 'valid'"):
        probe(two)
    assert_refused(write_class_folders(tmp_path / "eval", {"train": 1, "eval": 1}), "'eval', which may", split="test")
    assert_refused(write_class_folders(tmp_path / "up/chest", {"train": 1, "test": 1}).parent, "chest holds the splits")
    write_files(tmp_path / "low", "cat/train/0.jpg", "cat/test/0.jpg")
    assert_refused(tmp_path / "low", "cat holds the splits test, train and is not a class")
    assert_refused(write_class_folders(tmp_path / "flat", {"": 1}), "has no splits.* 'tset'; omit", split="tset")
    write_files(tmp_path / "forms", "caf\u00e9/0.jpg", "cafe\u0301/0.jpg")
    assert_refused(tmp_path / "forms", "two folders that read")


def test_probe_validates_on_valid_and_a_fault_there_is_an_error(tmp_path: Path, caplog) -> None:
    data = write_class_folders(tmp_path / "data", {"Train": 6, "Valid": 4, "Test": 5})
    (data / "Valid" / "green").mkdir()  # no split has this class
    assert probe(data)["validation"] == "val"
    assert "left out the empty folders green" in caplog.text
    write_files(data, "Train/green/0.jpg")
    with pytest.raises(UserError, match="Valid/green holds no image") as caught:
        probe(data)
    assert not isinstance(caught.value, MissingSplit)
    write_files(data, "Valid/green/0.jpg")
    with pytest.raises(UserError, match="class 'green', which is missing in the test split"):
        probe(data)


def test_probe_without_validation_data_says_so(tmp_path: Path, caplog) -> None:
    data = write_class_folders(tmp_path / "data", {"train": 10, "val": 5})
    assert probe(data, split="val")["validation"] == "a fifth of train, val is the test split"
    (data / "val").rename(data / "test")
    assert probe(data)["validation"] == "a fifth of train, no val found"
    assert "validation: a fifth of train, because data" in caplog.text
    assert "has no split 'val'; its splits are test, train" in caplog.text
    shutil.rmtree(data / "train" / "blue")
    with pytest.raises(UserError, match="train split has no sample of class 'blue', but the test split"):
        probe(data)
    write_files(data, "train/blue/0.jpg")
    with pytest.raises(UserError, match="no sample of class 'blue', after a fifth of every class was set aside"):
        probe(data)


def test_probe_says_where_a_class_has_too_few_samples(tmp_path: Path, caplog) -> None:
    data = write_class_folders(tmp_path / "data", {"train": 6, "val": 3, "test": 2})
    with pytest.raises(UserError, match="class 'blue' has only 3 validation samples for 4 shots"):
        probe(data, share=(), shots=(4,))
    probe(data, share=(0.01,))
    assert "probe: 1 % of train is 2 of 12 samples, because every class gives at least one" in caplog.text


def test_probe_trains_on_every_label_that_is_named(tmp_path: Path) -> None:
    write_files(tmp_path, "a.jpg")
    lines = [f"a.jpg,{colour},{size},{split}" for split in ("train", "dev", "test") for colour, size in
             (("red", "big"), ("blue", "small"))]  # fmt: skip
    lines = [line.replace("a.jpg", f"{i}.jpg") for i, line in enumerate(lines)]
    write_files(tmp_path, *(f"{i}.jpg" for i in range(6)))
    (tmp_path / "t.csv").write_text("\n".join(["path,colour,size,Split", *lines]) + "\n")
    config = EvalConfig(data=str(tmp_path / "t.csv"), label=("colour", "size"), **PROBE)  # type: ignore[arg-type]
    results = evaluate_with(config)["tasks"]
    assert [(name, result["label"]) for name, result in results.items()] == [
        ("probe/colour", "colour"),
        ("probe/size", "size"),
    ]
    assert {result["validation"] for result in results.values()} == {"val"}


def table(folder: Path, *lines: str, name: str = "t.csv") -> Path:
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


def test_csv_splits_in_a_column_of_any_usual_name(tmp_path: Path, caplog) -> None:
    rows = ("a.png,x,Training", "b.png,y, Training ", "c.png,x,valid", "d.png,y,")
    for column in ("split", "Split", "set", "partition"):
        path = str(table(tmp_path, f"path,label,{column}", *rows))
        data = open_dataset(path, "train")
        assert (data.split, data.labels("label"), data.label_kinds) == ("train", ["x", "y"], ("label",))
        assert len(open_dataset(path, "validation")) == 1
        assert f"1 rows have no split, because column {column.replace('S', 's')!r} is empty" in caplog.text
    with pytest.raises(MissingSplit, match=r"no split 'test'; its splits are Training \(train\), valid \(val\)"):
        open_dataset(path, "test")
    table(tmp_path, "path,label,split", "a.png,x,Train", "b.png,y,train")
    assert_refused(tmp_path / "t.csv", "'Train' and 'train', which both mean split 'train'", split="train")
    table(tmp_path, "path,set,subset", "a.png,train,test")
    assert_refused(tmp_path / "t.csv", "columns 'set' and 'subset' both name splits", split="train")
    # A fold of another kind is a label.
    assert open_dataset(str(table(tmp_path, "path,fold", "a.png,0", "b.png,train")), "all").label_kinds == ("fold",)


def test_csv_image_in_two_splits_is_said(tmp_path: Path, caplog) -> None:
    open_dataset(str(table(tmp_path, "path,label,split", "a.png,x,train", "a.png,x,test")), "test")
    assert "1 images of split test are also in another split, the first is a.png" in caplog.text


def test_folder_of_tables_of_splits_is_read(tmp_path: Path) -> None:
    write_files(tmp_path, *(f"images/{i}.jpg" for i in range(10)))
    for name, rows in (("train.csv", range(6)), ("valid.csv", (6, 7)), ("test.csv", (8, 9))):
        table(tmp_path, "image,label", *(f"images/{i}.jpg,{'xy'[i % 2]}" for i in rows), name=name)
    table(tmp_path, "name,shape", "images/0.jpg,3", name="train_notes.csv")  # not a table of images
    data = open_dataset(str(tmp_path), "val")
    assert (data.split, data.labels("label")) == ("val", ["x", "y"])
    assert probe(tmp_path)["validation"] == "val"
    (tmp_path / "train" / "x").mkdir(parents=True)
    assert_refused(tmp_path, "has the tables .*train.csv.* and folders of splits: train; pass one table", split="val")


def test_pairs_in_folders_of_splits_are_read(tmp_path: Path) -> None:
    for name, num in (("Train", 2), ("Val", 1)):
        write_files(tmp_path / name, *(f"{i}.jpg" for i in range(num)))
        for i in range(num):
            (tmp_path / name / f"{i}.txt").write_text("a red square")
    data = open_dataset(str(tmp_path), "train")
    assert (data.split, data.captions(), data.key(0)) == ("train", ["a red square"] * 2, "0.jpg")
    assert len(open_dataset(str(tmp_path), "dev")) == 1


def test_published_sets_take_every_spelling(tmp_path: Path, shards: Path) -> None:
    images = np.zeros((2, 28, 28), np.uint8)
    labels = np.array([[0], [1]], np.uint8)
    np.savez(tmp_path / "bloodmnist.npz", val_images=images, val_labels=labels)
    for split in ("val", "Validation", "dev"):
        assert open_dataset(str(tmp_path / "bloodmnist.npz"), split).split == "val"
        assert open_dataset(str(shards), split).split == "val"
    with pytest.raises(UserError, match="split_valid_x.h5 is missing"):
        open_dataset(str(tmp_path), "validation", "pcam")
    write_files(tmp_path / "til", *(f"luad/Testing/til-{name}/0.jpg" for name in ("negative", "positive")))
    assert len(open_dataset(str(tmp_path / "til"), "test", "tcga_til")) == 2
    write_files(tmp_path / "til", "brca/Testing/til-positive/0.jpg")
    shutil.rmtree(tmp_path / "til" / "luad")
    with pytest.raises(UserError, match="with images of both"):
        open_dataset(str(tmp_path / "til"), "test", "tcga_til")


def write_questions(path: Path, **keys: object) -> None:
    row = {"qid": 1, "question": "is it red?", "answer": "Yes", "answer_type": "CLOSED", **keys}
    path.write_text(json.dumps([row]))


def test_questions_in_files_of_splits_are_read(tmp_path: Path) -> None:
    write_files(tmp_path, "images/a.jpg", "imgs/a.jpg", "a.jpg")
    for name in ("trainset.json", "testset.json"):
        write_questions(tmp_path / name, image_name="a.jpg")
    data = vqa_data.rad(tmp_path, "test")
    assert (data.split, len(data), len(vqa_data.rad(tmp_path, "Training"))) == ("test", 1, 1)
    with pytest.raises(MissingSplit, match=r"with the files testset.json, trainset.json, has no split 'train_clean'"):
        vqa_data.rad(tmp_path, "train_clean")
    write_questions(tmp_path / "test.json", image_name="a.jpg")
    with pytest.raises(UserError, match="'test' and 'testset', which both mean split 'test'"):
        vqa_data.rad(tmp_path, "test")
    for file in tmp_path.glob("*.json"):
        file.unlink()
    write_questions(tmp_path / "val.json", img_name="a.jpg", q_lang="en")
    assert vqa_data.slake(tmp_path, "validate").split == "val"
    write_questions(tmp_path / "val.json", img_name=7, q_lang="en")
    with pytest.raises(UserError, match="row 1: 'img_name' is not a text"):
        vqa_data.slake(tmp_path, "val")
    table(tmp_path, "image,question,answer", "a.jpg,what?, red ", name="train.csv")
    table(tmp_path, "image,question,answer", "a.jpg,what?,blue", name="Test.csv")
    data = vqa_data.open_dataset(str(tmp_path), "test", tasks.load("vqa"))
    assert (data.split, data.questions[0].answer) == ("test", "blue")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("image,question,answer", "a.jpg,what?"), "t.csv, line 2: the header names 3 columns, the line has 2 cells"),
        (("image,question,answer", "a.jpg,what?,"), "t.csv, line 2: column 'answer' is empty"),
        (("image,question", "a.jpg,what?"), "no column 'answer'"),
        (("image,question,answer,split", "a.jpg,what?,x,dev"), r"no split 'test'; its splits are dev \(val\)"),
    ],
)
def test_questions_in_a_faulty_table_name_the_line(tmp_path: Path, lines: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        vqa_data.open_dataset(str(table(tmp_path, *lines)), "test", tasks.load("vqa"))


def test_hidden_files_and_broken_links_are_left_out_of_every_reader(tmp_path: Path, caplog) -> None:
    hidden = ("red/.ipynb_checkpoints/0-checkpoint.jpg", "red/._0.jpg", "__MACOSX/red/0.jpg", ".thumbnails/red/1.jpg")
    write_files(tmp_path, "red/0.jpg", "blue/0.jpg", *hidden)
    (tmp_path / "red" / "gone.jpg").symlink_to(tmp_path / "annex")
    for reader in ("auto", "pictures"):
        caplog.clear()
        with caplog.at_level("INFO"):
            assert len(open_dataset(str(tmp_path), "test", reader)) == 2
        assert "left out 4 hidden files and folders" in caplog.text
        assert "left out 1 links to missing files" in caplog.text
    assert len(open_dataset(str(tmp_path / ".thumbnails"), "test", "pictures")) == 1
    (tmp_path / "red" / "0.txt").write_text("a red square")
    assert len(open_dataset(str(tmp_path / "red"), "all")) == 1


def test_shards_take_every_spelling(tmp_path: Path) -> None:
    root = write_shards(tmp_path / "s", 4, lambda i, name: name, lambda i, name: {"colour": name})
    assert len(open_dataset(str(root), "val")) == len(open_dataset(str(root), "Valid")) == 4

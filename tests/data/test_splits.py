"""The spellings of splits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bclip_fast.data import splits
from bclip_fast.data.splits import MissingSplit, by_split, resolve
from bclip_fast.errors import UserError


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("Training Testing", "train test"),  # brain tumours on Kaggle
        ("train valid", "train val"),  # CheXpert
        ("TRAIN Val TEST", "train val test"),
        ("training validation testing", "train val test"),
        ("trn dev tst", "train val test"),
        ("tr vl ts", "train val test"),
        ("seg_train seg_test", "train test"),
        ("train_set test_images valset", "train test val"),
        ("trainset testset", "train test"),
        ("imagesTr imagesTs", "train test"),
        ("train2017 val2017", "train val"),
        ("ISIC2018_Task3_Training_Input ISIC2018_Task3_Validation_Input", "train val"),
        ("train eval test", "train val test"),
        ("train val evaluation", "train val test"),
        ("train eval", "train eval"),
        ("train trainval", "train"),
    ],
)
def test_by_split_reads_usual_spellings(names: str, expected: str) -> None:
    found = by_split(names.split())
    assert [found[name] for name in names.split() if name in found] == expected.split()


@pytest.mark.parametrize("names", ["cat dog", "stress_test ecg", "pcr_test antigen_test", "tr us", "evaluation x"])
def test_by_split_leaves_classes_alone(names: str) -> None:
    assert by_split(names.split()) == {}


@pytest.mark.parametrize(
    ("split", "names", "expected"),
    [
        ("val", "train valid", "valid"),
        ("validation", "train VAL", "VAL"),
        ("Testing", "train test", "test"),
        ("eval", "train eval", "eval"),
        ("train_clean", "train train_clean", "train_clean"),
        ("mine", "Mine other", "Mine"),
    ],
)
def test_resolve_returns_the_name_in_the_data(split: str, names: str, expected: str) -> None:
    assert resolve(split, names.split(), "d") == expected


def test_resolve_names_two_spellings_and_missing_splits() -> None:
    for names in ("val valid", "train train_set", "Test test", "valid dev train"):
        split = "train" if "train_set" in names else "test" if "test" in names else "val"
        with pytest.raises(UserError, match="both mean split") as caught:
            resolve(split, names.split(), "d")
        assert not isinstance(caught.value, MissingSplit)
        assert all(repr(name) in str(caught.value) for name in names.split() if name != "train" or split == "train")
    with pytest.raises(MissingSplit, match=r"d has no split 'val'; its splits are Testing \(test\), train"):
        resolve("val", ["train", "Testing", "masks"], "d")
    with pytest.raises(UserError, match="'eval', which may mean validation or test data") as caught:
        resolve("val", ["train", "eval"], "d")
    assert not isinstance(caught.value, MissingSplit)
    # A program wrote both names, so each is itself.
    assert resolve("val", ["val", "valid"], "d", by_program=True) == "val"


def test_documented_spellings_are_those_of_the_code() -> None:
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (train|val|test) \| (.*?) \| (.*?) \|$", text, re.MULTILINE)
    documented = {split: (tuple(re.findall(r"`(.*?)`", full)), tuple(re.findall(r"`(.*?)`", short)))
                  for split, full, short in rows}  # fmt: skip
    assert documented == {split: (splits.SPELLINGS[split], splits.SHORT[split]) for split in splits.SPELLINGS}
    for word in (*splits.EITHER, *splits.ENDINGS):
        assert f"`{word}`" in text

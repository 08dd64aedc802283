"""Labels in doubt: classes that look alike, classes in one cell, and images with two labels."""

from __future__ import annotations

from pathlib import Path

import pytest
from colours import COLOURS, assert_refused, evaluate_with, jpeg

from bclip_fast.eval import EvalConfig
from bclip_fast.eval.labels import look_alike


def write(folder: Path, *labels: str, header: str = "path,label") -> Path:
    rows = [f"{i}.jpg,{label}" for i, label in enumerate(labels)]
    for i in range(len(labels)):
        (folder / f"{i}.jpg").write_bytes(jpeg(COLOURS["red"]))
    (folder / "t.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder / "t.csv"


def classes(table: Path, **options: object) -> list[str]:
    config = EvalConfig(data=str(table), task=("zero_shot",), progress=False, cache="none", **options)  # type: ignore[arg-type]
    return evaluate_with(config)["tasks"]["zero_shot/label"]["classes"]


@pytest.mark.parametrize(
    ("labels", "expected", "said"),
    [
        ((" cat", "cat", "dog", "dog "), ["cat", "dog"], "removed spaces around 2 names and cells"),
        (("Cat", "cat", "dog"), ["Cat", "cat", "dog"], "the classes 'Cat', 'cat' differ only in case"),
        (("1", "1.0", "01", "2"), ["01", "1", "1.0", "2"], "the classes '01', '1', '1.0' differ only"),
        (("lung\u00a0cyst", "lung cyst", "x"), ["lung cyst", "lung\u00a0cyst", "x"], "differ only in case, spaces"),
        (("0", "1"), ["0", "1"], "the prompts are the numbers 0, 1"),
        (("a", "", "b"), ["a", "b"], "1 of 3 samples have no label and are left out"),
    ],
)
def test_classes_that_look_alike_are_kept_and_named(
    tmp_path: Path, caplog, labels: tuple[str, ...], expected: list[str], said: str
) -> None:
    assert classes(write(tmp_path, *labels)) == expected
    assert said in caplog.text


def test_labels_that_contradict_are_errors(tmp_path: Path) -> None:
    for joined in ("a|b", "a; b", '"a, b"'):
        assert_refused(write(tmp_path, "a", "b", joined), "joins classes that are also labels.*multi_label = true")
    table = write(tmp_path, "a", "b")
    table.write_text(table.read_text() + "0.jpg,b\n")
    assert_refused(table, "lines 2 and 4 give 0.jpg the labels 'a' and 'b' in column 'label'")
    (tmp_path / "p.toml").write_text('[classes]\nCat = "a cat"\ndog = "a dog"\n')
    table = write(tmp_path, "cat", "dog")
    assert_refused(table, "'cat' and 'Cat' differ only in case", task=("zero_shot",), prompts=str(tmp_path / "p.toml"))
    assert look_alike("dog", ["cat"]) == ""


def test_multi_label_cells_are_separated_by_bars(tmp_path: Path) -> None:
    task = tmp_path / "t.toml"
    task.write_text('title = "x"\nprotocol = "zero_shot"\nlabel = "label"\nmulti_label = true\n')
    options = {"task": (str(task),), "cache": "none"}
    table = write(tmp_path, "a", "b", "a | b")
    result = evaluate_with(EvalConfig(data=str(table), progress=False, **options))["tasks"]["t"]  # type: ignore[arg-type]
    assert result["samples"]["label"] == ["a", "b", "a|b"]
    assert_refused(write(tmp_path, "a", "b", "a;b"), r"separate classes by '\|'", **options)

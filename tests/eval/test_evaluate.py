"""`evaluate` and `bclip eval`: data sets, tasks and settings together, and the errors for wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from colours import COLOURS, ColourModel, assert_refused, evaluate_with, jpeg, write_class_folders
from damage import flip_bit

from bclip_fast import config as configuration
from bclip_fast.data.image_files import read_rgb
from bclip_fast.errors import UserError
from bclip_fast.eval import EvalCommand, EvalConfig, run
from bclip_fast.eval.datasets import open_dataset


def test_evaluate_shards_gives_retrieval_and_zero_shot(shards: Path) -> None:
    config = EvalConfig(
        data=str(shards), task=("retrieval", "zero_shot"), label=("colour",), progress=False, batch_size=6
    )
    results = evaluate_with(config)
    json.dumps(results, allow_nan=False)
    assert set(results["tasks"]) == {"retrieval", "zero_shot/colour"}
    colour = results["tasks"]["zero_shot/colour"]
    assert colour["classes"] == sorted(COLOURS)
    assert colour["figures"][0]["value"] == 1
    assert colour["figures"][0]["chance"] == 0.25
    assert results["tasks"]["retrieval"]["task"]["data"]["fingerprint"] == open_dataset(str(shards), "val").fingerprint
    assert results["model"]["logit_scale"] == pytest.approx(10)
    result = results["tasks"]["retrieval"]
    # There are 20 pairs of 4 colours with 3 captions each, so 5 images match the colour of a caption.
    assert result["num_distinct_captions"] == 12
    assert result["figures"][5]["name"] == "text to image R@5"
    assert result["figures"][5]["value"] > 0.9
    assert result["figures"][5]["chance"] == pytest.approx(0.25)


def test_evaluate_samples_without_label_are_counted_and_left_out(shards: Path, tmp_path: Path) -> None:
    file = tmp_path / "halves.toml"
    file.write_text('[classes]\ndark = "red"\nlight = "blue"\n')
    config = EvalConfig(data=str(shards), task=("zero_shot",), label=("half",), prompts=str(file), progress=False)
    result = evaluate_with(config)["tasks"]["zero_shot/half"]
    assert result["num_samples"] == 5
    assert result["num_without_label"] == 15


def test_evaluate_folder_and_csv_agree(folder: Path, tmp_path: Path) -> None:
    lines = ["path,colour,split"]
    lines += [f"folder/test/{name}/{i}.jpg,{name},mine" for name in ("blue", "red") for i in range(3)]
    table = tmp_path / "table.csv"
    table.write_text("\n".join([*lines, "folder/none.jpg,red,other"]) + "\n")
    by_folder = evaluate_with(EvalConfig(data=str(folder), split="test", progress=False))
    by_csv = evaluate_with(EvalConfig(data=str(table), split="mine", progress=False))
    first, second = by_folder["tasks"]["zero_shot/class"], by_csv["tasks"]["zero_shot/colour"]
    assert first["confusion"] == second["confusion"] == [[3, 0], [0, 3]]


def test_evaluate_csv_with_captions_gives_retrieval(folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text('path,caption\nfolder/test/red/0.jpg,"red, plain"\nfolder/test/blue/0.jpg,blue\n')
    result = evaluate_with(EvalConfig(data=str(table), progress=False))
    assert set(result["tasks"]) == {"retrieval"}
    assert result["tasks"]["retrieval"]["figures"][0]["value"] == 1


def test_evaluate_nan_logit_scale_raises(folder: Path) -> None:
    model = ColourModel()
    model.logit_scale.data.fill_(torch.nan)
    with pytest.raises(UserError, match="logit_scale is nan"):
        evaluate_with(EvalConfig(data=str(folder), split="test", progress=False), model)


def test_evaluate_wrong_data_or_setting_raises_one_line(shards: Path, folder: Path, tmp_path: Path) -> None:
    assert_refused(tmp_path / "nothing", "does not exist")
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "empty", "neither shards")
    (tmp_path / "hollow" / "red").mkdir(parents=True)
    assert_refused(tmp_path / "hollow", "holds no image")
    assert_refused(shards, "no split 'tset'.*val", split="tset")
    assert_refused(folder, "no split 'val'.*test, train", split="val")
    assert_refused(folder, "needs captions", split="test", task=("retrieval",))
    assert_refused(folder, "'colour' is unknown", split="test", label=("colour",))
    assert_refused(shards, "'color' is in no sample.*colour", task=("zero_shot",), label=("color",))
    assert_refused(shards, "needs --label.*colour", task=("zero_shot",))
    assert_refused(shards, "'CC0' is the only class", task=("zero_shot",), label=("licence",))
    assert_refused(shards, "no class 'blue'", task=("zero_shot",), label=("colour",), prompts="pcam")
    assert_refused(shards, "unknown task 'retreival'", task=("retreival",))
    assert_refused(shards, "device 'gpu' cannot be used", device="gpu")
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "my.toml").write_text('title = "My"\nprotocol = "retrieval"\n')
    assert_refused(
        shards, "two tasks have the name 'my'", task=tuple(str(tmp_path / x / "my.toml") for x in ("one", "two"))
    )
    (tmp_path / "notes.txt").write_text("x")
    assert_refused(tmp_path / "notes.txt", "not a .csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column 'path'"),
        ("path,label\n", "has no row"),
        ("path,label\na.jpg\n", "line 2: the header names 2 columns"),
        ("path,label\na.jpg,x,y\n", "line 2: the header names 2 columns"),
        ("path,label\n,x\n", "line 2: column 'path' is empty"),
        ("path,label,split\na.jpg,x,train\n", "no split 'val'.*train"),
        ("path,label\na.jpg,x\nb.jpg,y\n", "a.jpg, named in .* cannot be read: No such file"),
        ("path,caption\na.jpg, \n", "line 2: the caption is empty"),
        ('path,label\n"a.jpg,x\n', "not a CSV file"),
    ],
)
def test_evaluate_invalid_csv_names_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    assert_refused(tmp_path / "t.csv", message)


@pytest.mark.parametrize("content", [b"", b"not an image", jpeg((9, 9, 9), 64)[:300]])
def test_evaluate_damaged_image_error_names_it(folder: Path, content: bytes) -> None:
    (folder / "test" / "red" / "1.jpg").write_bytes(content)
    assert_refused(folder, "image red/1.jpg cannot be decoded", split="test")


def test_read_rgb_too_many_pixels_raises_before_decoding() -> None:
    header = bytearray(jpeg((1, 2, 3)))
    at = header.index(b"\xff\xc0") + 5
    header[at : at + 4] = b"\x75\x30\x75\x30"
    with pytest.raises(UserError, match=r"bomb.jpg.*(too many pixels|exceeds limit)"):
        read_rgb(bytes(header), lambda: "bomb.jpg")


def test_command_repeated_flags_are_collected() -> None:
    command = configuration.parse(
        EvalCommand,
        ["runs/x", "--data", "d", "--task", "retrieval", "--task", "zero_shot", "--label", "plane", "--split", "test"],
        prog="bclip eval",
    )
    assert (command.model, command.data, command.split) == ("runs/x", "d", "test")
    assert command.task == ("retrieval", "zero_shot")
    assert command.label == ("plane",)


def test_command_default_data_is_the_runs_shards(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a run folder.*--data"):
        run(EvalCommand(model=str(tmp_path)))
    (tmp_path / "config.toml").write_text('[data]\nshards = "/nowhere/shards"\n')
    with pytest.raises(UserError, match="/nowhere/shards"):
        run(EvalCommand(model=str(tmp_path)))


@pytest.mark.parametrize("cache", ["none", "kept"])
def test_evaluate_skipped_image_counts_nowhere_and_is_named(folder: Path, tmp_path: Path, cache: str, caplog) -> None:
    (folder / "test" / "red" / "1.jpg").write_bytes(jpeg((200, 0, 0))[:100])
    settings = {"data": str(folder), "split": "test", "task": ("zero_shot",), "progress": False}
    settings["cache"] = cache if cache == "none" else str(tmp_path / cache)
    for _ in range(2):  # the second evaluation reads the cache
        caplog.clear()
        results = evaluate_with(EvalConfig(**settings, on_bad_image="skip"))
        result = results["tasks"]["zero_shot/class"]
        assert result["confusion"] == [[3, 0], [0, 2]]
        assert list(result["skipped_images"]) == ["red/1.jpg"]
        assert "cannot be decoded" in result["skipped_images"]["red/1.jpg"]
        assert "red/1.jpg" not in result["samples"]["key"]
        assert "skipped 1 of 6 images" in caplog.text
        with pytest.raises(UserError, match="image red/1.jpg cannot be decoded"):
            evaluate_with(EvalConfig(**settings))


@pytest.mark.parametrize("member", ["jpg", "txt", "json"])
def test_evaluate_leaves_out_a_damaged_sample_of_shards(shards: Path, member: str, caplog) -> None:
    """One bit of image, caption or metadata. Without checksums, it counts."""
    shard = next(shards.glob("*-000000.tar")).stem
    name = flip_bit(shards, member, shard)
    settings = {"data": str(shards), "split": shard.split("-")[0], "progress": False}
    results = evaluate_with(EvalConfig(**settings, on_bad_image="skip"))["tasks"]
    assert "retrieval" in results
    for result in results.values():
        [(key, reason)] = result["skipped_images"].items()
        assert f"{key}.{member}" == name
        assert f"{name} is damaged: its CRC-32C is " in reason
        assert key not in result["samples"]["key"]
    with pytest.raises(UserError, match=f"{name} is damaged"):
        evaluate_with(EvalConfig(**settings, task=("retrieval",)))


def test_evaluate_probe_names_skipped_images_of_every_split(tmp_path: Path) -> None:
    folder = write_class_folders(tmp_path / "folder", {"train": 4, "val": 2, "test": 3})
    for split in ("train", "val", "test"):
        (folder / split / "red" / "0.jpg").write_bytes(b"none")
    config = EvalConfig(data=str(folder), split="test", task=("probe",), progress=False, on_bad_image="skip")
    result = evaluate_with(config)["tasks"]["probe"]
    assert list(result["skipped_images"]) == ["red/0.jpg", "train/red/0.jpg", "val/red/0.jpg"]
    for path in (folder / "val").rglob("*.jpg"):
        path.write_bytes(b"none")
    with pytest.raises(UserError, match="none of 4 images can be decoded"):
        evaluate_with(config)


def test_evaluate_counts_every_sample_of_a_skipped_image(tmp_path: Path, caplog) -> None:
    for name in ("red", "blue"):
        (tmp_path / f"{name}.jpg").write_bytes(jpeg(COLOURS[name]))
    (tmp_path / "bad.jpg").write_bytes(b"none")
    rows = "red.jpg,a red one\nblue.jpg,a blue one\nbad.jpg,a red one\nbad.jpg,a blue one\n"
    (tmp_path / "data.csv").write_text("path,caption\n" + rows)
    config = EvalConfig(data=str(tmp_path / "data.csv"), task=("retrieval",), progress=False, on_bad_image="skip")
    assert evaluate_with(config)["tasks"]["retrieval"]["num_samples"] == 2
    assert "skipped 2 of 4 images" in caplog.text


def test_evaluate_without_readable_image_raises(folder: Path) -> None:
    for path in (folder / "test").rglob("*.jpg"):
        path.write_bytes(b"none")
    with pytest.raises(UserError, match="none of 6 images can be decoded"):
        evaluate_with(EvalConfig(data=str(folder), split="test", progress=False, on_bad_image="skip"))

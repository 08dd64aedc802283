"""Tests of `bclip tune`."""

from __future__ import annotations

from pathlib import Path

import pytest
from records import GELU, half_off, keep, make_record

from bclip_fast import tune
from bclip_fast.doctor import backends as doctor
from bclip_fast.errors import UserError
from bclip_fast.ops import fingerprint, record_files, tuning

pytestmark = pytest.mark.usefixtures("fresh_records")


def test_run_saves_and_prints_record(triton_gelu, capsys, caplog):
    triton_gelu.forward = half_off
    tune.run(tune.TuneConfig(operators=("gelu",), seconds=0.001))
    path = tuning.path_for(fingerprint.fingerprint("cpu"))
    record = record_files.load(path)
    assert record.fingerprint == fingerprint.fingerprint("cpu") and record.made
    assert {key[0] for key in record.entries} == {"gelu"} and len(record.entries) == 4
    assert (
        record.checks["gelu", "float32", "cpu"] == "" and "relative error" in record.checks["gelu", "float32", "triton"]
    )
    for (_, dtype, _), entry in record.entries.items():
        # In bfloat16, the kernel's error is smaller than the rounding.
        correct = {"cpu", "torch", "reference"} | ({"triton"} if dtype != "float32" else set())
        assert set(entry.order) == set(entry.ms) == correct and all(ms > 0 for ms in entry.ms.values())
    assert "fails its check with the backend triton" in caplog.text
    out = capsys.readouterr().out
    assert "ours / torch" in out and str(path) in out
    assert "It replaces the package's order, which nobody has measured on " in out
    tuning.reset()
    assert tuning.of_device("cpu").origin == "this machine's record"
    text = "\n".join(doctor.lines())
    assert "by this machine's record" in text and str(path) in text and "today" in text
    assert " ms, " in text


def test_run_some_operators_keeps_entries_of_others(caplog):
    keep(make_record("reference", "cpu"))
    tune.run(tune.TuneConfig(operators=("add_norm",), seconds=0.001))
    entries = record_files.load(tuning.path_for(fingerprint.fingerprint("cpu"))).entries
    assert entries[GELU].order == ("reference", "cpu")
    assert {key[0] for key in entries} == {"gelu", "add_norm"}


def test_run_record_of_another_version_is_refused(tmp_path):
    record_files.save(make_record("cpu", torch="1.0"), tmp_path / "old.json")
    with pytest.raises(UserError, match=r"old\.json is of another device or version \(torch 1\.0 / "):
        tune.run(tune.TuneConfig(operators=("gelu",), seconds=0.001, out=tmp_path / "old.json"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"operators": ("gelo",)}, "'gelo' is unknown; did you mean gelu"),
        ({"seconds": 0.0}, "seconds=0.0 must be a finite number above 0"),
        ({"seconds": float("inf")}, "seconds=inf must be a finite number above 0"),
    ],
)
def test_config_bad_field_is_named(options, words):
    with pytest.raises(UserError, match=words):
        tune.TuneConfig(**options)


def damaged_record(folder: Path) -> Path:
    (folder / "damaged.json").write_text("{")
    return folder / "damaged.json"


def path_below_file(folder: Path) -> Path:
    (folder / "file").touch()
    return folder / "file" / "record.json"


@pytest.mark.parametrize(
    ("destination", "words"),
    [
        (lambda folder: folder, "cannot be read: Is a directory"),
        (path_below_file, "cannot be written: .*; --out names another file"),
        (damaged_record, "is damaged: .*; measure all operators, or delete the file"),
    ],
)
def test_run_bad_destination_is_refused_before_measuring(destination, words, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "measure", lambda *args: pytest.fail("measured first"))
    with pytest.raises(UserError, match=words):
        tune.run(tune.TuneConfig(operators=("gelu",), out=destination(tmp_path)))


def test_run_all_operators_into_directory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "measure", lambda *args: pytest.fail("measured first"))
    with pytest.raises(UserError, match="cannot be written: it is a directory"):
        tune.run(tune.TuneConfig(out=tmp_path))


def test_run_without_home_names_variable_to_set(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("BCLIP_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(UserError, match="no home directory: set BCLIP_CACHE or --out"):
        tune.run(tune.TuneConfig(operators=("gelu",)))


def test_ranked_equal_times_keep_package_order():
    assert tune.ranked({"reference": 1.0, "cpu": 1.04, "torch": 1.2}) == ("cpu", "reference", "torch")
    assert tune.ranked({"reference": 1.0, "cpu": 1.06}) == ("reference", "cpu")

"""`bclip eval suite`: several models, resumed after a kill, failures listed, and the page in a browser."""

from __future__ import annotations

import csv
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmark_data import bench_rows, hash_model, write_dad, write_ham10000, write_microbench, write_pcam
from browser import Browser, check_drawn, check_keyboard

from bclip_fast.errors import UserError
from bclip_fast.eval import leaderboard, suites, yardstick_metrics
from bclip_fast.eval.leaderboard import SuiteCommand

EVALUATE = importlib.import_module("bclip_fast.eval.evaluate")
NAMES = ["first", "second", "third & <b>last</b>"]


@pytest.fixture(scope="module", autouse=True)
def _few_draws() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yardstick_metrics, "NUM_DRAWS", 200)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rows")
    write_pcam(root / "pcam", 12)
    write_ham10000(root / "ham10000", 14)
    write_dad(root / "dad", 8)
    write_microbench(root / "ubench", bench_rows("jung_et_al_2022", 6) + bench_rows("kather_et_al_2016", 5))
    return root


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Models by name: their number decides their weights. `broken` cannot be loaded."""
    names: list[str] = []

    def load(name: str, device: object) -> Any:
        names.append(name)
        if name == "broken":
            raise UserError("broken holds no weights")
        if name == "memory":
            raise RuntimeError("out of memory\nmore lines")
        return hash_model(len(name))

    monkeypatch.setattr(EVALUATE, "load_model", load)
    return names


def run(folder: Path, out: Path, models: list[str], **settings: Any) -> int:
    shared = {"cache": "none", "progress": False} | settings
    return leaderboard.run(SuiteCommand(models=",".join(models), data=str(folder), out=str(out), **shared))


def table(out: Path) -> list[dict[str, str]]:
    with (out / "leaderboard.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_leaderboard_lists_models_failures_and_paired_differences(
    folder: Path, tmp_path: Path, loaded: list[str]
) -> None:
    assert run(folder, tmp_path, [NAMES[0], "broken", *NAMES[1:], "memory"]) == 0
    rows = table(tmp_path)
    overall = {row["model"]: float(row["auc"]) for row in rows if row["name"] == "OVERALL_SPECIALTY_MACRO"}
    assert sorted(overall) == sorted(NAMES)
    assert list(overall.values()) == sorted(overall.values(), reverse=True)
    failed = {row["model"]: row["error"] for row in rows if row["kind"] == "failed"}
    assert failed == {"broken": "broken holds no weights", "memory": "out of memory"}
    assert {row["name"] for row in rows if row["kind"] == "row"} == {
        "PCAM", "HAM10000", "DAD", "jung_et_al_2022", "kather_et_al_2016",
    }  # fmt: skip
    page = (tmp_path / "leaderboard.html").read_text()
    assert "broken holds no weights" in page and "out of memory" in page and "<b>last" not in page
    assert "Rows that a model lacks, which the means leave out: BreastMNIST, ChestMNIST" in page
    pcam = {row["model"]: float(row["auc"]) for row in rows if row["name"] == "PCAM"}
    for model in NAMES:
        content = json.loads(next(path for path in results_of(tmp_path) if named(path) == model).read_text())
        assert pcam[model] == content["tasks"]["medpmc_pcam"]["medpmc"]["auc"]


def results_of(out: Path) -> list[Path]:
    return sorted((out / "models").glob("*/results.json"))


def named(path: Path) -> str:
    return json.loads(path.read_text())["model"]["path"]


def test_leaderboard_difference_of_a_model_and_itself_is_exactly_zero(
    folder: Path, tmp_path: Path, loaded: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run(folder, tmp_path, ["same", "twin"])  # equal lengths, hence equal weights
    assert "the means cover 5 of 26 rows" in " ".join(capsys.readouterr().out.split())
    page = (tmp_path / "leaderboard.html").read_text()
    assert "+0.0 (+0.0 to +0.0)" in page


def test_leaderboard_continues_with_missing_models_and_changed_data(
    folder: Path, tmp_path: Path, loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(folder, tmp_path, ["one"])
    before = {path: path.stat().st_mtime_ns for path in results_of(tmp_path)}
    run(folder, tmp_path, ["one", "three"])
    assert loaded == ["one", "three"]
    assert before.items() <= {path: path.stat().st_mtime_ns for path in results_of(tmp_path)}.items()
    run(folder, tmp_path, ["one"], batch_size=3)  # changes nothing but the speed
    assert loaded == ["one", "three"]
    run(folder, tmp_path, ["one"], image_conversion="open_clip")
    assert loaded == ["one", "three", "one"]
    # Without models and data, the page comes from the kept scores alone.
    for name in ("leaderboard.html", "leaderboard.csv"):
        (tmp_path / name).rename(tmp_path / f"old_{name}")
    assert leaderboard.run(SuiteCommand(out=str(tmp_path))) == 0
    assert (tmp_path / "leaderboard.csv").read_bytes() == (tmp_path / "old_leaderboard.csv").read_bytes()
    (results_of(tmp_path)[0]).write_text("{")
    run(folder, tmp_path, ["one"])
    assert loaded[-1] == "one"


@pytest.mark.parametrize("name", ["eval/model", "lr=0.1/model", "model", "bmc=model", "open_clip:RN50/model/weights"])
def test_leaderboard_notices_a_changed_local_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    weights = Path(name.removeprefix("bmc=").removeprefix("open_clip:RN50/").removesuffix("/weights"), "weights")
    weights.parent.mkdir(parents=True)
    weights.write_text("old")
    before = leaderboard._state_of(name)
    (weights.parent / "eval").mkdir()
    (weights.parent / "eval" / "results.json").write_text("{}")
    assert leaderboard._state_of(name) == before
    weights.write_text("newer")
    assert leaderboard._state_of(name) != before
    assert leaderboard._state_of("bmc") == []


def test_leaderboard_measures_again_with_changed_prompts(
    folder: Path, tmp_path: Path, loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (suites.FOLDER.parent / "tasks" / "medpmc_pcam.toml").read_text()
    task = tmp_path / "mine.toml"
    suite = tmp_path / "suite.toml"
    suite.write_text(f'title = "t"\nsource = "s"\ntasks = ["{task}"]\n')
    for text in (source, source.replace("normal", "healthy")):
        task.write_text(text)
        run(folder, tmp_path / "out", ["one"], suite=str(suite))
    assert "healthy" in task.read_text()
    assert loaded == ["one", "one"]


@pytest.mark.parametrize("entries", ["5", '"abc"', "{}", "[]", "[1]"])
def test_suite_file_with_a_wrong_list_of_tasks_is_refused(entries: str, tmp_path: Path) -> None:
    (tmp_path / "suite.toml").write_text(f'title = "t"\nsource = "s"\ntasks = {entries}\n')
    with pytest.raises(UserError, match="must hold title, source and a list of tasks"):
        suites.load(str(tmp_path / "suite.toml"))


def test_leaderboard_killed_while_it_writes_continues_without_loss(
    folder: Path, tmp_path: Path, loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between two renames leaves finished files, which the next run moves into place."""
    run(folder, tmp_path, ["one"])
    place = results_of(tmp_path)[0].parent
    expected = {path.relative_to(place): path.read_bytes() for path in place.rglob("*") if path.is_file()}
    finished = place / ".files.written"
    finished.mkdir()
    (place / "results.json").rename(finished / "results.json")
    run(folder, tmp_path, ["one"])
    assert loaded == ["one"]
    assert {path.relative_to(place): path.read_bytes() for path in place.rglob("*") if path.is_file()} == expected


def test_leaderboard_takes_evaluations_made_elsewhere_and_refuses_other_data(
    folder: Path, tmp_path: Path, loaded: list[str]
) -> None:
    run(folder, tmp_path / "a", ["one"])
    run(folder, tmp_path / "b", ["three"])
    other = results_of(tmp_path / "b")[0].parent
    assert leaderboard.run(SuiteCommand(evaluations=(str(other),), out=str(tmp_path / "a"))) == 0
    assert {row["model"] for row in table(tmp_path / "a")} == {"one", "three"}
    content = json.loads((other / "results.json").read_text())
    content["tasks"]["medpmc_dad"]["task"]["data"]["fingerprint"] = "x"
    (other / "results.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="row DAD: one was measured on other data than three|three .* than one"):
        leaderboard.run(SuiteCommand(evaluations=(str(other),), out=str(tmp_path / "a")))


def test_leaderboard_bad_arguments_raise(folder: Path, tmp_path: Path, loaded: list[str]) -> None:
    with pytest.raises(UserError, match="holds no evaluation; pass --models and --data"):
        leaderboard.run(SuiteCommand(out=str(tmp_path)))
    with pytest.raises(UserError, match="names 'a' twice"):
        SuiteCommand(models="a, a", data="x")
    with pytest.raises(UserError, match="models need --data"):
        SuiteCommand(models="a")
    assert run(folder, tmp_path, ["broken"]) == 1
    assert [row["kind"] for row in table(tmp_path)] == ["failed"]


def test_leaderboard_page_in_chromium_is_drawn_light_and_dark(folder: Path, tmp_path: Path, loaded: list[str]) -> None:
    """Three models and a failure, in a narrow and a wide window."""
    run(folder, tmp_path, [*NAMES, "broken"])
    with Browser() as browser:
        light, dark = check_drawn(browser, (tmp_path / "leaderboard.html").as_uri(), tmp_path)
        assert browser.ask("document.querySelectorAll('.chart circle').length") == 3
        assert browser.ask("document.querySelectorAll('details[open] table').length") == 2
        names = [control["name"] for control in check_keyboard(browser)]
    assert light.shape[1] == dark.shape[1] and not np.array_equal(light[:50, :50], dark[:50, :50])
    assert "accuracy" in names and "AUC" in names

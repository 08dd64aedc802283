"""Files that an earlier version wrote still load, resume, verify and give the numbers recorded with them.

`write.py` made the folders of SETS and describes them. Everything here goes through commands, so the tests don't depend
on the names of modules. The numbers may differ by 1e-5 of their value, since processors round differently.
"""

from __future__ import annotations

import ast
import csv
import filecmp
import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bclip_fast
from bclip_fast.cli import main

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the recorded numbers are those of a CPU")

SETS = ["written"]
PRECISION = 1e-5


@pytest.fixture(params=SETS)
def before(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of a set as the current folder, with one thread."""
    folder = tmp_path / "before"
    shutil.copytree(Path(__file__).parent / request.param, folder)
    for path in folder.rglob("*"):
        if path.suffix in (".json", ".jsonl", ".toml", ".html") and b"@HERE@" in (content := path.read_bytes()):
            path.write_bytes(content.replace(b"@HERE@", str(folder).encode()))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "160")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield folder
    torch.set_num_threads(threads)


@pytest.fixture
def bclip(capsys: pytest.CaptureFixture[str], before: Path) -> Iterator[Callable[..., str]]:
    """Runs a command in the copy, checks its exit status and returns the text that it printed and logged."""
    logger = logging.getLogger("bclip_fast")
    log = logger.handlers[:], logger.level, logger.propagate

    def run(name: str, *arguments: str, status: int = 0) -> str:
        capsys.readouterr()
        assert main([*name.split(), *arguments]) == status, capsys.readouterr().err
        printed = capsys.readouterr()
        return printed.out + printed.err

    yield run
    logger.handlers[:], logger.level, logger.propagate = log


def expected(name: str) -> Any:
    return json.loads(Path("expected.json").read_text())[name]


def lines_of(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def losses(run: str) -> dict[int, float]:
    """The loss of each step. No step occurs twice."""
    records = [line for line in lines_of(f"{run}/metrics.jsonl") if "loss" in line]
    assert len({line["step"] for line in records}) == len(records)
    return {line["step"]: line["loss"] for line in records}


def norms(run: str) -> dict[str, float]:
    """The norm of every tensor in the checkpoint of step 4: weights, moments and EMA."""
    from safetensors.torch import load_file

    files = sorted(Path(run, "checkpoints", "step-00000004").glob("*.safetensors"))
    tensors = {f"{path.stem} {name}": tensor for path in files for name, tensor in load_file(path).items()}
    return {name: float(tensor.double().norm()) for name, tensor in tensors.items()}


def figures(evaluation: str) -> dict[str, float]:
    tasks = json.loads(Path(evaluation, "results.json").read_text())["tasks"]
    return {f"{task} {each['name']}": each["value"] for task, result in tasks.items() for each in result["figures"]}


def assert_recorded(now: str, then: str) -> None:
    """Assert that an evaluation has every figure of an earlier one. Later versions may add figures."""
    new, recorded = figures(now), figures(then)
    assert {name: new.get(name) for name in recorded} == pytest.approx(recorded, abs=1e-4)


# Datasets


@pytest.mark.parametrize("dataset", ["shards", "ingest"])
def test_earlier_shards_pass_verification(bclip, dataset: str):
    bclip("ingest verify", dataset)


@pytest.mark.parametrize("name, done", [("interrupted", "3 of 6"), ("planned", "")])
def test_interrupted_build_finishes_to_the_same_bytes(bclip, name: str, done: str):
    import pyarrow.parquet as pq

    flags = ("--workers", "1", "--val_fraction", "0.2", "--test_fraction", "0.2", "--seed", "5")
    kept = {path.name: path.stat().st_mtime_ns for path in Path(f".{name}.partial").glob("train-*.tar")}
    logged = bclip("ingest build", "articles", "-o", name, *flags, "--allow_changes")
    assert done in logged and not Path(f".{name}.partial").exists()
    assert all(Path(name, file).stat().st_mtime_ns == time for file, time in kept.items())
    assert bool(kept) == (name == "planned")
    assert {path.name for path in Path(name).iterdir()} == {path.name for path in Path("ingest").iterdir()}
    bclip("ingest verify", "ingest", "--add_checksums")
    exact = [path.name for path in Path("ingest").iterdir() if path.suffix != ".parquet"]
    assert filecmp.cmpfiles("ingest", name, exact, shallow=False)[0] == exact
    for file in ("manifest.parquet", "rejects.parquet"):
        earlier = pq.read_table(Path("ingest", file))
        # Later versions may add columns.
        assert pq.read_table(Path(name, file)).select(earlier.column_names).equals(earlier)
    bclip("ingest verify", name)


def test_interrupted_build_of_other_settings_begins_again(bclip):
    bclip("ingest build", "articles", "-o", "interrupted", "--workers", "1", "--val_fraction", "0.2")
    assert "interrupted: " in bclip("ingest verify", "interrupted")
    assert json.loads(Path("interrupted/dataset.json").read_text())["ingest"]["config"]["seed"] == 0


def test_reports_show_earlier_files(bclip):
    bclip("ingest report", "ingest")
    bclip("train report", "train_ddp", "train_zero1", "train_accumulated", "--out", "train.html")
    page = Path("train.html").read_text()
    assert all(name in page for name in ("train_ddp", "train_zero1", "train_accumulated"))


# Training


def assert_same_norms(current: dict[str, float], recorded: dict[str, float]) -> None:
    """A key's bias adds the same number to all scores of a query, so its gradient is rounding errors.

    Adam makes steps of the learning rate from them, in another direction on another processor.
    """
    assert current.keys() == recorded.keys()
    for name, value in recorded.items():
        assert current[name] == pytest.approx(value, rel=2e-2 if name.endswith("qkv.bias") else 1e-4, abs=1e-6), name


@pytest.mark.parametrize("run", ["train_ddp", "train_zero1", "train_accumulated"])
def test_run_resumes_to_the_recorded_losses(bclip, run: str):
    recorded = dict(enumerate(expected(run)["losses"], 1))
    validated = [line for line in lines_of(f"{run}/metrics.jsonl") if "loss" not in line]
    logged = bclip("train", f"{run}/config.toml", "--resume")
    assert "resuming after step 2" in logged and "is not used" not in logged
    assert losses(run) == pytest.approx(recorded, rel=PRECISION)
    assert_same_norms(norms(run), expected(run)["norms"])
    assert {path.name for path in Path(run, "checkpoints").iterdir()} == {"step-00000002", "step-00000004"}
    again = [line for line in lines_of(f"{run}/metrics.jsonl") if "loss" not in line]
    assert len(again) == len(validated) == (4 if run == "train_accumulated" else 0)
    for one, two in zip(validated, again, strict=True):
        assert one.keys() == two.keys()
    bclip("export", run, "--out", "step2", "--step", "2")
    bclip_fast.load("step2")


def test_run_resumes_under_another_engine(bclip):
    flags = ("--engine.name", "deepspeed", "--engine.zero_stage", "3")
    bclip("train", "train_ddp/config.toml", "--resume", *flags)
    assert losses("train_ddp") == pytest.approx(dict(enumerate(expected("train_ddp")["losses"], 1)), rel=PRECISION)


def test_dumped_step_replays(bclip):
    """On another processor the last bits may differ, and the command then exits with 1."""
    (dump,) = Path("given_up/dumps").iterdir()
    try:
        logged = bclip("train replay", str(dump))
    except AssertionError as error:
        logged = str(error)
    pairs = re.findall(r"(loss|grad_norm) (\S+) in the run, (\S+) computed again", logged)
    assert [name for name, _, _ in pairs] == ["loss", "grad_norm"], logged
    for _, one, two in pairs:
        assert ast.literal_eval(two) == pytest.approx(ast.literal_eval(one), rel=PRECISION)


@pytest.mark.parametrize("run", ["pairs", "answers"])
def test_finetuning_resumes_to_the_recorded_losses(bclip, run: str):
    bclip("finetune", *_finetune_flags(run), "--resume")
    assert losses(run) == pytest.approx(dict(enumerate(expected(run)["losses"], 1)), rel=PRECISION)
    assert_same_norms(norms(run), expected(run)["norms"])
    flags = EVAL if run == "pairs" else EVAL_ANSWERS
    bclip("eval", run, "--out", "again", "--cache", "none", *flags)
    assert_recorded("again", f"evaluated_{run}")


def _finetune_flags(run: str) -> list[str]:
    """The command line of a fine-tuning run, from its config.toml, because a file cannot hold a positional argument."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    settings = tomllib.loads(Path(run, "config.toml").read_text())
    flags = [settings.pop("model")]
    for key, value in settings.items():
        for name, item in value.items() if isinstance(value, dict) else [("", value)]:
            flag = f"{key}.{name}" if name else key
            if isinstance(item, bool):
                flags += [f"--{flag}"] if item else []
            elif isinstance(item, list):
                flags += [f"--{flag}", *map(str, item)]
            else:
                flags.append(f"--{flag}={item}")
    return flags


# Models, evaluations, indexes


@pytest.mark.parametrize("model", ["exported", "train_ddp", "train_accumulated/model_ema", "answers_finished"])
def test_model_loads_in_python(before: Path, model: str):
    clip, preprocess, tokenizer = bclip_fast.load(model)
    with torch.no_grad():
        assert clip.encode_text(tokenizer(["a red square"])).shape == (1, 12)
    assert preprocess is not None


EVAL = (
    *("--data", "tables/pairs.csv", "--task", "retrieval", "--task", "zero_shot", "--task", "probe"),
    *("--label", "colour", "--share", "1.0", "--num_seeds", "1", "--split", "test", "--num_workers", "1"),
    *("--no_progress", "--device", "cpu"),
)
EVAL_ANSWERS = (
    *("--data", "tables/questions.csv", "--split", "train", "--task", "vqa", "--num_workers", "1"),
    *("--no_progress", "--device", "cpu"),
)


def test_evaluation_gives_the_recorded_numbers(bclip):
    for model in ("train_ddp", "exported"):
        bclip("eval", model, "--out", "again", "--cache", "embeddings", *EVAL)
        assert_recorded("again", "evaluated")
    # Images were converted to RGB by other rules then, so their cached embeddings don't count. Texts' do.
    again = bclip("eval", model, "--out", "again", "--cache", "embeddings", *EVAL)
    assert "embeddings from" in again
    assert_recorded("again", "evaluated")
    # The recorded results compare with new ones, sample by sample.
    bclip("eval compare", "evaluated", "again", "--out", "compared")
    with Path("compared/compare.csv").open(newline="") as file:
        differences = [row["difference"] for row in csv.DictReader(file) if row["model"] != "evaluated"]
    assert any(differences) and all(abs(float(each)) < 1e-4 for each in differences if each)


def test_questions_get_the_recorded_answers(bclip):
    bclip("eval", "answers_finished", "--out", "again", "--cache", "none", *EVAL_ANSWERS)
    assert_recorded("again", "evaluated_answers")
    assert Path("again/samples/vqa.csv").read_text() == Path("evaluated_answers/samples/vqa.csv").read_text()


def test_index_gives_the_recorded_hits(bclip):
    for query, hits in expected("search").items():
        flags = ("--model", "train_ddp", "--data", "ingest", "--gallery", "gallery.html")
        printed = bclip("search", "index", query, "-k", "20", *flags)
        rows = [[cell.strip() for cell in line.split("\u2502")] for line in printed.splitlines()]
        cosines = {row[3]: float(row[2]) for row in rows if len(row) > 4 and row[1].isdigit()}
        assert cosines == pytest.approx(hits, abs=0.002)
        assert Path("gallery.html").read_text().count("<img ") == len(hits)


def test_tuning_record_is_read(before: Path):
    """In another process, since this one may have read its records already."""
    import os

    environment = {**os.environ, "BCLIP_TUNE": str(before / "tuning.json"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bclip_fast.cli", "doctor"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = json.loads((before / "tuning.json").read_text())["made"]
    assert str(before / "tuning.json") in done.stdout and made in done.stdout

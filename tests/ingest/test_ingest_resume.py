"""Kills, power failures, interruptions and engines: none of them changes a byte of the dataset."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from articles import manifest_rows, read_tree, write_articles
from ingest_runs import ENVIRONMENT, build_command

from bclip_fast.data.shards.verify import verify
from bclip_fast.errors import UserError
from bclip_fast.ingest import build as build_module
from bclip_fast.ingest.build import build
from bclip_fast.ingest.config import IngestConfig


@pytest.mark.slow
@pytest.mark.parametrize("num_kills", [3, pytest.param(20, marks=pytest.mark.long)])
def test_killed_run_resumes_to_the_same_bytes(tmp_path, num_kills):
    """Kill the main process at random moments. Its workers and their fork server must end too."""
    source = write_articles(tmp_path / "in", 60, have_panels=True)
    expected, out = tmp_path / "expected", tmp_path / "out"
    start = time.monotonic()
    subprocess.run(build_command(tmp_path, source, expected), env=ENVIRONMENT, check=True, capture_output=True)
    seconds = time.monotonic() - start
    generator = random.Random(0)
    kills = 0
    while kills < num_kills:
        start = time.monotonic()
        process = subprocess.Popen(
            build_command(tmp_path, source, out),
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(generator.uniform(0.3, 1.0) * seconds)
            # The run ended before the kill, so start another one. The first run was slower: its files were cold.
            seconds = min(seconds, time.monotonic() - start)
            assert process.returncode == 0
            assert read_tree(out) == read_tree(expected)
            shutil.rmtree(out)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            # The dataset is complete or absent: the kill may come after the last rename.
            if out.exists() and read_tree(out):
                assert read_tree(out) == read_tree(expected)
                shutil.rmtree(out)
    subprocess.run(build_command(tmp_path, source, out), env=ENVIRONMENT, check=True, capture_output=True)
    assert read_tree(out) == read_tree(expected)
    assert verify(out) == []
    assert not list(tmp_path.glob(".*"))
    deadline = time.monotonic() + 60
    while orphans := command_lines_with(tmp_path):
        assert time.monotonic() < deadline, orphans
        time.sleep(0.1)


def command_lines_with(folder: Path) -> list[str]:
    """Return the command lines of the processes that name the folder, fork servers and workers included."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # the process has ended
            lines.append(path.read_text(errors="replace").replace("\0", " "))
    return [line for line in lines if str(folder) in line]


def interrupt_build(monkeypatch: pytest.MonkeyPatch, function: str, config: IngestConfig) -> None:
    """Build the dataset, but raise KeyboardInterrupt in place of a function of the build."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build_module, function, interrupt)
        with pytest.raises(KeyboardInterrupt):
            build(config)


@pytest.mark.parametrize("suffix", [".rows", ".images"])
@pytest.mark.parametrize("damage", ["zeros", "cut", "empty"])
def test_damaged_part_is_refused_and_written_again(tmp_path, monkeypatch, suffix, damage):
    source = write_articles(tmp_path / "in", 6)
    config = IngestConfig(str(source), tmp_path / "out", workers=1, test_fraction=0.2)
    interrupt_build(monkeypatch, "make_plan", config)
    path = sorted((tmp_path / ".out.partial/work/parts").rglob(f"*{suffix}"))[2]
    data = path.read_bytes()
    half = len(data) // 2
    path.write_bytes({"zeros": data[:half] + bytes(len(data) - half), "cut": data[:half], "empty": b""}[damage])
    with pytest.raises(UserError, match="part 2 was damaged"):
        build(config)
    build(config)
    build(IngestConfig(str(source), tmp_path / "expected", workers=1, test_fraction=0.2))
    assert read_tree(tmp_path / "out") == read_tree(tmp_path / "expected")


def test_changed_configuration_discards_old_parts(tmp_path):
    source = write_articles(tmp_path / "in", 3)
    (tmp_path / ".out.partial/work").mkdir(parents=True)
    (tmp_path / ".out.partial/work/packages.jsonl").write_text("")
    (tmp_path / ".out.partial/work/signature.json").write_text(json.dumps({"seed": 5}))
    build(IngestConfig(str(source), tmp_path / "out", workers=1, test_fraction=0.0))
    assert len(manifest_rows(tmp_path / "out")) == 6


def test_parts_of_another_tokenizer_are_discarded(tmp_path, monkeypatch, caplog):
    source = write_articles(tmp_path / "in", 3)
    words = tmp_path / "vocab.txt"
    words.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]))
    config = IngestConfig(str(source), tmp_path / "out", workers=1, test_fraction=0.0, tokenizer=words)
    interrupt_build(monkeypatch, "make_plan", config)
    words.write_text(f"{words.read_text()}\nb")
    interrupt_build(monkeypatch, "make_plan", config)
    assert "the parts of an earlier run had other options" in caplog.text


@pytest.mark.parametrize("recorded", ["another version", "only the options"])
def test_parts_of_other_code_are_kept_only_on_request(tmp_path, monkeypatch, recorded):
    source = write_articles(tmp_path / "in", 3)
    config = IngestConfig(str(source), tmp_path / "out", workers=1, test_fraction=0.0)
    interrupt_build(monkeypatch, "make_plan", config)
    file = tmp_path / ".out.partial/work/signature.json"
    signature = json.loads(file.read_text())
    file.write_text(json.dumps(signature["config"] if recorded == "only the options" else signature | {"code": "old"}))
    before = read_tree(tmp_path / ".out.partial")
    with pytest.raises(UserError, match=r"has parts of other code.*--allow_changes"):
        build(config)
    assert read_tree(tmp_path / ".out.partial") == before
    monkeypatch.setattr("bclip_fast.ingest.build.write_part", None)  # it must not be needed again
    build(dataclasses.replace(config, allow_changes=True))
    assert len(manifest_rows(tmp_path / "out")) == 6


@pytest.mark.slow
def test_ray_and_local_engine_write_the_same_bytes(tmp_path):
    """Takes 10 to 20 seconds: Ray starts several programs, and its workers import the package."""
    pytest.importorskip("ray")
    source = write_articles(tmp_path / "in", 12, have_panels=True)
    command = build_command(tmp_path, source, tmp_path / "ray", workers=1, engine="ray")
    process = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    options = {"workers": 1, "test_fraction": 0.2, "max_shard_megabytes": 1, "panels": True}
    build(IngestConfig(str(source), tmp_path / "local", **options))
    assert sum(row["panel"] is not None for row in manifest_rows(tmp_path / "local").values()) == 24
    assert read_tree(tmp_path / "local") == read_tree(tmp_path / "ray")


def test_interrupted_run_is_kept_and_impossible_run_is_not(tmp_path, monkeypatch):
    source = write_articles(tmp_path / "in", 3)
    config = IngestConfig(str(source), tmp_path / "out", workers=1, test_fraction=0.0)
    interrupt_build(monkeypatch, "write_shard", config)
    assert (tmp_path / ".out.partial/work/plan.json").exists()
    build(config)
    assert len(manifest_rows(tmp_path / "out")) == 6
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(UserError, match="is not a mirror"):
        build(IngestConfig(str(source), tmp_path / "other", prefix="PMC", workers=1))
    assert not list(tmp_path.glob(".*"))

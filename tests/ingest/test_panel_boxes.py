"""The stage of `--panel_model`: its boxes become panels, and neither kills, crashes nor engines change other bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from articles import (
    article_xml,
    encode_image,
    manifest_rows,
    noise_image,
    read_tree,
    reject_rows,
    write_composites,
    write_files,
)
from ingest_runs import ENVIRONMENT, ROOT
from panel_models import HALVES, tiny_model, write_fixed_model, write_model
from PIL import Image
from safetensors.torch import load_file, save_file

from bclip_fast.errors import UserError
from bclip_fast.ingest import executors, panel_boxes
from bclip_fast.ingest.build import build
from bclip_fast.ingest.config import IngestConfig
from bclip_fast.ingest.discovery import discover
from bclip_fast.ingest.extract import Options
from bclip_fast.io.hashing import sha256


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (12, 16, 3), np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def options(tmp_path: Path, model: Path, out: str = "out", **changes: object) -> IngestConfig:
    settings = {"workers": 1, "val_fraction": 0.0, "test_fraction": 0.0, "panels": True, "panel_model": str(model)}
    return IngestConfig(str(tmp_path / "in"), tmp_path / out, **{**settings, **changes})


def test_boxes_become_panels_and_a_stopped_build_goes_on(tmp_path, monkeypatch, caplog):
    write_composites(tmp_path / "in", 5)
    write_files(tmp_path / "in/6", {"x.nxml": article_xml(("f", "(a) One of. (b) Two of."), number=6), "f.jpg": b"no"})
    monkeypatch.setattr(panel_boxes, "GROUP", 2)
    monkeypatch.setattr("bclip_fast.ingest.build.GROUP", 2)
    model = write_fixed_model(tmp_path / "model", HALVES)
    build(options(tmp_path, model))
    rows = manifest_rows(tmp_path / "out")
    panels = {key: (json.loads(row["panel_box"]), row["caption"]) for key, row in rows.items() if row["panel"]}
    assert panels["PMC3_f1_pA"] == ([0, 0, 120, 120], "Views. From above.")
    assert panels["PMC3_f1_pB"] == ([120, 0, 240, 120], "Views. From below.")
    assert len(panels) == 10
    description = json.loads((tmp_path / "out/dataset.json").read_text())["ingest"]
    assert description["config"]["panel_model"] == str(model)
    recorded = description["panel_model"]
    assert (recorded["figures"], recorded["boxes"], recorded["failed"], len(recorded["sha256"])) == (6, 10, 1, 64)
    assert "could not read 1 of 6 figures" in caplog.text
    # Stop after the first group, damage its file, and resume.
    real, calls = panel_boxes.detect_boxes, []

    def stop_at_second(task: panel_boxes.BoxTask) -> str:
        calls.append(task.number)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(task)

    monkeypatch.setattr(panel_boxes, "detect_boxes", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        build(options(tmp_path, model, "again"))
    build(options(tmp_path, model, "again"))
    assert calls == [0, 1, 1, 2]
    assert read_tree(tmp_path / "again") == read_tree(tmp_path / "out")
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        build(options(tmp_path, model, "damaged"))
    (path,) = (tmp_path / ".damaged.partial/work/boxes").rglob("*.json")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match="was damaged on the disk"):
        build(options(tmp_path, model, "damaged"))
    build(options(tmp_path, model, "damaged"))
    assert read_tree(tmp_path / "damaged") == read_tree(tmp_path / "out")


def test_another_model_begins_again_and_none_needs_no_panels(tmp_path, monkeypatch, caplog):
    write_composites(tmp_path / "in", 2)
    model = write_fixed_model(tmp_path / "model", HALVES)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("bclip_fast.ingest.build.make_plan", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build(options(tmp_path, model))
    # The same name, but other weights.
    state = load_file(model / "model.safetensors")
    state["class_embed.bias"] -= 9
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})
    build(options(tmp_path, model))
    assert "the parts of an earlier run had other options" in caplog.text
    assert not any(row.get("panel") for row in manifest_rows(tmp_path / "out").values())
    with pytest.raises(UserError, match="needs --panels"):
        options(tmp_path, model, panels=False)


_SCRIPT = """
import sys
from pathlib import Path
from bclip_fast.data import image_files
from bclip_fast.ingest import build, panel_boxes
real = panel_boxes.open_image
def open_image(data, *limits):
    if "crash" in sys.argv[5:] and data[:3] == b"GIF":
        import os
        os._exit(11)
    return real(data, *limits)
panel_boxes.open_image = open_image
process = panel_boxes.process
def crashing_process(package, *arguments, **options):
    if "crash" in sys.argv[5:] and package.name == "5":
        import os
        os._exit(11)
    return process(package, *arguments, **options)
panel_boxes.process = crashing_process
if __name__ == "__main__":
    build.build(build.IngestConfig(sys.argv[1], Path(sys.argv[2]), panels=True, panel_model=sys.argv[3], workers=2,
                                   engine=sys.argv[4], val_fraction=0.0, test_fraction=0.0, panel_score=0.1))
"""


def environment(tmp_path: Path) -> dict[str, str]:
    return {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}


def script_command(tmp_path: Path, out: str, model: Path, engine: str, *flags: str) -> list[str]:
    script = tmp_path / "panel_build.py"
    script.write_text(_SCRIPT)
    return [sys.executable, str(script), str(tmp_path / "in"), str(tmp_path / out), str(model), engine, *flags]


def run_script(tmp_path: Path, *arguments: Any) -> str:
    command = script_command(tmp_path, *arguments)
    process = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stderr


class DeadProcess(Exception):
    """Stands for the death of a worker's process."""


def test_notes_of_a_dead_worker_name_what_the_next_one_skips(tmp_path, monkeypatch, caplog):
    write_composites(tmp_path / "in", 3)
    model = write_fixed_model(tmp_path / "model", HALVES)
    bad = (tmp_path / "in/2/f.png").read_bytes()
    real_open, real_process = panel_boxes.open_image, panel_boxes.process
    dies = {"image": True, "package": True, "model": False}

    def open_image(data: bytes, limit: int) -> Any:
        if data == bad and dies["image"]:
            raise DeadProcess
        return real_open(data, limit)

    def process(package: Any, *arguments: Any, **keywords: Any) -> Any:
        if package.name == "3" and dies["package"]:
            raise DeadProcess
        return real_process(package, *arguments, **keywords)

    def detect(*_: Any) -> Any:
        raise DeadProcess

    def run(engine: str, function: Any, tasks: Any, workers: int, **_: Any) -> Any:
        for task in tasks:
            try:
                yield task, function(task)
            except DeadProcess:
                yield task, executors.Crash()

    monkeypatch.setattr(panel_boxes, "open_image", open_image)
    monkeypatch.setattr(panel_boxes, "process", process)
    with monkeypatch.context() as patch:
        patch.setattr(executors, "run", run)
        patch.setattr("bclip_fast.ingest.panels.detector.PanelDetector.detect", detect)
        with pytest.raises(UserError, match="the panel detector died"):
            build(options(tmp_path, model))
    with monkeypatch.context() as patch:
        patch.setattr(executors, "run", run)
        dies["image"] = dies["package"] = True
        folder = tmp_path / ".out.partial/work/boxes"
        tasks = [panel_boxes.BoxTask(str(folder), 0, tuple(discover(tmp_path / "in")), Options(), str(model), 0.5, 0)]
        assert [result for _, result in panel_boxes.find_boxes("local", tasks, 1)] == [""]
    boxes = json.loads((folder / "000000/000000000.json").read_bytes())
    assert sorted(map(str, boxes.values())) == [
        str([[0, 0, 120, 120, 0.953], [120, 0, 240, 120, 0.953]]),
        "crash while decoding",
    ]
    assert json.loads((folder / "000000/000000000.skip").read_bytes()) == [f"image {sha256(bad)}", "package 3"]


@pytest.mark.long
def test_crash_loses_one_image_or_package(tmp_path):
    """The worker's processes import transformers, and a crash starts new ones: 30 seconds."""
    write_composites(tmp_path / "in", 1)
    gif = encode_image(picture(5, (240, 120)), "GIF")
    write_files(tmp_path / "in/4", {"x.nxml": article_xml(("f", "(a) One of. (b) Two of."), number=4), "f.gif": gif})
    model = write_fixed_model(tmp_path / "model", HALVES)
    write_files(
        tmp_path / "in/5", {"x.nxml": article_xml(("f", "(a) One of. (b) Two of."), number=5), "f.jpg": noise_image(5)}
    )
    log = run_script(tmp_path, "two", model, "local", "crash")
    assert log.count("so it gets no boxes: ") == 2
    assert "no boxes: package 5" in log
    rows = manifest_rows(tmp_path / "two")
    assert sorted(rows) == ["PMC1_f1", "PMC1_f1_pA", "PMC1_f1_pB", "PMC1_f2", "PMC4_f1", "PMC5_f1"]
    assert not reject_rows(tmp_path / "two")
    described = json.loads((tmp_path / "two/dataset.json").read_text())["ingest"]["panel_model"]
    assert (described["figures"], described["failed"]) == (2, 1)


@pytest.mark.long
def test_engines_and_kills_change_no_byte(tmp_path):
    """Builds on Ray and in two processes, one of them killed at moments of its stages: a minute."""
    write_composites(tmp_path / "in", 80)
    model = write_model(tmp_path / "model", tiny_model())
    build(options(tmp_path, model, "one", panel_score=0.1))
    run_script(tmp_path, "ray", model, "ray")
    assert read_tree(tmp_path / "ray") == read_tree(tmp_path / "one")
    command = script_command(tmp_path, "killed", model, "local")
    for number in range(4):
        process = subprocess.Popen(command, env=environment(tmp_path), stderr=subprocess.DEVNULL)
        boxes = tmp_path / ".killed.partial/work/boxes"
        while process.poll() is None and len(list(boxes.rglob("*.json"))) < number:
            time.sleep(0.01)
        process.kill()
        process.wait()
    run_script(tmp_path, "killed", model, "local")
    assert read_tree(tmp_path / "killed") == read_tree(tmp_path / "one")

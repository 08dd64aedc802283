"""`bclip train report`: the page shows one or several runs, in light and dark."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from page import Page
from synthetic import tiny_model

from bclip_fast import cli
from bclip_fast.config import to_toml
from bclip_fast.errors import UserError
from bclip_fast.html import chart
from bclip_fast.train import report
from bclip_fast.train.config import TrainConfig
from bclip_fast.train.schedule import OptimConfig

ATTACK = "<script>alert(1)</script>"
PARTS = {"data_wait": 0.1, "forward": 0.3, "loss": 0.05, "backward": 0.5, "optimizer": 0.02}


def write_run(folder: Path, lr: float = 1e-3, steps: int = 200) -> Path:
    folder.mkdir()
    config = TrainConfig(run=str(folder), preset="", batch_size=32, model=tiny_model(), optim=OptimConfig(lr=lr))
    (folder / "config.toml").write_text(to_toml(config))
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        parts = {f"{name}_seconds": seconds * (1 + step % 2) for name, seconds in PARTS.items()}
        lines.append({
            "step": step, "epoch": step // 50, "samples": 32 * step, "lr": lr, "logit_scale": 14.0,
            "loss": math.nan if step == 7 else 3 * math.exp(-step / 50) + lr, "grad_norm": 1 + step % 3,
            "samples_per_second": 100.0, "tokens_per_second": 4321.0, "step_seconds": 1.0 * (1 + step % 2), **parts,
            "communication_seconds": 0.25, "bad_samples": step // 100, "skipped": int(step >= 7),
        })  # fmt: skip
        if step % 100 == 0:
            figures = {"image to text R@1": 0.125, "image to text R@5": step / 400, f"{ATTACK} accuracy": 0.5}
            lines.append({"step": step, **{f"validation/{name}": value for name, value in figures.items()}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 201, "lo')
    events = [
        (0, "start", {"ranks": 2}), (7, "skip", {"reason": "the loss is nan"}), (60, "checkpoint", {}),
        (120, "checkpoint", {}), (130, "stop", {}), (120, "resume", {"ranks": 4}),
    ]  # fmt: skip
    rows = [{"step": step, "event": kind, "time": "2026-01-01T00:00:00+00:00"} | facts for step, kind, facts in events]
    (folder / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bad = {"step": 55, "rank": 1, "epoch": 1, "position": 3, "index": 4, "shard": "a"}
    bad |= {"key": ATTACK, "reason": "broken"}
    (folder / "bad_samples.jsonl").write_text(json.dumps(bad) + "\n")
    return folder


def words(page: Page) -> str:
    return " ".join(page.text.split())


def test_report_shows_curves_and_events_of_run(tmp_path: Path):
    run = write_run(tmp_path / "mine")
    assert cli.main(["train", "report", str(run)]) == 0
    page = Page(run / "report.html")
    text = words(page)
    assert not page.stack
    assert "<script" not in page.source
    assert f"sample {ATTACK} replaced: broken" in text
    names = [str(attributes["aria-label"]) for attributes in page.all("svg")]
    titles = ["Loss", "Learning rate", "Logit scale", "Norm of the gradient", "Samples a second", "Tokens a second"]
    assert [name.split(":")[0] for name in names] == [*titles, "image to text", ATTACK, "Seconds of a step"]
    assert "R@1 from 0.125 at step 100 to 0.125 at step 200; R@5 from 0.25" in names[6]
    assert all(part.replace("_", " ") in names[-1] for part in (*PARTS, "communication"))
    assert "1 step not finite" in text
    assert "chance, ln 32" in text
    # Odd steps take twice as long, so the median of 20 steps lies between.
    assert "backward0.7550.0 %" in text
    assert "the rest0.0453.0 %" in text
    assert "whole step1.5" in text
    assert "image to text R@50.5" in text
    assert "Tokens a second4321" in text
    assert "Steps skipped1" in text
    assert "Ranks2, then 4" in text
    assert "2 checkpoints were written, the last after step 120." in text
    positions = [text.index(event) for event in ("started, ranks 2", "skipped: the loss is nan", "stopped by a signal")]
    assert positions == sorted(positions)
    # Settings that differ from the defaults come first.
    first, _, others = text.partition("other settings")
    assert "batch_size32" in first
    assert "optim.lr0.001" in first
    assert "optim.beta1" not in first
    assert "optim.beta10.9" in others


def test_report_of_several_runs_shares_charts(tmp_path: Path):
    runs = [write_run(tmp_path / name, lr, steps) for name, lr, steps in (("slow", 1e-4, 150), ("fast", 1e-2, 200))]
    out = tmp_path / "both.html"
    report.run(report.TrainReportConfig(runs=tuple(map(str, runs)), out=str(out)))
    page = Page(out)
    names = [str(attributes["aria-label"]) for attributes in page.all("svg")]
    assert names[1] == "Learning rate: slow from 1e-4 at step 1 to 1e-4 at step 150; fast from 0.01 at step 1 to 0.01 at step 200"  # fmt: skip  # noqa: E501
    text = words(page)
    differing = text[text.index("Differing between the runs") : text.index("other settings")]
    assert "optim.lr0.00010.01" in differing
    assert "batch_size" not in differing
    assert "Samples4,8006,400" in text
    assert "image to text R@50.250.5" in text


def test_report_of_folder_without_run_is_an_error(tmp_path: Path):
    with pytest.raises(UserError, match="is not a run of bclip train"):
        report.run(report.TrainReportConfig(runs=(str(tmp_path),)))
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no step yet"):
        report.run(report.TrainReportConfig(runs=(str(run),)))


def test_chart_of_several_lines_names_them():
    series = {f"run {i}": ([1.0, 2.0], [float(i), 2.0 * i]) for i in range(10)} | {"<b>": ([1.0], [1.0])}
    drawing = str(chart.line_chart(series, title="t"))
    assert [f"run {i}" in drawing for i in range(10)] == 8 * [True] + 2 * [False]
    assert drawing.count('class="s7"') == 2
    drawing = str(chart.line_chart({"<b>": ([1.0], [1.0]), "a": ([1.0], [2.0])}, title="t"))
    assert "<b>" not in drawing
    assert "&lt;b&gt;" in drawing
    assert drawing.count("<circle") == 2


def test_report_renders_in_light_and_dark(tmp_path: Path):
    import numpy as np
    from PIL import Image

    paths = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    browser = next((path for path in paths if path), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    run = write_run(tmp_path / "run")
    report.run(report.TrainReportConfig(runs=(str(run),)))
    shots = []
    for scheme in (0, 1):
        shot = tmp_path / f"{scheme}.png"
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=900,1600"]
        flags += [f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={shot}"]
        result = subprocess.run(
            [browser, *flags, (run / "report.html").as_uri()], capture_output=True, text=True, timeout=120
        )
        assert "CONSOLE" not in result.stderr, result.stderr
        with Image.open(shot) as image:
            shots.append(np.asarray(image.convert("L"), dtype=float))
    dark, light = (shot[5:20, 5:20].mean() for shot in shots)
    assert dark < 60
    assert light > 200
    assert all(shot.std() > 5 for shot in shots), "something is drawn"

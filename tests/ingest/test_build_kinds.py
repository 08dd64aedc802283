"""`bclip ingest build --kinds --filter`: the columns of `bclip ingest label`, and a selection that can be corrected."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
from articles import manifest_rows, read_tree, write_articles
from ingest_runs import ENVIRONMENT

from bclip_fast.data.shards.mixed import open_dataset
from bclip_fast.errors import UserError
from bclip_fast.ingest import build as stages
from bclip_fast.ingest import label
from bclip_fast.ingest.build import build
from bclip_fast.ingest.config import IngestConfig
from bclip_fast.ingest.label import LabelConfig

OPTIONS = {"workers": 1, "val_fraction": 0.3, "test_fraction": 0.0, "panels": True, "kinds": True}
FILTER = "kind is not null and panel is null"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_articles(tmp_path_factory.mktemp("kinds") / "in", 6, have_panels=True)


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("kinds") / "out"
    build(IngestConfig(str(source), out, filter=FILTER, **OPTIONS))
    return out


def test_kinds_of_figures_and_panels_are_those_of_ingest_label(source, expected, tmp_path):
    build(IngestConfig(str(source), tmp_path / "out", **{**OPTIONS, "kinds": False}))
    label.run(LabelConfig(tmp_path / "out", workers=1))
    rows = manifest_rows(expected)
    assert rows == manifest_rows(tmp_path / "out")
    assert sum(row["panel"] is not None for row in rows.values()) == 12
    assert all(row["kind"] and 0 < row["kind_p"] <= 1 for row in rows.values())
    assert len(open_dataset(str(expected), "train", filter="")) == sum(
        row["split"] == "train" and row["panel"] is None for row in rows.values()
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("knd == 'ct'", "no column knd; did you"),
        ("kind_p > 1", r"selects none of the 24 pairs .*kind_p > 1: 0"),
    ],
)
def test_wrong_filter_keeps_the_work_for_a_corrected_one(source, expected, tmp_path, monkeypatch, wrong, message):
    with pytest.raises(UserError, match=message):
        build(IngestConfig(str(source), tmp_path / "out", filter=wrong, **OPTIONS))
    assert not (tmp_path / "out").exists()
    for stage in ("extract_part", "write_shard"):
        monkeypatch.setattr(stages, stage, None)  # it must not run again
    build(IngestConfig(str(source), tmp_path / "out", filter=FILTER, **OPTIONS))
    assert read_tree(tmp_path / "out") == read_tree(expected)


_KILL = """
import json, os, signal, sys
from pathlib import Path
from bclip_fast.ingest import build as stages, extract
from bclip_fast.ingest.config import IngestConfig
source, out, place, options = sys.argv[1:]
module, name, number = {"part": (extract, "write_part", 2), "shard": (stages, "_finish", 0),
                        "manifest": (stages, "log_selection", 0), "end": (stages.Staging, "publish", 0)}[place]
function, calls = getattr(module, name), []
def count_and_kill(*arguments, **keywords):
    calls.append(name)
    if len(calls) > number:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*arguments, **keywords)
setattr(module, name, count_and_kill)
stages.build(IngestConfig(source, Path(out), **json.loads(options)))
"""


def test_killed_build_with_kinds_gives_the_same_bytes(source, expected, tmp_path):
    """Kill -9 between parts, after the shards, after the manifest and, with another filter, after dataset.json."""
    script, out = tmp_path / "kill.py", tmp_path / "out"
    script.write_text(_KILL)
    for place in ("part", "shard", "manifest", "end"):
        options = json.dumps(OPTIONS | {"filter": "panel is not null"})
        command = [sys.executable, str(script), str(source), str(out), place, options]
        ended = subprocess.run(command, env=ENVIRONMENT, capture_output=True, check=False)
        assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
        assert not out.exists()
    assert (tmp_path / ".out.partial/dataset.json").is_file()
    build(IngestConfig(str(source), out, filter=FILTER, **OPTIONS))
    assert read_tree(out) == read_tree(expected)

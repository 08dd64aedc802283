"""Tests of `bclip bench trainer`: the steps of both trainers, and the parts of a step."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from peers import import_open_clip
from synthetic import write_shards

from bclip_fast.benchmarks.report import BenchConfig, run
from bclip_fast.benchmarks.trainer import PARTS, TrainerConfig
from bclip_fast.errors import UserError


@pytest.mark.long
def test_trainer_both_trainers_parts_sum_to_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    # Slow, because two processes import open_clip, timm and transformers.
    for module in ("webdataset", "open_clip_train"):
        pytest.importorskip(module)
    import_open_clip()
    shards = write_shards(tmp_path / "shards", num_val=0)
    config = TrainerConfig(preset="quickstart", shards=str(shards), batch_size=8, steps=1, rounds=1)
    assert run(BenchConfig("trainer", tmp_path, trainer=config)) == 0
    rows = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    assert [row["contender"] for row in rows] == ["open_clip", "ours"]
    for row in rows:
        assert row["case"] == "quickstart-2x4" and row["num_steps"] == 1
        assert row["samples_per_second"] == pytest.approx(8 / row["step_seconds"])
        seconds = {part: row[f"{part}_seconds"] for part in PARTS}
        assert all(seconds[part] > 0 for part in ("forward", "loss", "backward", "optimizer")), seconds
        # The waiting time belongs to an earlier backward pass.
        assert seconds.pop("communication") >= 0
        # The parts cover nearly all of the time.
        assert 0.3 * row["step_seconds"] < sum(seconds.values()) <= row["step_seconds"], row
    assert "open_clip / ours" in capsys.readouterr().out


def test_trainer_missing_peer_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "open_clip_train", None)
    with pytest.raises(UserError, match="open_clip with its trainer needs"):
        run(BenchConfig("trainer", tmp_path))


@pytest.mark.parametrize("settings", [dict(ranks=0), dict(steps=0), dict(batch_size=3), dict(rounds=0)])
def test_trainer_config_bad_number_is_refused(settings: dict[str, int]):
    with pytest.raises(UserError, match="each must be at least 1, and the ranks must divide the batch"):
        TrainerConfig(**settings)

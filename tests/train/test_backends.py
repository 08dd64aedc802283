"""Tests of the backends of a run: they stay the same after a resume, and on all ranks."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from records import gelu_backend, keep, make_record

from bclip_fast import ops
from bclip_fast.doctor import backends as doctor
from bclip_fast.errors import UserError
from bclip_fast.loss import ClipLoss
from bclip_fast.ops import dispatch, pointwise
from bclip_fast.train import backends

pytestmark = pytest.mark.usefixtures("fresh_records")


def test_resumed_run_new_record_keeps_its_backends(tmp_path):
    keep(make_record("reference", "cpu"))
    record(tmp_path)
    with backends.of_run(tmp_path, resumed=False).in_force():
        assert gelu_backend() == "reference" and gelu_backend(1 << 17) == "cpu"
    keep(make_record("cpu", "reference"))
    assert gelu_backend() == "cpu"
    with backends.of_run(tmp_path, resumed=True).in_force():
        assert gelu_backend() == "reference"
        assert "the run's record" in "\n".join(doctor.lines())
    assert gelu_backend() == "cpu"
    with backends.of_run(tmp_path, resumed=False).in_force():
        assert gelu_backend() == "cpu"


def test_resumed_run_lost_backend_is_replaced_with_warning(tmp_path, caplog, monkeypatch):
    record(tmp_path)
    with backends.of_run(tmp_path, resumed=False).in_force():
        assert gelu_backend() == "cpu"
    assert not caplog.messages
    with backends.of_run(tmp_path, resumed=True).in_force():
        pass
    assert not caplog.messages
    monkeypatch.setitem(pointwise.LIMITS, "cpu", lambda *inputs: "it was built without")
    with backends.of_run(tmp_path, resumed=True).in_force():
        assert gelu_backend() == "torch"
    assert "does not continue bit for bit" in caplog.text
    assert "gelu, float32, small: torch in place of cpu (it was built without)" in caplog.text


def test_run_damaged_backends_file_is_named(tmp_path):
    (tmp_path / "backends.json").write_text('{"cpu": {}}')
    with pytest.raises(UserError, match=r"backends\.json is damaged"):
        backends.of_run(tmp_path, resumed=True)


def record(folder: Path) -> None:
    """Write backends.json of a new run."""
    (folder / backends.FILE).write_text(json.dumps(backends.of_run(folder, resumed=False).content))


def backends_on_rank(rank: int, folder: str) -> list[str]:
    logging.disable()
    os.environ["BCLIP_CACHE"] = f"{folder}/{rank}"
    os.environ.pop("BCLIP_TUNE", None)
    loss_key = ("clip_loss", "float32", "B <= 256")
    keep(make_record(*(("reference", "cpu") if rank == 0 else ("cpu", "reference")), key=loss_key))
    features = torch.nn.functional.normalize(torch.randn(3, 8), dim=1)

    def backend() -> str:
        return dispatch.explain(lambda: ops.clip_loss(features, features, 1.0)).chosen

    names = [backend()]
    with backends.of_run(Path(folder), resumed=False).in_force():
        names.append(backend())
    names.append(backend())
    ClipLoss(rank=rank, world_size=dist.get_world_size())(features, features, torch.tensor(1.0))
    return [*names, backend()]


def test_ranks_in_run_and_loss_use_backend_of_rank_0(tmp_path):
    first, second = on_ranks(2, backends_on_rank, str(tmp_path))
    assert first == ["reference"] * 4
    assert second == ["cpu", "reference", "cpu", "reference"]


def test_resumed_run_missing_backends_file_is_a_warning(tmp_path, caplog):
    with backends.of_run(tmp_path, resumed=False).in_force():
        pass
    assert not caplog.records
    with backends.of_run(tmp_path, resumed=True).in_force():
        pass
    # RunFolder.begin writes the file.
    assert "backends.json is missing" in caplog.text and not list(tmp_path.iterdir())

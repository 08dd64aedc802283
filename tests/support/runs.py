"""Read, compare and cut the folders of training runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from synthetic import weights

from bclip_fast.io.runs import METRICS, read_metrics
from bclip_fast.train import checkpoint


def column(run: Path, name: str) -> list[Any]:
    """The values of one key of metrics.jsonl."""
    return [record[name] for record in read_metrics(run / METRICS) if name in record]


def saved_steps(run: Path) -> list[int]:
    """The steps of the checkpoints, in order."""
    return [checkpoint.step_of(path) for path in reversed(checkpoint.list_checkpoints(run / "checkpoints"))]


def are_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Whether two dictionaries of tensors are bitwise equal."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def assert_equal_runs(run: Path, reference: Path) -> None:
    """Assert that losses and final weights of two runs are bitwise equal."""
    assert column(run, "loss") == column(reference, "loss")
    assert are_equal(weights(run), weights(reference))


def stopped_after(run: Path, folder: Path, step: int) -> Path:
    """A copy of a run as it would be if it had been killed after the checkpoint of `step`."""
    shutil.copytree(run, folder)
    for path in checkpoint.list_checkpoints(folder / "checkpoints"):
        if checkpoint.step_of(path) > step:
            shutil.rmtree(path)
    return folder


def as_earlier_version(run: Path) -> None:
    """Remove the records of the run from its checkpoints, which earlier versions did not write."""
    for path in (run / "checkpoints").glob("*/state.json"):
        state = {key: value for key, value in json.loads(path.read_text()).items() if key not in ("run", "files")}
        state["data"].pop("base model", None)
        path.write_text(json.dumps(state))
        manifest = path.with_name("manifest.json")
        described = json.loads(manifest.read_text()) | {"state.json": checkpoint._describe(path)}
        manifest.write_text(json.dumps(described))


def records(run: Path, name: str = METRICS) -> list[dict[str, Any]]:
    """The lines of a file of the run."""
    return read_metrics(run / name)

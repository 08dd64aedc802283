"""Ten steps of open_clip's own training code have the same losses with our loss as with its own."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip_steps
import pytest
from peers import import_open_clip

SUPPORT = Path(open_clip_steps.__file__).parent


@functools.cache
def steps(source: str) -> dict[str, Any]:
    """The output of open_clip_steps.py with the open_clip of the folder `source`, or the installed one."""
    paths = [*([source] if source else []), str(SUPPORT), str(SUPPORT.parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    command = [sys.executable, open_clip_steps.__file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def assert_equal_losses(losses: dict[str, list[float]]) -> None:
    """Compare the losses of float32 steps, each of which starts from the weights of the step before."""
    theirs = losses.pop("theirs")
    assert len(theirs) == open_clip_steps.NUM_STEPS
    # The loss falls, so that a step without effect would differ.
    assert theirs[-1] < theirs[0]
    for name, ours in losses.items():
        assert ours == pytest.approx(theirs, rel=1e-5), name


@pytest.mark.parametrize("kind", open_clip_steps.KINDS)
def test_ten_steps_of_its_trainer_have_equal_losses(kind: str) -> None:
    import_open_clip()
    pytest.importorskip("open_clip_train.train")
    result = steps("")
    assert result["version"].startswith("3.")
    assert_equal_losses(dict(result["losses"][f"{kind} trainer"]))


@pytest.mark.long
@pytest.mark.parametrize("strategy", open_clip_steps.STRATEGIES)
@pytest.mark.parametrize("kind", open_clip_steps.KINDS)
def test_ten_steps_of_its_tasks_have_equal_losses(kind: str, strategy: str) -> None:
    """Our loss is the argument `loss` of the task, or `install` puts it there. Compiled tasks have no graph break."""
    checkout = Path(os.environ.get("BCLIP_PEERS", "")) / "open_clip"
    if "BCLIP_PEERS" not in os.environ or not (checkout / "src" / "open_clip" / "task").is_dir():
        pytest.skip("BCLIP_PEERS names no folder with a clone open_clip of version 4")
    import_open_clip()
    assert_equal_losses(dict(steps(str(checkout / "src"))["losses"][f"{kind} {strategy}"]))

"""Results that all processes of a test run share. The first process that needs one makes it, and others wait for it."""

from __future__ import annotations

import fcntl
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

Result = TypeVar("Result")


def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of this run, which the workers of pytest-xdist share."""
    folder = tmp_path_factory.getbasetemp()
    # xdist gives each worker a folder inside that of the run.
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


def made_once(folder: Path, name: str, make: Callable[[], Result]) -> Result:
    """Return the result of `make`, which the first caller in any process stores as `folder/name`.

    Nothing is stored if `make` fails, so the next caller tries again.
    """
    path = folder / name
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return pickle.loads(path.read_bytes())  # type: ignore[no-any-return]
        result = make()
        written = path.with_suffix(".part")
        written.write_bytes(pickle.dumps(result))
        written.rename(path)
        return result

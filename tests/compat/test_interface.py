"""Flags, configuration fields, their types and defaults, and the contents of files are those of interface.json."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import interface
import pytest
import torch


@pytest.fixture
def restored_log() -> Iterator[None]:
    """Restores the package's log, which the commands send to stderr."""
    logger = logging.getLogger("bclip_fast")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


def assert_as_recorded(kind: str, current: dict[str, Any]) -> None:
    recorded = json.loads(interface.RECORD.read_text(encoding="utf-8"))[kind]
    changed = interface.differences(recorded, json.loads(json.dumps(current)))
    assert not changed, "\n".join([f"{kind} differ from interface.json; interface.py says what to do:", *changed])


def test_flags_are_those_recorded():
    assert_as_recorded("commands", interface.commands())


def test_configuration_fields_are_those_recorded():
    assert_as_recorded("configurations", interface.configurations())


@pytest.mark.skipif(torch.cuda.is_available(), reason="the recorded files are those of a CPU")
def test_contents_of_files_are_those_recorded(tmp_path: Path, restored_log: None):
    assert_as_recorded("files", interface.files(tmp_path))

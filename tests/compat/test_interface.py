"""Flags, configuration fields, their types and defaults, and the contents of files are those of interface.json."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from interface import RECORD, describe, differences


@pytest.fixture
def quiet():
    """Restores the package's log, which the commands send to stderr."""
    logger = logging.getLogger("bclip_fast")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


def test_commands_configurations_and_files_are_those_recorded(tmp_path: Path, quiet: None):
    changed = differences(json.loads(RECORD.read_text(encoding="utf-8")), json.loads(json.dumps(describe(tmp_path))))
    assert not changed, "\n".join(["not as in interface.json; see interface.py:", *changed])

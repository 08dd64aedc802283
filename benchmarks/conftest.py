"""The options of the benchmark suite."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    parser.addoption("--large", action="store_true", help="also run the cases that take minutes per call")
    parser.addoption(
        "--rows", action="append", default=[], type=Path, help="JSONL file that gets each row as soon as it is measured"
    )

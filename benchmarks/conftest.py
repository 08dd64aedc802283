"""The option `--large` of the benchmark suite."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.addoption("--large", action="store_true", help="also run the cases that take minutes per call")

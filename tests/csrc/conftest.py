"""Fixtures of the tests of compiled code."""

from __future__ import annotations

import pytest

from bclip_fast.benchmarks.bounds import machine_code


@pytest.fixture(scope="session")
def machine_codes():
    """The machine code of all kernels of the built CUDA module. Reading it takes seconds."""
    return machine_code.of_module()

"""Fixtures of the tests of compiled code."""

from __future__ import annotations

import pytest
from once import made_once, run_folder

from bclip_fast.benchmarks.bounds import machine_code


@pytest.fixture(scope="session")
def machine_codes(tmp_path_factory):
    """The machine code of all kernels of the built CUDA module. Reading it takes 15 seconds."""
    return made_once(run_folder(tmp_path_factory), "machine_codes", machine_code.of_module)

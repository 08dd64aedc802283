"""Tests of the places of a tile's products in threads and registers, against CUTLASS's description of wgmma."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SIDES, THREADS, NUMBERS = (128, 256), 256, 128


def headers():
    """The folders of the headers of CUTLASS and of the CUDA toolkit."""
    folders = [Path(place) for place in (os.environ.get("BCLIP_CUTLASS", "0"), *sys.path)]
    folders = [folder / name for folder in folders for name in ("cutlass_library/source/include", "include")]
    cutlass = next((folder for folder in folders if (folder / "cute/atom/mma_traits_sm90_gmma.hpp").is_file()), None)
    if cutlass is None:
        pytest.skip("the headers of CUTLASS are missing: pip install --no-deps nvidia-cutlass")
    homes = [
        os.environ.get("CUDA_HOME"),
        "/usr/local/cuda",
        Path(shutil.which("nvcc") or "/bin/nvcc").resolve().parents[1],
    ]
    home = next((Path(one) for one in homes if one and Path(one, "include/cuda_runtime.h").is_file()), None)
    if home is None:
        pytest.skip("the headers of the CUDA toolkit are missing")
    return cutlass, home / "include", home / "include/cccl"


def test_epilogues_of_hopper_find_each_product_where_cutlass_leaves_it(tmp_path):
    program = tmp_path / "layout"
    options = ["-std=c++17", "-O0", "-DBCLIP_CUDA_EMULATOR", f"-I{ROOT}"]
    options += [option for folder in headers() for option in ("-isystem", folder)]
    source = ROOT / "tests/csrc/hopper_layout.cu"
    compiler = os.environ.get("CXX", "g++").split()
    done = subprocess.run([*compiler, *options, "-x", "c++", source, "-o", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    for dtype in ("float16", "bfloat16"):
        held = [tuple(map(int, line.split()[1:])) for line in lines if line.split()[0] == dtype]
        assert len(held) == THREADS * NUMBERS == SIDES[0] * SIDES[1]
        # Row and column by CUTLASS, and those that the epilogue takes.
        assert [one for one in held if one[2:4] != one[4:6]] == []
        assert {one[2:4] for one in held} == {(row, column) for row in range(SIDES[0]) for column in range(SIDES[1])}

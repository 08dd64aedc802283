"""Decode mutated JPEGs under AddressSanitizer and UBSan, on each instruction set.

BCLIP_FUZZ_RUNS sets the number of runs, of two files each, and replaces both numbers below.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
CXX = os.environ.get("CXX", "g++")
SANITIZERS = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-O1",
    "-g1",  # lines of a stack trace
    "-std=c++17",
    "-pthread",
    f"-I{ROOT}",
]
RUNS = os.environ.get("BCLIP_FUZZ_RUNS")
FEW, MANY = RUNS or "2000", RUNS or "20000"


def compiled(*arguments) -> subprocess.CompletedProcess[str]:
    return subprocess.run([CXX, *SANITIZERS, *map(str, arguments)], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    if not shutil.which(CXX):
        pytest.skip(f"the compiler {CXX} is not installed")
    probe = folder / "probe.cpp"
    probe.write_text("#include <cstdio>\n#include <jpeglib.h>\nint main() { return jpeg_std_error == nullptr; }")
    done = compiled(probe, "-o", folder / "probe", "-ljpeg")
    if done.returncode:
        pytest.skip(f"no libjpeg, or no sanitizers: {done.stderr.strip().splitlines()[-1]}")
    sources = [path for path in sorted((ROOT / "csrc/cpu/image").glob("*.cpp")) if path.name != "register.cpp"]
    sources += [ROOT / "csrc/cpu/parallel.cpp", ROOT / "csrc/cpu/simd/isa.cpp"]
    done = compiled(Path(__file__).with_name("jpeg.cpp"), *sources, "-o", folder / "jpeg", "-ljpeg")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "jpeg"


@pytest.fixture(scope="module")
def seeds(tmp_path_factory) -> list[Path]:
    """Small valid files of every kind that the decoder distinguishes, and the shared odd files if they exist."""
    folder = tmp_path_factory.mktemp("seeds")
    noise = np.random.default_rng(0).integers(0, 256, (150, 170, 4), dtype=np.uint8)
    y, x = np.mgrid[0:150, 0:170]
    noise = (noise // 8 + (x + y)[..., None] % 220).astype(np.uint8)
    for mode in ("RGB", "L", "CMYK"):
        options = [{}, {"progressive": True}, {"restart_marker_blocks": 3}, {"subsampling": 0}, {"subsampling": 1}]
        for number, option in enumerate(options):
            for size in ((170, 150), (33, 9), (8, 140)):
                pixels = noise[: size[1], : size[0], {"RGB": slice(3), "L": 0, "CMYK": slice(4)}[mode]]
                out = io.BytesIO()
                Image.fromarray(pixels, mode).save(out, "JPEG", quality=40 + 15 * number, **option)
                (folder / f"{mode}-{number}-{size[0]}.jpg").write_bytes(out.getvalue())
    odd = Path(os.environ.get("BCLIP_SHARED_DATA", ROOT.parent / "shared/data")) / "images_odd"
    rows = (odd / "manifest.jsonl").read_text().splitlines() if odd.is_dir() else []
    paths = [odd / json.loads(row)["file"] for row in rows]
    odd_jpegs = [path for path in paths if path.is_file() and path.stat().st_size < 1 << 17]
    return [*sorted(folder.iterdir()), *sorted(path for path in odd_jpegs if path.read_bytes()[:2] == b"\xff\xd8")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["avx512", "avx2", "plain"])
@pytest.mark.parametrize("num_runs", [FEW, pytest.param(MANY, marks=pytest.mark.long)])
def test_mutated_files_cause_no_memory_error(program, seeds, name, num_runs):
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    if {"avx512": "avx512_vnni", "avx2": "avx2"}.get(name, "") not in ["", *flags]:
        pytest.skip(f"this processor has no {name}")
    done = subprocess.run(
        [program, "20", "0", num_runs, *seeds],
        capture_output=True,
        text=True,
        env={**os.environ, "BCLIP_CPU_ISA": name},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    print(done.stdout)
    words = done.stdout.replace(",", "").replace(";", "").split()
    runs, resized = int(words[0]), int(words[words.index("resized") + 1])
    assert runs == int(num_runs) and resized > runs / 20, done.stdout

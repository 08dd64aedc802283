"""Builds with and without the headers of CUTLASS. The compilers here write empty files."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from ninja import BIN_DIR

SOURCE = "csrc/cuda/contrastive/hopper_example.cu"
REMEDY = 'pip install --no-deps "nvidia-cutlass>=4.2"'


@pytest.fixture
def tree(sdist: Path, tmp_path: Path) -> Path:
    """A source tree with one more kernel for Hopper."""
    # Other tests build in the sdist's folder.
    shutil.copytree(sdist, tmp_path / "tree", copy_function=os.link, ignore=shutil.ignore_patterns("build"))
    (tmp_path / "tree" / SOURCE).touch()
    return tmp_path / "tree"


@pytest.fixture
def compilers(bare_environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """The environment of a machine with a C++ compiler, nvcc and ninja."""
    folder = tmp_path / "compilers"
    folder.mkdir()
    for name in ("g++", "nvcc"):
        (folder / name).write_text('#!/bin/sh\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done\n')
        (folder / name).chmod(0o755)
    (folder / "ninja").symlink_to(str(shutil.which("ninja", path=f"{BIN_DIR}{os.pathsep}{os.environ['PATH']}")))
    return {**bare_environment, "PATH": f"{folder}:{bare_environment['PATH']}"}


@pytest.fixture
def python(tmp_path: Path) -> list[str]:
    """A Python with the build's tools and no other package."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True)
    site = next((tmp_path / "env").glob("lib/python*/site-packages"))
    names = "setuptools", "_distutils_hack", "pybind11", "ninja"
    tools = [Path(str(find_spec(name).origin)).parent for name in names]  # type: ignore[union-attr]
    for path in [*tools, *tools[0].parent.glob("setuptools-*.dist-info")]:
        (site / path.name).symlink_to(path)
    return [str(tmp_path / "env/bin/python")]


def write_cutlass(include: Path, licence: Path | None, version: str = "4.2.0") -> None:
    (include / "cutlass").mkdir(parents=True)
    lines = zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True)
    (include / "cutlass/version.h").write_text("".join(f"#define CUTLASS_{name} {number}\n" for name, number in lines))
    if licence is not None:
        licence.parent.mkdir(parents=True, exist_ok=True)
        licence.write_text("Redistribution and use")


def build(python: list[str], tree: Path, environment: dict[str, str], out: Path) -> subprocess.CompletedProcess[str]:
    command = [*python, "setup.py", "-q", "build", "--build-base", str(out)]
    return subprocess.run(command, cwd=tree, env=environment, text=True, capture_output=True)


def commands(tree: Path) -> dict[str, str]:
    """By source of a CUDA kernel: the command that compiles it."""
    text = re.sub(r" \$\n +", " ", next((tree / "build").glob("*/build.ninja")).read_text())
    rules = dict(re.findall(r"^rule (\w+)\n  command = (.+)$", text, re.M))
    edges = re.findall(r"^build \S+: (nvcc\w*) (\S+)$", text, re.M)
    return {Path(source).relative_to(tree.resolve()).as_posix(): rules[rule] for rule, source in edges}


def test_kernels_for_hopper_compile_only_for_it_and_with_cutlass(
    python: list[str], tree: Path, compilers: dict[str, str], tmp_path: Path
):
    site = next((tmp_path / "env").glob("lib/python*/site-packages"))
    licence = site / "nvidia_cutlass-4.2.0.0.dist-info/licenses/LICENSE.txt"
    write_cutlass(site / "cutlass_library/source/include", licence)
    run = build(python, tree, compilers, tmp_path / "out")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "bclip_fast._cuda, with kernels for Hopper from CUTLASS 4.2.0" in run.stdout
    lines = commands(tree)
    hopper = {name for name in lines if Path(name).name.startswith("hopper")}
    assert SOURCE in hopper and len(lines) > len(hopper) + 4
    for name, command in lines.items():
        architectures = re.findall(r",code=(\w+)", command)
        if name in hopper:
            assert architectures == ["sm_90a"] and "-isystem cutlass-4.2.0" in command and "BCLIP_CUTLASS" in command
        else:
            assert architectures == ["sm_80", "sm_90a", "compute_80"] and "-isystem" not in command
    # The compiler's path of the headers stays the same when they move, as under pip's build isolation.
    (link,) = (tree / "build").glob("*/cutlass-4.2.0")
    assert (link / "cutlass/version.h").is_file()
    (package,) = (tmp_path / "out").glob("lib*/bclip_fast")
    assert json.loads((package / "build_info.json").read_text())["no_hopper"] == ""
    assert (package / "licenses/CUTLASS-LICENSE.txt").read_text() == "Redistribution and use"


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({}, "CUTLASS is not installed"),
        ({"BCLIP_CUTLASS": "0"}, "BCLIP_CUTLASS=0"),
        ({"BCLIP_CUDA_ARCHS": "80"}, "BCLIP_CUDA_ARCHS=80 lacks 90a"),
    ],
)
def test_build_without_cutlass_says_so(
    python: list[str], tree: Path, compilers: dict[str, str], tmp_path: Path, variables: dict[str, str], reason: str
):
    run = build(python, tree, {**compilers, **variables}, tmp_path / "out")
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"bclip_fast._cuda, without kernels for Hopper: {reason}" in run.stdout
    assert "BCLIP_CUTLASS" not in commands(tree)[SOURCE] and "-isystem" not in commands(tree)[SOURCE]
    (package,) = (tmp_path / "out").glob("lib*/bclip_fast")
    assert json.loads((package / "build_info.json").read_text())["no_hopper"] == reason
    assert not (package / "licenses").exists()


@pytest.mark.parametrize(
    ("version", "variables", "message"),
    [
        ("", {"BCLIP_CUTLASS": "1"}, "BCLIP_CUTLASS=1, but .*: CUTLASS is not installed"),
        ("", {"BCLIP_CUTLASS": "1", "BCLIP_CUDA": "0"}, "BCLIP_CUTLASS=1, but .*: BCLIP_CUDA=0"),
        ("", {"BCLIP_CUTLASS": "clone"}, "BCLIP_CUTLASS=clone, but .*: clone has no include/cutlass/version.h"),
        ("3.8.0", {"BCLIP_CUTLASS": "clone"}, "CUTLASS 3.8.0 in .*clone/include is older than 4.2.0"),
        ("4.2.0", {"BCLIP_CUTLASS": "clone"}, "clone lacks CUTLASS's LICENSE.txt"),
    ],
)
def test_demanded_cutlass_that_cannot_be_used_is_an_error(
    python: list[str],
    tree: Path,
    compilers: dict[str, str],
    tmp_path: Path,
    version: str,
    variables: dict[str, str],
    message: str,
):
    if version:
        write_cutlass(tree / "clone/include", None, version)
    run = build(python, tree, {**compilers, **variables}, tmp_path / "out")
    assert run.returncode != 0 and "Traceback" not in run.stderr
    assert re.search(message, run.stderr) and REMEDY in run.stderr

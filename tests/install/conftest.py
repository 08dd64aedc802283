"""The sdist of this tree, and the wheel that it gives where no compiler is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The programs on the PATH of the machine without a compiler.
FEW_PROGRAMS = ["sh", "env", "uname"]


@pytest.fixture(scope="session")
def bare_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment variables of a machine without compilers."""
    folder = tmp_path_factory.mktemp("bin")
    for name in FEW_PROGRAMS:
        (folder / name).symlink_to(str(shutil.which(name)))
    dropped = ("PATH", "CC", "CXX", "CUDA_HOME", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE")
    variables = {name: value for name, value in os.environ.items() if name not in dropped and "BCLIP" not in name}
    return {**variables, "PATH": str(folder)}


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory, bare_environment: dict[str, str]) -> Path:
    """The unpacked sdist, made by a machine without a compiler."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    files = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
    for name in filter(None, files):
        if not name.startswith("tests/compat/written") and (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    code = f"import setuptools.build_meta as backend; backend.build_sdist({str(out)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=tree, env=bare_environment, check=True, capture_output=True)
    (archive,) = out.iterdir()
    with tarfile.open(archive) as tar:
        tar.extractall(out, filter="data")
    return out / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="session")
def pure_build(sdist: Path, bare_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory):
    """(the wheel, the output of pip -v) of a build from the sdist without a compiler."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", str(out), "."]
    run = subprocess.run(
        command, cwd=sdist, env=bare_environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert run.returncode == 0, run.stdout
    (wheel,) = out.iterdir()
    return wheel, run.stdout


@pytest.fixture(scope="session")
def pure_package(pure_build: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH, with the installed package without compiled modules."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(pure_build[0]) as archive:
        archive.extractall(folder)
    # An editable installation of this tree adds a finder, which would find the tree's compiled modules.
    (folder / "sitecustomize.py").write_text(
        "import sys\nsys.meta_path[:] = [finder for finder in sys.meta_path if 'Editable' not in str(finder)]\n"
    )
    return folder

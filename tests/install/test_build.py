"""Builds of the package: the sdist, wheels with and without compiled modules, and the errors of a failed build."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def names_of(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def tags_of(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/WHEEL")]
        return re.findall(r"^Tag: (.+)$", archive.read(name).decode(), re.MULTILINE)


def package_files() -> list[str]:
    """The tracked files of the package, with their names in a wheel."""
    files = subprocess.check_output(["git", "ls-files", "bclip_fast", "benchmarks"], cwd=ROOT, text=True).split()
    return [re.sub(r"^benchmarks/", "bclip_fast/benchmarks/", name) for name in files if (ROOT / name).is_file()]


def test_sdist_holds_every_source_of_the_modules_and_no_tests(sdist: Path):
    sources = subprocess.check_output(["git", "ls-files", "csrc"], cwd=ROOT, text=True).split()
    needed = [name for name in sources if not name.startswith("csrc/cuda/emulator/")]
    assert len(needed) > 50
    assert [name for name in needed if not (sdist / name).is_file()] == []
    assert [path for path in sdist.rglob("*") if path.name == "tests" or path.suffix == ".so"] == []


def test_wheel_without_compiler_runs_everywhere(pure_build: tuple[Path, str]):
    wheel, output = pure_build
    assert tags_of(wheel) == ["py3-none-any"] and wheel.name.endswith("-py3-none-any.whl")
    names = names_of(wheel)
    assert [name for name in names if name.endswith((".so", ".cpp", ".cu"))] == []
    assert [name for name in names if re.search(r"(^|/)(tests?|csrc)/", name)] == []
    documents = (".md",)
    assert [name for name in package_files() if name not in names and not name.endswith(documents)] == []
    line = "bclip_fast: built without compiled modules: there is no C++ compiler (g++ is not on the PATH)"
    assert [text.strip() for text in output.splitlines() if "built with" in text] == [line]
    assert re.findall(r".*(?:deprecat|absent from|rror:|ackage would).*", output, re.IGNORECASE) == []


def test_wheel_with_compiled_modules_names_its_platform(tmp_path: Path):
    """The objects of `make` are up to date, so this compiles nothing."""
    base = ["-q", "egg_info", "--egg-base", str(tmp_path), "build", "--build-base", str(tmp_path / "build")]
    command = [sys.executable, "setup.py", *base, "bdist_wheel", "--dist-dir", str(tmp_path / "dist")]
    run = subprocess.run([*command, "--bdist-dir", str(tmp_path / "b")], cwd=ROOT, text=True, capture_output=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (wheel,) = (tmp_path / "dist").iterdir()
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert wheel.stat().st_size < 20e6
    assert tags_of(wheel) == [f"{python}-{python}-{platform}"]
    assert f"bclip_fast/_cpu{sysconfig.get_config_var('EXT_SUFFIX')}" in names_of(wheel)
    with zipfile.ZipFile(wheel) as archive:
        info = json.loads(archive.read("bclip_fast/build_info.json"))
    assert "bclip_fast._cpu" in info["modules"] and info["reason"] == ""


def build_modules(tree: Path, environment: dict[str, str], out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(out)]
    return subprocess.run(command, cwd=tree, env={"BCLIP_CUDA": "0", **environment}, text=True, capture_output=True)


@pytest.fixture
def compiler(tmp_path: Path) -> Path:
    """A compiler that accepts programs without the word in the file `refused`, and compiles nothing."""
    path = tmp_path / "compiler"
    path.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *-fsyntax-only*) program=$(/bin/cat); refused=$(/bin/cat {tmp_path}/refused)\n'
        'case "$program" in *"$refused"*) echo "cannot find it" >&2; exit 1;; esac; exit 0;; esac\n'
        "echo 'some.cpp: internal compiler fault' >&2; exit 1\n"
    )
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        ("<vector>", r"The compiler .*compiler cannot compile an empty program.\ncannot find it"),
        ("<Python.h>", r"Python.h is missing in .*\n.*apt-get install python3-dev"),
        ("<jpeglib.h>", r"jpeglib.h of libjpeg-turbo is missing.*\n.*apt-get install libjpeg-dev(.|\n)*BCLIP_JPEG=0"),
        ("nothing", r"The compilation failed; the compiler's message is above."),
    ],
)
def test_failed_compilation_is_an_error_with_its_remedy(
    sdist: Path, compiler: Path, bare_environment: dict[str, str], tmp_path: Path, refused: str, message: str
):
    """A package without compiled modules would be several times slower, so nobody gets it unasked."""
    (tmp_path / "refused").write_text(refused)
    out = tmp_path / "out"
    run = build_modules(sdist, {**bare_environment, "CXX": str(compiler)}, out)
    assert run.returncode != 0
    assert re.search(message, run.stderr)
    assert run.stderr.rstrip().endswith("BCLIP_COMPILED=0.") and "Traceback" not in run.stderr
    allowed = build_modules(sdist, {**bare_environment, "CXX": str(compiler), "BCLIP_COMPILED": "0"}, out)
    assert allowed.returncode == 0, allowed.stderr
    assert "built without compiled modules: BCLIP_COMPILED=0" in allowed.stdout


def test_build_output_has_no_warning(sdist: Path, bare_environment: dict[str, str], tmp_path: Path):
    """Under make, ninja would complain of make's jobserver. The compiler here writes empty files."""
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done\n')
    compiler.chmod(0o755)
    variables = {"CXX": str(compiler), "MAKEFLAGS": " -j2 --jobserver-auth=3,4", "PYTHONWARNINGS": "default"}
    run = build_modules(sdist, {**bare_environment, **variables}, tmp_path / "out")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "link bclip_fast._cpu.so" in run.stdout
    assert re.findall(r".*(?:warning|error|deprecat).*", run.stdout + run.stderr, re.IGNORECASE) == []


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"BCLIP_COMPILED": "1"}, "BCLIP_COMPILED=1, but compiled modules cannot be built: there is no C++ compiler"),
        ({"BCLIP_COMPILED": "yes"}, "BCLIP_COMPILED='yes' is unknown; set it to 0, 1 or auto"),
        ({"BCLIP_CUDA": "1"}, "BCLIP_CUDA=1, but compiled modules cannot be built: there is no C++ compiler"),
    ],
)
def test_demanded_modules_that_cannot_be_built_are_an_error(
    sdist: Path, bare_environment: dict[str, str], tmp_path: Path, variables: dict[str, str], message: str
):
    run = build_modules(sdist, {**bare_environment, **variables}, tmp_path / "out")
    assert run.returncode != 0 and message in run.stderr and "Traceback" not in run.stderr

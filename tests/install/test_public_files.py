"""Files for the public agree with the project: one version, workflows that call make, the supported Pythons."""

from __future__ import annotations

import datetime
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from bclip_fast.version import __version__

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def steps(workflow: Path) -> list[dict[str, Any]]:
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"].values()
    return [step for job in jobs for step in job["steps"]]


def matrix_values(key: str) -> list[str]:
    """The values of a key in the matrix of the tests."""
    matrix = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]["test"]["strategy"]["matrix"]
    return [str(entry[key]) for entry in matrix["include"]]


def pythons() -> list[str]:
    """The Pythons of the classifiers, oldest first."""
    return re.findall(r'"Programming Language :: Python :: (3\.\d+)"', read("pyproject.toml"))


def test_version_is_the_same_everywhere():
    citation = yaml.safe_load(read("CITATION.cff"))
    recipe = yaml.safe_load(read("packaging/conda/recipe.yaml"))
    newest = re.search(r"^## \[(\d+\.\d+\.\d+)\] - (.+)$", read("CHANGELOG.md"), re.MULTILINE)
    assert newest is not None
    assert [citation["version"], recipe["context"]["version"], newest[1]] == [__version__] * 3
    assert newest[2] == "unreleased" or datetime.date.fromisoformat(newest[2])
    assert 'dynamic = ["version", ' in read("pyproject.toml")


def test_pyproject_can_be_read_by_old_setuptools():
    """setuptools before 77, which Python 3.11's venv brings, refuses a licence expression there (see setup.py)."""
    assert not re.search(r"^license", read("pyproject.toml"), re.MULTILINE)


def test_changelog_has_only_the_sections_of_keep_a_changelog():
    sections = set(re.findall(r"^### (.+)$", read("CHANGELOG.md"), re.MULTILINE))
    assert sections <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert "Added" in sections


def test_tests_run_on_every_supported_python_and_the_oldest_torch():
    assert sorted(set(matrix_values("python"))) == sorted(pythons())
    assert re.search(r'requires-python = ">=(.+)"', read("pyproject.toml"))[1] == pythons()[0]
    assert re.search(r'dependencies = \["torch>=(.+)"\]', read("pyproject.toml"))[1] + ".0" in matrix_values("torch")
    built = re.search(r"^build = (\[.+\])$", read("pyproject.toml"), re.MULTILINE)[1]
    assert re.findall(r"cp3(\d+)-", built) == [version.removeprefix("3.") for version in pythons()]
    assert f"Python {pythons()[0]} to {pythons()[-1]}" in read("docs/install.md")


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflow_calls_targets_of_the_makefile(workflow: Path):
    commands = [step["run"] for step in steps(workflow) if "run" in step]
    targets = [shlex.split(command)[1] for command in commands if command.startswith("make ")]
    others = [command for command in commands if not command.startswith(("make ", "sudo apt-get "))]
    matrix = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"].get("long", {}).get("strategy", {})
    targets = [name for target in targets for name in (matrix["matrix"]["target"] if "$" in target else [target])]
    known = set(re.findall(r"^([\w-]+):", read("Makefile"), re.MULTILINE))
    assert targets
    assert [target for target in targets if target not in known] == []
    assert others == []


def test_workflows_are_read_as_github_reads_them():
    """YAML reads the key `on` as True, and a Python such as 3.10 without quotes as the number 3.1."""
    for workflow in WORKFLOWS:
        content = yaml.safe_load(workflow.read_text(encoding="utf-8"))
        assert {"name", True, "jobs", "permissions"} <= content.keys()
        assert all(
            re.fullmatch(r"[\w.-]+/[\w.-]+@[\w./-]+", step["uses"]) for step in steps(workflow) if "uses" in step
        )
        versions = [
            step["with"]["python-version"] for step in steps(workflow) if "python-version" in step.get("with", {})
        ]
        assert all(isinstance(version, str) for version in versions)


def test_dockerfile_installs_extras_that_exist_and_copies_what_the_build_needs():
    text = read("Dockerfile")
    extras = set(
        re.findall(r"^(\w+) = \[", read("pyproject.toml").partition("[project.optional-dependencies]")[2], re.M)
    )
    assert set(re.search(r"^ARG EXTRAS=(.+)$", text, re.MULTILINE)[1].split(",")) <= extras
    assert re.search(r"^USER \d+$", text, re.MULTILINE)
    copied = {line.removeprefix("!") for line in read(".dockerignore").splitlines() if line.startswith("!")}
    tracked = {
        name.partition("/")[0] for name in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split()
    }
    assert copied <= tracked
    assert {"setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "csrc", "bclip_fast"} <= copied


def test_cutlass_of_the_makefile_is_the_one_of_the_dockerfile():
    (cutlass,) = re.findall(r"^CUTLASS \?= (\S+)$", read("Makefile"), re.MULTILINE)
    assert f"ARG CUTLASS={cutlass}\n" in read("Dockerfile")


def test_torch_of_the_makefile_is_the_one_of_the_dockerfile():
    (torch,) = re.findall(r"^TORCH \?= (\S+)$", read("Makefile"), re.MULTILINE)
    assert f"ARG TORCH={torch}\n" in read("Dockerfile")
    assert torch.removeprefix("torch==") in matrix_values("torch")

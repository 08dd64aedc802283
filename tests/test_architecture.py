"""The rules that hold everywhere, so that none of them is only prose. The floors themselves are import-linter's."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [
    path
    for folder, pattern in [("bclip_fast", "*.py"), ("benchmarks", "*.py"), ("tests", "*.py"), ("csrc", "*.*")]
    for path in sorted((ROOT / folder).rglob(pattern))
]
OPTIONAL = ["triton", "deepspeed", "transformers", "tyro", "rich", "numpy.testing", "PIL", "lxml", "pyarrow"]
OPTIONAL += ["tokenizers", "safetensors", "huggingface_hub", "jinja2", "matplotlib", "nvidia.dali", "bclip_fast._cuda"]


@pytest.fixture(scope="module")
def imports() -> list[dict[str, Any]]:
    """Of three processes that have torch: the modules that two imports load, and the seconds they take together."""
    code = (
        "import json, sys, time, torch; before, start = set(sys.modules), time.perf_counter(); import bclip_fast; "
        "package = [*(sys.modules.keys() - before)]; import bclip_fast.ops, bclip_fast.loss; "
        "from bclip_fast import ops, ClipLoss; seconds = time.perf_counter() - start; "
        "print(json.dumps({'package': package, 'loss': [*(sys.modules.keys() - before)], 'seconds': seconds}))"
    )
    return [json.loads(subprocess.check_output([sys.executable, "-c", code])) for _ in range(3)]


@pytest.mark.parametrize("statement", ["package", "loss"])
def test_an_import_loads_nothing_optional(imports, statement):
    assert "bclip_fast" in imports[0][statement]
    assert not [name for name in OPTIONAL if name in imports[0][statement]]


def test_the_import_takes_under_a_fifth_of_a_second_beyond_torch(imports):
    assert min(one["seconds"] for one in imports) < 0.2


def test_no_file_is_longer_than_600_lines():
    long = {path.name: len(path.read_text().splitlines()) for path in SOURCES}
    assert not {name: length for name, length in long.items() if length > 600}


def test_no_torch_header_in_csrc():
    pattern = re.compile(r"#include\s*<(torch|ATen|c10)/")
    native = [path for path in SOURCES if path.is_relative_to(ROOT / "csrc")]
    assert not [path.name for path in native if pattern.search(path.read_text())]


def test_the_package_does_not_print():
    """Only what stands at the terminal's end prints: the command line, the doctor, the verifier."""
    allowed = {"cli.py", "doctor.py", "quickstart.py", "verify.py"}
    pattern = re.compile(r"^\s*print\(", re.MULTILINE)
    package = [path for path in SOURCES if path.is_relative_to(ROOT / "bclip_fast") and path.name not in allowed]
    assert not [path.name for path in package if pattern.search(path.read_text())]


def test_each_operator_has_a_reference_a_test_and_a_benchmark():
    cases = (ROOT / "benchmarks/cases.py").read_text()
    operators = [path.name for path in (ROOT / "bclip_fast/ops").iterdir() if (path / "__init__.py").exists()]
    assert sorted(operators) == ["affine", "attention", "contrastive", "image", "pointwise"]
    for name in operators:
        assert (ROOT / f"bclip_fast/ops/{name}/reference.py").is_file()
        assert (ROOT / f"tests/ops/test_{name}.py").is_file()
        assert f'operator="{name}"' in cases

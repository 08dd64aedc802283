"""The rules that hold everywhere, so that none of them is only prose. The floors themselves are import-linter's."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [
    path
    for folder, pattern in [("bclip_fast", "*.py"), ("benchmarks", "*.py"), ("tests", "*.py"), ("csrc", "*.*")]
    for path in sorted((ROOT / folder).rglob(pattern))
]
OPTIONAL = ["triton", "deepspeed", "transformers", "tyro", "rich", "numpy.testing", "PIL", "lxml", "pyarrow"]
OPTIONAL += ["tokenizers", "safetensors", "huggingface_hub", "jinja2", "matplotlib", "nvidia.dali", "bclip_fast._cuda"]


def loaded_by(statement: str) -> set[str]:
    code = f"import torch, sys; before = set(sys.modules); {statement}; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("statement", ["import bclip_fast", "import bclip_fast.ops, bclip_fast.loss"])
def test_an_import_loads_nothing_optional(statement):
    loaded = loaded_by(statement)
    assert not [name for name in OPTIONAL if name in loaded]


def test_the_import_takes_under_a_fifth_of_a_second_beyond_torch():
    code = (
        "import torch, time; start = time.perf_counter(); import bclip_fast; from bclip_fast import ops, ClipLoss; "
        "print(time.perf_counter() - start)"
    )
    times = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(3)]
    assert min(times) < 0.2


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

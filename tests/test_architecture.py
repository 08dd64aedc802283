"""The rules that hold everywhere, so that none of them is only prose. The floors themselves are import-linter's."""

from __future__ import annotations

import ast
import json
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


@pytest.fixture(scope="module")
def imports() -> dict[str, list[str]]:
    """The modules that two imports add to a process that has torch."""
    code = (
        "import json, sys, torch; before = set(sys.modules); import bclip_fast; "
        "package = [*(sys.modules.keys() - before)]; import bclip_fast.ops, bclip_fast.loss; "
        "from bclip_fast import ops, ClipLoss; "
        "print(json.dumps({'package': package, 'loss': [*(sys.modules.keys() - before)]}))"
    )
    return json.loads(subprocess.check_output([sys.executable, "-c", code]))


@pytest.mark.parametrize("statement", ["package", "loss"])
def test_an_import_loads_nothing_optional(imports, statement):
    assert "bclip_fast" in imports[statement]
    assert not [name for name in OPTIONAL if name in imports[statement]]


@pytest.mark.parametrize("statement", ["package", "loss"])
def test_an_import_adds_only_modules_of_the_package_the_standard_library_and_torch(imports, statement):
    """The import is fast as long as it loads little: a new module that it loads must be wanted."""
    allowed = {"bclip_fast", "torch", *sys.stdlib_module_names}
    others = sorted(name for name in imports[statement] if name.partition(".")[0] not in allowed)
    assert not others
    # Of the package, what the operators and the losses are made of; nothing slow of torch.
    wanted = (
        "bclip_fast.loss",
        "bclip_fast.ops",
        "bclip_fast._",
        "bclip_fast.errors",
        "bclip_fast.io",
        "bclip_fast.log",
        "bclip_fast.threads",
        "bclip_fast.version",
    )
    own = [name for name in imports[statement] if name.startswith("bclip_fast.")]
    assert [name for name in own if not name.startswith(wanted)] == []
    assert statement == "loss" or not [name for name in own if name.startswith(wanted[:3])]
    slow = ("torch._dynamo", "torch._inductor", "torch.utils.tensorboard")
    assert [name for name in imports[statement] if name.startswith(slow)] == []


def test_the_stub_gives_the_public_names():
    """`__init__.py` imports nothing of the package's parts, so `__init__.pyi` must name them all."""
    import bclip_fast

    stub = ast.parse((ROOT / "bclip_fast" / "__init__.pyi").read_text())
    names = [alias.asname for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(filter(None, names)) == sorted(bclip_fast.__all__)


def test_no_file_is_longer_than_600_lines():
    long = {path.name: len(path.read_text().splitlines()) for path in SOURCES}
    assert not {name: length for name, length in long.items() if length > 600}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_definitions(tree: ast.Module) -> set[str]:
    """The private functions, classes, variables and attributes that a module defines."""
    names = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    names |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    return {name for name in names if is_private(name)}


def private_uses(trees: dict[Path, ast.Module]) -> list[str]:
    """ "file:line name" of every private name that a module takes from a module of another folder.

    An attribute counts when a module of another folder defines its name and none of the same folder does.
    """
    by_folder: dict[Path, set[str]] = {}
    for path, tree in trees.items():
        by_folder.setdefault(path.parent, set()).update(private_definitions(tree))
    uses = []
    for path, tree in trees.items():
        foreign = set().union(*(names for folder, names in by_folder.items() if folder != path.parent))
        foreign -= by_folder[path.parent]
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                parts = (node.module or "").split(".") if node.module else []
                folder = path.parents[node.level - 1] if node.level else ROOT
                module = folder.joinpath(*parts)
                is_ours = bool(node.level) or parts[:1] == ["bclip_fast"]
                package = module if module.is_dir() else module.parent
                if is_ours and package != path.parent:
                    names = [alias.name for alias in node.names if is_private(alias.name)]
                    # The compiled modules, which the package __init__ doesn't define.
                    names = [name for name in names if name not in ("_cpu", "_cuda")]
                    uses += [f"{path}:{node.lineno} {name}" for name in names]
            elif isinstance(node, ast.Attribute) and node.attr in foreign:
                uses.append(f"{path}:{node.lineno} {node.attr}")
    return uses


def test_private_names_are_used_in_their_own_folder_only():
    modules = [path for path in SOURCES if path.is_relative_to(ROOT / "bclip_fast") and path.suffix == ".py"]
    assert private_uses({path: ast.parse(path.read_text()) for path in modules}) == []


def test_private_names_of_other_folders_are_reported():
    package = ROOT / "bclip_fast"
    texts = {
        package / "eval" / "owner.py": "class Owner:\n    def _rows(self): ...\n",
        package / "eval" / "peer.py": "from .owner import _rows\nowner._rows()\n",
        package
        / "train"
        / "guest.py": "from ..eval.owner import _rows\nfrom bclip_fast.eval import _rows\nowner._rows()\n",
    }
    uses = private_uses({path: ast.parse(text) for path, text in texts.items()})
    assert [use.rpartition("/")[2] for use in uses] == ["guest.py:1 _rows", "guest.py:2 _rows", "guest.py:3 _rows"]


def test_no_torch_header_in_csrc():
    pattern = re.compile(r"#include\s*<(torch|ATen|c10)/")
    native = [path for path in SOURCES if path.is_relative_to(ROOT / "csrc")]
    assert not [path.name for path in native if pattern.search(path.read_text())]


def test_the_package_does_not_print():
    """Only what stands at the terminal's end prints: the command line, the doctor, the verifier."""
    allowed = {"cli.py", "doctor.py", "quickstart.py", "tune.py", "verify.py"}
    pattern = re.compile(r"^\s*print\(", re.MULTILINE)
    package = [path for path in SOURCES if path.is_relative_to(ROOT / "bclip_fast") and path.name not in allowed]
    assert not [path.name for path in package if pattern.search(path.read_text())]


def test_each_operator_has_a_reference_a_test_and_a_benchmark():
    cases = (ROOT / "benchmarks/cases.py").read_text()
    operators = [path.name for path in (ROOT / "bclip_fast/ops").iterdir() if (path / "__init__.py").exists()]
    assert sorted(operators) == ["attention", "contrastive", "image", "matmul", "pointwise"]
    for name in operators:
        assert (ROOT / f"bclip_fast/ops/{name}/reference.py").is_file()
        assert (ROOT / f"tests/ops/test_{name}.py").is_file()
        # A name that users type and that results on disk have: `bclip bench affine`.
        assert f'operator="{"affine" if name == "matmul" else name}"' in cases

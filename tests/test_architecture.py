"""Tests of the rules that hold everywhere: imports, layout, length of files, private names.

import-linter checks the layers.
"""

from __future__ import annotations

import ast
import fnmatch
import functools
import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE, TESTS = ROOT / "bclip_fast", ROOT / "tests"
MODULES = sorted(PACKAGE.rglob("*.py"))
TEST_MODULES = sorted(TESTS.rglob("test_*.py"))
PYTHON = [ROOT / "setup.py", *MODULES]
PYTHON += [path for name in ("benchmarks", "docs", "examples", "tests") for path in sorted((ROOT / name).rglob("*.py"))]
MANUALS = [
    path for folder in (ROOT, ROOT / "docs", PACKAGE, ROOT / "benchmarks") for path in sorted(folder.glob("*.md"))
]
NATIVE = sorted(path for path in (ROOT / "csrc").rglob("*.*") if path.is_file())

SOURCE_NAMES = {path.name for path in [*PYTHON, *NATIVE]}

MAX_LINES = 350
MAX_NATIVE_LINES = 600
# Python files that may be longer, with the reason.
LONG_FILES: dict[str, str] = {}
OPERATORS = ["attention", "contrastive", "image", "matmul", "pointwise"]
# Folders of tests that mirror no package.
OTHER_TESTS = {"benchmarks", "cli", "compat", "csrc", "docs", "faults", "fuzz", "install", "portable", "support"}

OPTIONAL = ["triton", "deepspeed", "transformers", "tyro", "rich", "numpy.testing", "PIL", "lxml", "pyarrow"]
OPTIONAL += ["tokenizers", "safetensors", "huggingface_hub", "jinja2", "matplotlib", "nvidia.dali", "bclip_fast._cuda"]


@functools.cache
def parse(path: Path) -> ast.Module:
    """Return the syntax tree of a module. All tests share it."""
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def num_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# Imports.


@pytest.fixture(scope="module")
def imports() -> dict[str, list[str]]:
    """The modules that two import statements add to a process with torch."""
    code = (
        "import json, sys, torch; before = set(sys.modules); import bclip_fast; "
        "package = [*(sys.modules.keys() - before)]; import bclip_fast.ops, bclip_fast.loss; "
        "from bclip_fast import ops, ClipLoss; "
        "print(json.dumps({'package': package, 'loss': [*(sys.modules.keys() - before)]}))"
    )
    return json.loads(subprocess.check_output([sys.executable, "-c", code]))


@pytest.mark.parametrize("statement", ["package", "loss"])
def test_import_loads_no_optional_package(imports, statement):
    assert "bclip_fast" in imports[statement]
    assert not [name for name in OPTIONAL if name in imports[statement]]


@pytest.mark.parametrize("module", ["bclip_fast.ingest.build", "bclip_fast.data.image_files"])
def test_import_loads_no_torch(module):
    """Every worker of ingest imports these modules. Torch would take most of their start."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("statement", ["package", "loss"])
def test_import_loads_few_modules(imports, statement):
    """The import stays fast only if it loads little, so this test lists the modules that it may load."""
    allowed = {"bclip_fast", "torch", *sys.stdlib_module_names}
    assert sorted(name for name in imports[statement] if name.partition(".")[0] not in allowed) == []
    with_operators = ("bclip_fast.distributed", "bclip_fast.loss", "bclip_fast.ops", "bclip_fast._")
    always = tuple(f"bclip_fast.{name}" for name in ("errors", "io", "log", "threads", "version"))
    modules = [name for name in imports[statement] if name.startswith("bclip_fast.")]
    assert [name for name in modules if not name.startswith(with_operators + always)] == []
    assert statement == "loss" or not [name for name in modules if name.startswith(with_operators)]
    slow = ("torch._dynamo", "torch._inductor", "torch.utils.tensorboard")
    assert [name for name in imports[statement] if name.startswith(slow)] == []


def test_stub_names_all_public_names():
    """`__init__.py` imports its names on first use, so type checkers need them in `__init__.pyi`."""
    import bclip_fast

    stub = ast.parse((PACKAGE / "__init__.pyi").read_text())
    names = [alias.asname for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(filter(None, names)) == sorted(bclip_fast.__all__)


# Layout.


def test_python_files_above_the_limit_have_a_reason():
    long = {relative(path): num_lines(path) for path in PYTHON if num_lines(path) > MAX_LINES}
    assert {name: lines for name, lines in long.items() if name not in LONG_FILES} == {}
    assert sorted(set(LONG_FILES) - set(long)) == [], "remove these names from LONG_FILES"


def test_native_files_are_below_their_limit():
    assert {relative(path): num_lines(path) for path in NATIVE if num_lines(path) > MAX_NATIVE_LINES} == {}


def test_modules_are_not_named_after_leftovers():
    leftovers = {"common", "helper", "helpers", "misc", "util", "utils"}
    names = {path: {path.stem, path.parent.name} for path in PYTHON}
    assert [relative(path) for path, parts in names.items() if parts & leftovers] == []


def imported_names(path: Path) -> set[str]:
    """Return the modules that a file imports, as written in it."""
    names = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_test_modules_import_from_support_only():
    names = {path.stem for path in TEST_MODULES}
    assert [relative(path) for path in TEST_MODULES if names & imported_names(path)] == []


def test_test_folders_mirror_the_package():
    folders = {path.parent.relative_to(TESTS).parts[0] for path in TEST_MODULES if path.parent != TESTS}
    assert [name for name in folders - OTHER_TESTS if not (PACKAGE / name / "__init__.py").is_file()] == []
    top_level = sorted(path.name for path in TEST_MODULES if path.parent == TESTS)
    assert top_level == ["test_architecture.py", "test_prose.py"]


def test_operators_have_reference_test_and_case():
    packages = [path.parent.name for path in sorted((PACKAGE / "ops").glob("*/__init__.py"))]
    assert packages == OPERATORS
    for name in OPERATORS:
        assert (PACKAGE / f"ops/{name}/reference.py").is_file()
        assert (TESTS / f"ops/test_{name}.py").is_file()
        assert "Case(" in (ROOT / f"benchmarks/cases/{name}.py").read_text()


# Manuals.


def missing_paths(text: str) -> list[str]:
    """Return the paths in backticks, such as `ops/<op>/cpu.py`, without a file below the root or the package.

    `<op>`, NAME and * stand for any name. Without a folder, only source files count, and they may be in any folder.
    """
    missing = []
    for path in re.findall(r"`([\w./*<>-]+\.[a-z]{1,6})`", text):
        pattern = re.sub(r"<\w+>|\b[A-Z]{2,}\b", "*", path)
        if "/" in path:
            exists = any(list(folder.glob(pattern)) for folder in (ROOT, PACKAGE))
        else:
            exists = not path.endswith((".py", ".h", ".cpp", ".cu", ".cuh")) or fnmatch.filter(SOURCE_NAMES, pattern)
        if not exists:
            missing.append(path)
    return missing


@pytest.mark.parametrize("manual", MANUALS, ids=relative)
def test_paths_in_manuals_exist(manual):
    assert missing_paths(manual.read_text(encoding="utf-8")) == []


def test_missing_paths_reports_files_that_moved():
    text = "`ops/tuning.py`, `ops/<op>/cpu.py`, `eval/tasks/NAME.toml`, `metrics.jsonl`, `loss/tuning.py`, `reads.py`"
    assert missing_paths(text) == ["loss/tuning.py", "reads.py"]


def test_links_in_manuals_exist():
    links = [(path, link) for path in MANUALS for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text("utf-8"))]
    assert [f"{relative(path)}: {link}" for path, link in links if not (path.parent / link).exists()] == []


def test_architecture_lines_have_at_most_100_characters():
    lines = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").splitlines()
    assert [number for number, line in enumerate(lines, 1) if len(line) > 100] == []


# Code.


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


class PrivateNames:
    """The private names that a module defines and uses, collected in one walk over its syntax tree."""

    def __init__(self, path: Path, tree: ast.Module) -> None:
        self.path = path
        self.defined: set[str] = set()
        self.attributes: list[tuple[int, str]] = []
        self.imported: list[tuple[int, str]] = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                if is_private(node.attr):
                    self.attributes.append((node.lineno, node.attr))
                    if isinstance(node.ctx, ast.Store):
                        self.defined.add(node.attr)
            elif isinstance(node, ast.Name):
                if isinstance(node.ctx, ast.Store) and is_private(node.id):
                    self.defined.add(node.id)
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                if is_private(node.name):
                    self.defined.add(node.name)
            elif isinstance(node, ast.ImportFrom) and self._imports_other_folder(node):
                # _cpu and _cuda are the compiled modules.
                names = [alias.name for alias in node.names if alias.name not in ("_cpu", "_cuda")]
                self.imported += [(node.lineno, name) for name in names if is_private(name)]

    def _imports_other_folder(self, node: ast.ImportFrom) -> bool:
        parts = node.module.split(".") if node.module else []
        if not node.level and parts[:1] != ["bclip_fast"]:
            return False
        module = (self.path.parents[node.level - 1] if node.level else ROOT).joinpath(*parts)
        return (module if module.is_dir() else module.parent) != self.path.parent


def private_uses(modules: Iterable[PrivateNames]) -> list[str]:
    """Return "file:line name" for each use of a private name of another folder.

    An attribute counts if a module of another folder defines its name and no module of the same folder does.
    """
    modules = list(modules)
    by_folder: dict[Path, set[str]] = defaultdict(set)
    for module in modules:
        by_folder[module.path.parent] |= module.defined
    uses = []
    for module in modules:
        folder = module.path.parent
        foreign = set().union(*(names for other, names in by_folder.items() if other != folder)) - by_folder[folder]
        attributes = [(line, name) for line, name in module.attributes if name in foreign]
        uses += [f"{module.path}:{line} {name}" for line, name in sorted(module.imported + attributes)]
    return uses


def test_private_names_stay_in_their_folder():
    assert private_uses(PrivateNames(path, parse(path)) for path in MODULES) == []


def test_private_uses_reports_names_of_other_folders():
    guest = "from ..eval.owner import _rows\nfrom bclip_fast.eval import _rows\nowner._rows()\n"
    sources = {
        PACKAGE / "eval" / "owner.py": "class Owner:\n    def _rows(self): ...\n",
        PACKAGE / "eval" / "peer.py": "from .owner import _rows\nowner._rows()\n",
        PACKAGE / "train" / "guest.py": guest,
    }
    uses = private_uses(PrivateNames(path, ast.parse(source)) for path, source in sources.items())
    assert [use.rpartition("/")[2] for use in uses] == ["guest.py:1 _rows", "guest.py:2 _rows", "guest.py:3 _rows"]


def test_native_code_includes_no_torch_header():
    pattern = re.compile(r"#include\s*[<\"](torch|ATen|c10)/")
    assert [relative(path) for path in NATIVE if pattern.search(path.read_text())] == []


def test_only_command_line_modules_print():
    names = "cli completion doctor/__init__ doctor/packages ingest/check ingest/verify plan/command quickstart tune"
    names += " eval/fetch search/searcher export/command export/push"
    allowed = {f"bclip_fast/{name}.py" for name in names.split()}
    pattern = re.compile(r"^\s*print\(", re.MULTILINE)
    modules = [path for path in MODULES if relative(path) not in allowed]
    assert [relative(path) for path in modules if pattern.search(path.read_text())] == []

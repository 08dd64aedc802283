"""`bclip doctor` on packages that are installed and can't be imported, of made-up distributions."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from bclip_fast.doctor import packages

PACKAGES = {
    "sound": "import json",
    "stale-link": "raise RuntimeError('operator stale::nms does not exist\\nmore')",
    "missing_part": "import no_such_module",
    "segfault": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "aborts": "import os; os.abort()",
    "leaves": "import os; os._exit(3)",
    "quits": "raise SystemExit(4)",
    "prints": "print('noise' * 9999); import sys; sys.stderr.write('x' * 99999)",
    "hangs": "import time; time.sleep(99)",
}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed distributions, on the path of this process and of its children."""
    for name, code in PACKAGES.items():
        module = name.replace("-", "_")
        (tmp_path / module).mkdir()
        (tmp_path / module / "__init__.py").write_text(code + "\n")
        info = tmp_path / f"{module}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
        (info / "RECORD").write_text(f"{module}/__init__.py,,\n{module}-1.5.dist-info/RECORD,,\n")
    # Without torch the children start at once.
    (tmp_path / "torch.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(packages, "IMPORT_LIMIT_S", 2)
    return tmp_path


def test_doctor_tells_which_packages_cannot_be_imported_and_why(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "_extras", lambda: {"eval": [*PACKAGES, "absent"]})
    monkeypatch.setattr(packages, "_INTEGRATIONS", ["sound"])
    start = time.monotonic()
    lines = packages.lines(packages.report(imports=True))
    assert time.monotonic() - start < 30
    row = next(line for line in lines if line.startswith("  eval"))
    assert "sound 1.5, stale-link 1.5 (cannot be imported), " in row and "prints 1.5, " in row
    assert "absent (not installed)" in row
    reasons = dict(line.split(maxsplit=1) for line in lines[lines.index("Packages that cannot be imported") + 1 :])
    assert reasons == {
        "stale-link": "RuntimeError: operator stale::nms does not exist more",
        "missing_part": "ModuleNotFoundError: No module named 'no_such_module'",
        "segfault": "its import crashes (SIGSEGV)",
        "aborts": "its import crashes (SIGABRT)",
        "leaves": "its import ends Python with status 3",
        "quits": "SystemExit: 4",
        "hangs": "its import takes more than 2 s",
    }


def test_module_of_a_distribution_is_found() -> None:
    modules = {"pillow": "PIL", "huggingface_hub": "huggingface_hub", "pytest-xdist": "xdist", "no-such-package": None}
    assert {name: packages._module_of(name) for name in modules} == modules

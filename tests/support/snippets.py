"""Run the cells of README and of the tutorials, and compare their output with the expected one."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from bclip_fast.cli import main

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from docs.generate.cells import Cell, read  # noqa: E402

__all__ = ["ROOT", "Cell", "command", "read", "run", "unlike"]


def run(cells: list[Cell], source: Path) -> None:
    """Run all cells in the working directory, the Python ones in one namespace.

    Raises:
        AssertionError: an output differs from the expected one. The message names file and line.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells:
        if cell.kind == "markdown":
            continue
        place = f"{source.relative_to(ROOT)}:{cell.line}"
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            if cell.kind == "python":
                exec(compile(cell.text, place, "exec"), namespace)
            else:
                for line in cell.text.replace("\\\n", " ").splitlines():
                    command(line, place)
        difference = unlike(output.getvalue(), cell.output)
        assert not difference, f"{place}: {difference}"


def unlike(output: str, expected: str | None) -> str:
    """Return the difference from the expected output, or "". Without an expected output, there may be none."""
    if expected is None:
        return f"the page shows no output, but the cell prints {output!r}" if output.strip() else ""
    pattern = re.escape(expected.strip()).replace(re.escape("..."), ".*")
    if re.fullmatch(pattern, output.strip(), re.DOTALL):
        return ""
    return f"the page shows\n{expected}\nbut the cell prints\n{output}"


def command(line: str, place: str) -> None:
    """Run one command: `bclip` in this process, others as processes. Both print to sys.stdout."""
    name, *args = shlex.split(line)
    if name == "bclip":
        status = main(args)
    else:
        # pytest-benchmark measures nothing in a worker of pytest-xdist, and `bclip bench` is not one.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment |= {"PATH": path, "OMP_NUM_THREADS": "1"}
        process = subprocess.run([name, *args], env=environment, capture_output=True, text=True)
        print(process.stdout, end="")
        status = process.returncode
        if status:
            print(process.stderr)
    assert status == 0, f"{place}: {line} ends with status {status}"

"""Commands whose writes fail at a chosen point: full disk, no permission, SIGTERM, SIGKILL."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
# The numbers of the actions in faults/injector.c.
ACTIONS = {"record": 0, "full": 1, "denied": 2, "term": 3, "kill": 4}
FAULTS = tuple(ACTIONS)[1:]
_NAMESPACE, _SPACE = 1, 2


@dataclass(frozen=True)
class Point:
    """The `number`-th call of this kind on a path below the watched folder. needs: bits of injector.c."""

    call: str
    path: str
    number: int
    needs: int = 0

    def can(self, fault: str) -> bool:
        """Return whether the fault can occur here."""
        if fault == "full":
            return bool(self.needs & _SPACE) or self.call in ("rename", "exchange")
        return fault != "denied" or bool(self.needs & _NAMESPACE)

    def __str__(self) -> str:
        return f"{self.call} {self.path} ({self.number})"


@dataclass(frozen=True)
class Outcome:
    """The end of a command. status: exit status, negative for a signal. text: stdout and stderr."""

    status: int
    text: str
    points: list[Point]


class FaultServer:
    """Runs commands in children of one process that has imported everything (support/fault_server.py)."""

    def __init__(self, folder: Path, modules: Sequence[str], package: Path = HERE.parents[1]) -> None:
        """Compile the injector in `folder` and start the process. Skip the test without a compiler.

        Args:
            modules: modules that the process imports once, for all commands.
            package: folder of the package `bclip_fast`.
        """
        compiler = os.environ.get("CC", "gcc")
        if shutil.which(compiler) is None:
            pytest.skip(f"the compiler {compiler} is not installed")
        self._folder = folder
        library = folder / "injector.so"
        source = HERE.parent / "faults" / "injector.c"
        subprocess.run(
            [compiler, "-O1", "-fPIC", "-shared", str(source), "-o", str(library), "-ldl", "-lpthread"], check=True
        )
        # One thread only, because a fork copies no others. BCLIP_LOG and caches of the user must not matter.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("BCLIP_")}
        environment |= {"LD_PRELOAD": str(library), "PYTHONPATH": str(package), "BCLIP_TUNE": "off"}
        environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
        environment |= {"ARROW_DEFAULT_MEMORY_POOL": "system", "COLUMNS": "160", "CUDA_VISIBLE_DEVICES": ""}
        environment |= {"BCLIP_CACHE": str(folder / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "fault_server.py"), *modules],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._read()["threads"] == 1

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def run(self, argv: Sequence[str], folder: Path, point: Point | None = None, fault: str = "record") -> Outcome:
        """Run `bclip ARGV` in `folder`, which is also the watched folder. `call MODULE:FUNCTION` calls a function."""
        request: dict[str, Any] = {
            "argv": list(argv), "folder": str(folder), "action": ACTIONS[fault],
            "watched": str(folder), "log": str(self._folder / "points"), "output": str(self._folder / "output"),
            "call": point.call if point else "", "path": point.path if point else "",
            "number": point.number if point else 0,
        }  # fmt: skip
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        status = self._read()["status"]
        text = (self._folder / "output").read_text(errors="replace")
        lines = (self._folder / "points").read_text(errors="surrogateescape").splitlines()
        fields = [line.split("\t") for line in lines]
        return Outcome(status, text, [Point(call, path, int(n), int(needs)) for call, path, n, needs in fields])

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

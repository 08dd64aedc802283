"""Whether installed packages can be imported: each is imported in a process of its own, which may crash or hang."""

from __future__ import annotations

import importlib.metadata
import json
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import PurePosixPath

LIMIT_S = 30
"""Time limit of one import, in seconds."""

# A process that imports torch once and then forks for each package, as many at a time as there are cores. A fork that
# crashes or hangs ends alone. Each line of the output names a module and the reason of its failure, or null.
_PROBE = """
import json, os, signal, sys

limit, modules = int(sys.argv[1]), sys.argv[2:]
try:
    import torch
except BaseException:
    pass
running = {}

def start(module):
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        running[child] = module, reader
        return
    os.close(reader)
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(limit)
    try:
        __import__(module)
        os._exit(0)
    except BaseException as error:
        while error.__cause__ is not None:  # the reason inside lazy imports
            error = error.__cause__
        os.write(writer, f"{type(error).__name__}: {' '.join(str(error).split())}"[:300].encode("utf-8", "replace"))
        os._exit(1)

def finish():
    child, status = os.wait()
    module, reader = running.pop(child)
    reason = os.read(reader, 4096).decode("utf-8", "replace")
    os.close(reader)
    print(json.dumps([module, os.waitstatus_to_exitcode(status), reason]), flush=True)

for module in modules:
    if len(running) >= (os.cpu_count() or 1):
        finish()
    start(module)
while running:
    finish()
"""


def failures(distributions: Iterable[str]) -> dict[str, str]:
    """The installed distributions that can't be imported, and why. Those that aren't installed are left out."""
    names = {name: module for name in distributions if (module := _module(name)) is not None}
    modules = sorted(set(names.values()))
    if not modules:
        return {}
    arguments = [sys.executable, "-c", _PROBE, str(LIMIT_S), *modules]
    try:
        run = subprocess.run(arguments, capture_output=True, text=True, timeout=LIMIT_S * len(modules) + 60)
        lines = run.stdout.splitlines()
    except subprocess.TimeoutExpired as error:
        lines = (error.stdout or b"").decode().splitlines() if isinstance(error.stdout, bytes) else []
    results = {module: _reason(code, text) for module, code, text in map(json.loads, lines)}
    reasons = {name: results.get(module, "its import wasn't tried") for name, module in names.items()}
    return {name: reason for name, reason in reasons.items() if reason}


def _reason(code: int, text: str) -> str:
    if code == 0:
        return ""
    if code == -signal.SIGALRM:
        return f"its import takes more than {LIMIT_S} s"
    if code < 0:
        return f"its import crashes ({signal.Signals(-code).name})"
    return text or f"its import ends Python with status {code}"


def _module(distribution: str) -> str | None:
    """The module of a distribution to import: that of its name, or its first outermost package. None if it has none."""
    try:
        files = [PurePosixPath(str(file)) for file in importlib.metadata.files(distribution) or ()]
    except importlib.metadata.PackageNotFoundError:
        return None
    packages = {".".join(file.parent.parts) for file in files if file.name == "__init__.py"}
    single = {file.name.partition(".")[0] for file in files if len(file.parts) == 1 and file.suffix in (".py", ".so")}
    candidates = {name for name in packages | single if all(part.isidentifier() for part in name.split("."))}
    outermost = [name for name in candidates if not any(name.startswith(f"{other}.") for other in candidates)]
    title = distribution.replace("-", "_").lower()

    def rank(name: str) -> tuple[bool, bool, bool, int, str]:
        return name.lower() != title, name in single, name.startswith("_"), name.count("."), name

    return min(outermost, key=rank, default=None)

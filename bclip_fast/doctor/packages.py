"""The installed packages of each extra, and those that can't be imported."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any

# Packages that no extra installs, but that integrations, checkpoints and evaluation work with.
_INTEGRATIONS = ["open_clip_torch", "torchvision", "timm", "transformers", "sentence-transformers"]

IMPORT_LIMIT_S = 30
"""Time limit of one import, in seconds."""

# A process that imports torch once and then forks for each package, as many at a time as there are cores. A fork that
# crashes or hangs ends by itself. Each line of the output names a module and the reason of its failure, or null.
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


def report(imports: bool) -> dict[str, Any]:
    """Return the packages of each extra, and of the integrations, with the version of each or None.

    imports: import the installed packages in other processes. Then `broken` has the reason of each that fails.
    """
    extras = _extras()
    names = {*itertools.chain(*extras.values(), _INTEGRATIONS)}
    return {
        "extras": {extra: {name: version(name) for name in packages} for extra, packages in extras.items()},
        "integrations": {name: version(name) for name in _INTEGRATIONS},
        "broken": _import_failures(names) if imports else {},
    }


def lines(found: dict[str, Any]) -> list[str]:
    """Return the lines about a `report`: versions, packages that are missing, and those that can't be imported."""
    out, broken = ["", "Packages, by extra"], found["broken"]

    def text(name: str, number: str | None) -> str:
        return f"{name} {number or '(not installed)'}{' (cannot be imported)' if name in broken else ''}"

    for extra, versions in found["extras"].items():
        out.append(f"  {extra:<12}{', '.join(itertools.starmap(text, versions.items()))}")
        if None in versions.values():
            out.append(f"  {'':<12}-> pip install 'bclip_fast[{extra}]'")
    out += ["", "Packages that bclip_fast works with"]
    out.append("  " + ", ".join(itertools.starmap(text, found["integrations"].items())))
    if broken:
        out += ["", "Packages that cannot be imported"]
        out += [f"  {name:<23} {reason}" for name, reason in sorted(broken.items())]
    return out


def _extras() -> dict[str, list[str]]:
    """The distributions that each extra adds itself, from the installed metadata."""
    extras: dict[str, list[str]] = {}
    for requirement in importlib.metadata.requires("bclip_fast") or ():
        match = re.match(r"([\w.-]+)[^;]*;.*extra == ['\"](\w+)['\"]", requirement)
        if match and match[1].replace("-", "_") != "bclip_fast" and "python_version" not in requirement:
            extras.setdefault(match[2], []).append(match[1])
    return extras


def version(distribution: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _import_failures(distributions: Iterable[str]) -> dict[str, str]:
    """The installed distributions that can't be imported, and why. Those that aren't installed are left out."""
    names = {name: module for name in distributions if (module := _module_of(name)) is not None}
    modules = sorted(set(names.values()))
    if not modules:
        return {}
    if not hasattr(os, "fork"):
        results = {module: _import_apart(module) for module in modules}
        return {name: results[module] for name, module in names.items() if results[module]}
    arguments = [sys.executable, "-c", _PROBE, str(IMPORT_LIMIT_S), *modules]
    try:
        run = subprocess.run(arguments, capture_output=True, text=True, timeout=IMPORT_LIMIT_S * len(modules) + 60)
        lines = run.stdout.splitlines()
    except subprocess.TimeoutExpired as error:
        lines = (error.stdout or b"").decode().splitlines() if isinstance(error.stdout, bytes) else []
    results = {module: _reason(code, text) for module, code, text in map(json.loads, lines)}
    reasons = {name: results.get(module, "its import wasn't tried") for name, module in names.items()}
    return {name: reason for name, reason in reasons.items() if reason}


def _import_apart(module: str) -> str:
    """The reason why a module can't be imported in a new process, or an empty string."""
    arguments = [sys.executable, "-c", f"import {module}"]
    try:
        run = subprocess.run(arguments, capture_output=True, text=True, errors="replace", timeout=IMPORT_LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"its import takes more than {IMPORT_LIMIT_S} s"
    lines = [line for line in run.stderr.splitlines() if line.strip()]
    return _reason(run.returncode, lines[-1][:300] if lines else "")


def _reason(code: int, text: str) -> str:
    if code == 0:
        return ""
    if hasattr(signal, "SIGALRM") and code == -signal.SIGALRM:
        return f"its import takes more than {IMPORT_LIMIT_S} s"
    if code < 0:
        return f"its import crashes ({signal.Signals(-code).name})"
    return text or f"its import ends Python with status {code}"


def _module_of(distribution: str) -> str | None:
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

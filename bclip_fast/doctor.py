"""`bclip doctor`: the installation, and the backend that each operator takes here, with reasons."""

from __future__ import annotations

import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import PurePosixPath

import torch

from bclip_fast import threads
from bclip_fast.errors import UserError
from bclip_fast.ops import BACKENDS, fingerprint, record_files, trials, tuning
from bclip_fast.ops.dispatch import MISSING, Decision
from bclip_fast.ops.record_files import Record
from bclip_fast.version import __version__

# Packages that no extra installs, but that integrations, checkpoints and evaluation work with.
_INTEGRATIONS = ["open_clip_torch", "torchvision", "timm", "transformers", "sentence-transformers"]

_HOW_TO_COMPILE = "on Linux, install a C++ compiler and the headers of libjpeg-turbo, and reinstall from source"

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


@dataclass(frozen=True)
class DoctorConfig:
    """Print backends, versions, devices, and the backend that each operator takes here, with reasons."""

    imports: bool = True
    """Import every optional package in a separate process, to tell which ones are broken. Takes some seconds."""


def run(config: DoctorConfig) -> None:
    """Print the report."""
    print("\n".join(lines()), flush=True)
    print("\n".join(package_lines(config.imports)))


def lines() -> list[str]:
    """Return the lines of the report about backends and devices."""
    out = [
        f"bclip_fast {__version__}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        f"Waiting threads: {threads.describe()}",
        "",
        "Backends" + (f" (BCLIP_BACKEND={os.environ['BCLIP_BACKEND']})" if "BCLIP_BACKEND" in os.environ else ""),
    ]
    out += [f"  {name:<12}{_backend(name)}" for name in BACKENDS]
    for device in _devices():
        out += ["", f"Backends of the next call on {device}", *(f"  {line}" for line in _choices(device))]
    out += ["", "CUDA"]
    out += [f"  {line}" for line in _cuda()]
    return out


def package_lines(imports: bool = True) -> list[str]:
    """Return the lines about optional packages: versions, those that are missing, those that can't be imported.

    imports: import the packages, in other processes.
    """
    extras, out = _extras(), ["", "Packages, by extra"]
    failures = _import_failures({*itertools.chain(*extras.values(), _INTEGRATIONS)}) if imports else {}
    for extra, names in [*extras.items(), ("", _INTEGRATIONS)]:
        if not extra:
            out += ["", "Packages that bclip_fast works with"]
        versions = [_version(name) + (" (cannot be imported)" if name in failures else "") for name in names]
        out.append(f"  {extra:<12}{', '.join(versions)}" if extra else f"  {', '.join(versions)}")
        if extra and any("not installed" in version for version in versions):
            out.append(f"  {'':<12}-> pip install 'bclip_fast[{extra}]'")
    if failures:
        out += ["", "Packages that cannot be imported"]
        out += [f"  {name:<23} {reason}" for name, reason in sorted(failures.items())]
    return out


def _backend(name: str) -> str:
    if name in MISSING:
        hint = {"cuda": _why_no_cuda_module(), "triton": "comes with torch's CUDA build", "cpu": _HOW_TO_COMPILE}
        return f"missing: {MISSING[name]}; {hint[name]}"
    if name == "triton":
        interpreted = " (interpreted: TRITON_INTERPRET=1)" if os.environ.get("TRITON_INTERPRET") == "1" else ""
        return f"installed, {_version('triton')}{interpreted}"
    if name == "cuda":
        return "installed" if torch.cuda.is_available() else "installed, but torch finds no device"
    if name == "torch":
        return "always available: torch's own attention"
    return _instruction_set() if name == "cpu" else "always available: plain PyTorch"


def _instruction_set() -> str:
    from bclip_fast import _cpu

    forced = " (BCLIP_CPU_ISA)" if "BCLIP_CPU_ISA" in os.environ else ""
    try:
        return f"installed, {_cpu.instruction_set()}{' and AMX' if _cpu.has_amx() else ''}{forced}"
    except ValueError as error:
        return f"installed, but {error}"


def _why_no_cuda_module() -> str:
    if "cpu" in MISSING:
        return "see cpu"
    if shutil.which("nvcc"):
        return "nvcc is on the PATH: reinstall with BCLIP_CUDA=1"
    return "it was built without nvcc: install the CUDA toolkit and reinstall"


def _devices() -> list[torch.device]:
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]


def _choices(device: torch.device) -> list[str]:
    """Describe the tuning record in use, and the backends of each operator and dtype by class of shapes."""
    try:
        record = tuning.of_device(device.type, device.index or 0)
        out = _record(record)
        decided = [*trials.decisions(device), *trials.other_head_decisions(device)]
        all_decisions = sorted(decided, key=lambda decision: decision.key[:2])
    except UserError as error:
        return [str(error)]
    except torch.OutOfMemoryError:
        return ["the device has no free memory"]
    for (operator, dtype), group in itertools.groupby(all_decisions, key=lambda decision: decision.key[:2]):
        decisions, name = list(group), f"{operator:<31}{dtype:<10}"
        pairs = [(decision.chosen or "nothing", _times(decision, record)) for decision in decisions]
        for chosen, times in dict.fromkeys(pairs):
            same = [each.shapes for each, pair in zip(decisions, pairs, strict=True) if pair == (chosen, times)]
            shapes = "; ".join(name or "any" for name in same) if any(same) else ""
            out.append(f"{name}{chosen:<11}{shapes:<19}{times}".rstrip())
            name = " " * len(name)
        out += [f"{name}not {', '.join(names)}: {reason}" for reason, names in _refusals(decisions).items()]
    return out


def _times(decision: Decision, record: Record) -> str:
    entry = record.entries.get(decision.key)
    if entry is None or not record.made:
        return ""
    return ", ".join(f"{name} {entry.ms[name]:.3g} ms" for name in entry.order if name in entry.ms)


def _refusals(decisions: list[Decision]) -> dict[str, list[str]]:
    """Refused backends by reason, except those that don't implement the operator."""
    refused: dict[str, list[str]] = {}
    for decision in decisions:
        for name, reason in decision.refusals.items():
            names = refused.setdefault(reason, [])
            if reason != "not implemented" and name not in names:
                names.append(name)
    return {reason: names for reason, names in refused.items() if names}


def _record(record: Record) -> list[str]:
    facts = ", ".join(value for key, value in record.fingerprint.items() if key not in ("device", "kernels") and value)
    out = [f"by {record.origin}{_age(record.made)}"]
    if record.path is not None:
        out.append(str(record.path))
    elif tuning.mode() == "":
        out.append("`bclip tune` measures this machine" + _outdated(record.fingerprint))
    return [*out, f"fingerprint: {facts}, kernels {record.fingerprint.get('kernels', 'none')}", ""]


def _age(made: str) -> str:
    if not made:
        return ""
    try:
        age = datetime.datetime.now(datetime.timezone.utc) - datetime.datetime.fromisoformat(made)
    except (ValueError, TypeError):
        return f", made {made}"
    days = age.days
    return f", made {made}, {days} day{'' if days == 1 else 's'} ago" if days > 0 else f", made {made}, today"


def _outdated(current: dict[str, str]) -> str:
    """Name the newest record of this device that no longer applies, and its differences."""
    try:
        paths = sorted(tuning.folder().glob("*.json"), key=lambda path: path.stat().st_mtime)
    except (OSError, RuntimeError):
        return ""
    for path in reversed(paths):
        try:
            other = record_files.load(path)
        except UserError:
            continue
        if other.made and all(other.fingerprint[key] == current[key] for key in ("name", "device")):
            differences = fingerprint.differences(other.fingerprint, current)
            return f"; its record {path.name} doesn't apply (there / now): {differences}"
    return ""


def _cuda() -> list[str]:
    out = [f"torch: CUDA {torch.version.cuda}" if torch.version.cuda else "torch: a CPU build"]
    if find_spec("bclip_fast._cuda") is None:
        return [*out, f"_cuda: not built ({_why_no_cuda_module()})"]
    from bclip_fast import _cuda  # type: ignore[attr-defined]

    out.append(f"_cuda: built for sm_{_cuda.architectures.replace(';', ', sm_')}")
    try:
        devices = [_cuda.device(index) for index in range(_cuda.count_devices())]
    except RuntimeError as error:
        return [*out, f"no device: {error}"]
    for index, device in enumerate(devices):
        major, minor = device["capability"]
        memory, state = device["memory_bytes"] / 2**30, device["refusal"] or "ready"
        out.append(f"device {index}: {device['name']}, sm_{major}{minor}, {memory:.1f} GiB, {state}")
    return out


def _extras() -> dict[str, list[str]]:
    """The distributions that each extra adds itself, from the installed metadata."""
    extras: dict[str, list[str]] = {}
    for requirement in importlib.metadata.requires("bclip_fast") or ():
        match = re.match(r"([\w.-]+)[^;]*;.*extra == ['\"](\w+)['\"]", requirement)
        if match and match[1].replace("-", "_") != "bclip_fast" and "python_version" not in requirement:
            extras.setdefault(match[2], []).append(match[1])
    return extras


def _version(distribution: str) -> str:
    try:
        return f"{distribution} {importlib.metadata.version(distribution)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{distribution} (not installed)"


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

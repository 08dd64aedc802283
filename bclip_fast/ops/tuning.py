"""Records of which backends are right on a device and how fast each is; `dispatch` reads them, `bclip tune` makes them.

A record belongs to one device in one environment: its fingerprint names the processor or GPU, the instruction set in
force, the drivers, the versions and the kernels' own build. Its file lies in BCLIP_CACHE/tuning, else in
~/.cache/bclip_fast/tuning. Where there is none, the package's own defaults for the instruction set or the GPU's
architecture take its place (`defaults/`, files of the same format).

BCLIP_TUNE=PATH names a record's file, BCLIP_TUNE=off reads and writes none.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import json
import logging
import os
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..io.atomic import write_text
from ..io.hashing import sha256, sha256_of_file, sha256_of_parts
from ..version import __version__
from . import processor
from .cuda_device import CUDA_HOST

log = logging.getLogger(__name__)

SCHEMA = 1
DEFAULTS = Path(__file__).parent / "defaults"

# Operator, dtype ("float32") and class of shapes, as `dispatch.choose` is told them.
Key = tuple[str, str, str]


@dataclass(frozen=True)
class Entry:
    """Backends that passed the check, the best first, and each one's median time in milliseconds where it was taken."""

    order: tuple[str, ...]
    ms: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Record:
    """What is known of one device.

    `checks` maps (operator, dtype, backend) to "" where the backend agreed with the reference, else to what went wrong.
    `made` is when the times were taken (ISO 8601, UTC), "" where none were.
    """

    fingerprint: dict[str, str]
    made: str = ""
    entries: dict[Key, Entry] = field(default_factory=dict)
    checks: dict[Key, str] = field(default_factory=dict)
    path: Path | None = None
    origin: str = ""  # for people: where the order of backends comes from


def unmeasured(kind: str) -> Record:
    """A record of which nothing is known, under which `auto` goes by the package's order."""
    return Record({"device": kind, "name": kind, "architecture": "none"}, origin="the package's order")


def mode() -> str:
    """ "" (the cache), "off", or the path that BCLIP_TUNE names."""
    return os.environ.get("BCLIP_TUNE", "")


def folder() -> Path:
    """BCLIP_CACHE/tuning, else ~/.cache/bclip_fast/tuning."""
    given = os.environ.get("BCLIP_CACHE")
    return (Path(given) if given else Path.home() / ".cache" / "bclip_fast") / "tuning"


def path_for(fingerprint: Mapping[str, str]) -> Path:
    """Where the record with this fingerprint is kept."""
    digest = sha256(json.dumps(fingerprint, sort_keys=True))[:12]
    name = re.sub(r"[^\w.]+", "-", f"{fingerprint['name']}-{fingerprint['architecture']}").strip("-")
    return folder() / f"{name}-{digest}.json"


# Files.


def load(path: Path) -> Record:
    """Reads a record.

    Raises:
        UserError: no such file, or not a record of this version; the message says which.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"tuning record {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"tuning record {path} is damaged: {error}") from error
    try:
        if data["schema"] != SCHEMA:
            raise UserError(f"tuning record {path} has schema {data['schema']!r}, this version reads {SCHEMA}")
        record = from_json(data)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"tuning record {path} is damaged: {type(error).__name__}: {error}") from error
    record.path = path
    return record


def save(record: Record, path: Path) -> None:
    """Writes the record, whole or not at all.

    Raises:
        OSError: the folder takes no file.
    """
    write_text(path, to_text(to_json(record)))


def to_json(record: Record) -> dict[str, Any]:
    names = "operator", "dtype"
    return {
        "schema": SCHEMA,
        "made": record.made,
        "fingerprint": record.fingerprint,
        "entries": [
            {**dict(zip((*names, "shapes"), key, strict=True)), "order": list(entry.order), "ms": dict(entry.ms)}
            for key, entry in record.entries.items()
        ],
        "checks": [
            {**dict(zip((*names, "backend"), key, strict=True)), "error": error} for key, error in record.checks.items()
        ],
    }


def from_json(data: Mapping[str, Any]) -> Record:
    entries, checks = {}, {}
    for item in data["entries"]:
        ms = {_text(name): float(value) for name, value in item["ms"].items()}
        order = tuple(_text(name) for name in item["order"])
        entries[_text(item["operator"]), _text(item["dtype"]), _text(item["shapes"])] = Entry(order, ms)
    for item in data["checks"]:
        checks[_text(item["operator"]), _text(item["dtype"]), _text(item["backend"])] = _text(item["error"])
    fingerprint = {_text(name): _text(value) for name, value in data["fingerprint"].items()}
    if missing := {"device", "name", "architecture"} - fingerprint.keys():
        raise ValueError(f"the fingerprint lacks {', '.join(sorted(missing))}")
    return Record(fingerprint, _text(data["made"]), entries, checks)


def to_text(data: Mapping[str, Any]) -> str:
    """JSON with a line for each entry, so that a difference of two records can be read."""
    lines = []
    for name, value in data.items():
        if isinstance(value, list):
            items = ",\n  ".join(json.dumps(item) for item in value)
            lines.append(f'"{name}": [\n  {items}\n ]' if value else f'"{name}": []')
        else:
            lines.append(f'"{name}": {json.dumps(value)}')
    return "{\n " + ",\n ".join(lines) + "\n}\n"


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a string, found {value!r}")
    return value


# Fingerprints.


def fingerprint(kind: str, index: int = 0) -> dict[str, str]:
    """What a record of this device depends on. `kind` is "cpu" or "cuda"."""
    common = {"torch": torch.__version__, "bclip_fast": __version__}
    if kind == "cpu":
        threads = 1 << (torch.get_num_threads().bit_length() - 1)
        limits = ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
        return {
            "device": "cpu",
            "name": cpu_name(),
            "architecture": cpu_architecture(),
            "torch_instructions": torch.backends.cpu.get_cpu_capability(),
            "libraries": " ".join(f"{name}={os.environ[name]}" for name in limits if name in os.environ),
            "threads": "1" if threads == 1 else f"{threads} to {2 * threads - 1}",
            **common,
            "kernels": _build("bclip_fast._cpu"),
        }
    major, minor = torch.cuda.get_device_capability(index)
    return {
        "device": "cuda",
        "name": torch.cuda.get_device_name(index),
        "architecture": f"sm_{major}{minor}",
        "driver": _driver(),
        "cuda": str(torch.version.cuda),
        **common,
        "triton": importlib.metadata.version("triton") if find_spec("triton") else "none",
        "kernels": f"{_build('bclip_fast._cuda')} {_triton_sources()}",
    }


@functools.cache
def cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def cpu_architecture() -> str:
    """The instruction set that our kernels use, which is also the name of the package's defaults for it."""
    if platform.machine() in ("aarch64", "arm64"):
        return "arm64"
    if find_spec("bclip_fast._cpu") is None:
        return "none"
    module = importlib.import_module("bclip_fast._cpu")
    try:
        if module.has_amx():
            return "amx"
        name = module.instruction_set()
    except ValueError:
        return "unknown"  # BCLIP_CPU_ISA names nothing; the kernels say so when they run
    return "avx512_bf16" if name == "avx512" and processor.BFLOAT16_INSTRUCTIONS else name


@functools.cache
def _build(module: str) -> str:
    """The first digits of the compiled module's SHA-256."""
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        return "none"
    return sha256_of_file(Path(spec.origin))[:12]


@functools.cache
def _triton_sources() -> str:
    sources = sorted(Path(__file__).parent.rglob("triton.py"))
    return sha256_of_parts(path.read_bytes() for path in sources)[:12]


def _driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    found = re.search(r"\b(\d+\.\d+(\.\d+)?)\b", text)
    return found[1] if found else "unknown"


def differences(one: Mapping[str, str], other: Mapping[str, str]) -> str:
    """For people: what differs between two fingerprints, "" for none."""
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return ", ".join(f"{name} {one.get(name) or 'none'} / {other.get(name) or 'none'}" for name in names)


# What is in force in this process.

_records: dict[tuple[str, int], Record] = {}
_run: dict[str, Record] = {}
_orders: dict[tuple[str, int, str, torch.dtype | None, str, tuple[str, ...]], tuple[str, ...]] = {}


def order(
    operator: str, kind: str, index: int, dtype: torch.dtype | None, shapes: str, otherwise: tuple[str, ...]
) -> tuple[str, ...]:
    """The backends that `auto` tries for such calls on the device, the best first; `otherwise` where nothing is known.

    Raises:
        UserError: BCLIP_TUNE names a file that is no record.
    """
    found = _orders.get((kind, index, operator, dtype, shapes, otherwise))
    if found is None:
        record = of_device(kind, index)
        entry = record.entries.get((operator, short(dtype), shapes))
        found = otherwise if entry is None else entry.order + tuple(x for x in otherwise if x not in entry.order)
        found = tuple(name for name in found if not record.checks.get((operator, short(dtype), name)))
        _orders[kind, index, operator, dtype, shapes, otherwise] = found
    return found


# All that torch.compiler.assume_constant_result does, but for importing Dynamo: two seconds, and Triton. A graph keeps
# the order that was in force when it was traced.
order._dynamo_marked_constant = True  # type: ignore[attr-defined]


def of_device(kind: str, index: int = 0) -> Record:
    """The record in force: the run's, else the machine's or a named one, else the package's defaults.

    Raises:
        UserError: BCLIP_TUNE names a file that is no record.
    """
    if kind in _run:
        return _run[kind]
    found = _records.get((kind, index))
    if found is None:
        found = _records[kind, index] = _find(kind, index)
    return found


def _find(kind: str, index: int) -> Record:
    if kind not in ("cpu", "cuda"):
        return unmeasured(kind)
    own = fingerprint(kind, index)
    if emulated():
        return Record(own, origin="kernels are emulated: the package's order")
    if mode() not in ("", "off"):
        named = load(Path(mode()))
        if named.fingerprint["device"] == kind:
            if differing := differences(named.fingerprint, own):
                log.warning("%s, named by BCLIP_TUNE, was made elsewhere (there / here): %s", mode(), differing)
                named.checks = {}
            named.origin = "the record that BCLIP_TUNE names"
            return named
    default = shipped(own)
    if mode() != "":
        return default
    try:
        path = path_for(own)
        if not path.exists():
            return default
        cached = load(path)
        if cached.fingerprint != own:
            raise UserError(f"tuning record {path} is of another device: {differences(cached.fingerprint, own)}")
    except (UserError, OSError, RuntimeError) as error:  # RuntimeError: there is no home
        log.warning("%s; the package's defaults are used instead, `bclip tune` makes a new record", error)
        return default
    if not cached.made:
        default.checks = cached.checks
        return default
    cached.origin = "this machine's record"
    return cached


def emulated() -> bool:
    """Whether kernels for a GPU run on the CPU, which no record covers."""
    return CUDA_HOST is not None or os.environ.get("TRITON_INTERPRET") == "1"


def shipped(own: Mapping[str, str]) -> Record:
    """The package's defaults for a device with this fingerprint."""
    path = DEFAULTS / f"{own['architecture']}.json"
    if not path.exists():
        origin = f"the package's order, which nothing has measured on {own['architecture']}"
        return Record(dict(own), origin=origin)
    record = load(path)
    # Found right in the package's tests; on this device nothing has been checked.
    return Record(dict(own), entries=record.entries, origin=f"the package's defaults for {own['architecture']}")


def note_check(kind: str, index: int, key: Key, error: str, *, keep: bool = True) -> None:
    """Remembers a quick check in this process and, with `keep` and without BCLIP_TUNE, in the machine's record."""
    record = of_device(kind, index)
    record.checks[key] = error
    _orders.clear()
    if not keep or mode() != "" or kind in _run or emulated():
        return
    try:
        path = path_for(record.fingerprint)
        stored = load(path) if path.exists() else Record(record.fingerprint)
        stored.checks[key] = error
        save(stored, path)
    except (UserError, OSError, RuntimeError) as problem:
        log.info("the check's result is not kept: %s", problem)


@contextmanager
def in_force(records: Mapping[str, Record]) -> Iterator[None]:
    """Inside the block `auto` goes by these records, by kind of device, whatever the machine's own say."""
    before = dict(_run)
    install({**before, **records})
    try:
        yield
    finally:
        install(before)


def install(records: Mapping[str, Record]) -> None:
    """From now on `auto` goes by these records in this process; an empty mapping puts the machine's back in force."""
    _run.clear()
    _run.update(records)
    _orders.clear()


def reset() -> None:
    """Forgets what was read, so that the next call reads the environment and the files again."""
    install({})
    _records.clear()


def short(dtype: torch.dtype | None) -> str:
    return "" if dtype is None else str(dtype).removeprefix("torch.")

"""The file format of tuning records, which `tuning` reads and `bclip tune` writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bclip_fast.errors import UserError
from bclip_fast.io import stand_ins
from bclip_fast.io.atomic import replacing

from .backend_names import BACKENDS

SCHEMA = 1

# The source of a record whose order comes from lower bounds of the kernels' times (benchmarks/bounds/).
FROM_BOUNDS = "bounds"

# Operator, dtype ("float32") and class of shapes, or operator, dtype and backend.
Key = tuple[str, str, str]


@dataclass(frozen=True)
class Entry:
    """Backends that passed the check, the fastest first, and their median times in milliseconds, if measured.

    `bound_ms` holds lower bounds of times instead, in a record from bounds.
    """

    order: tuple[str, ...]
    ms: Mapping[str, float] = field(default_factory=dict)
    bound_ms: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Record:
    """The measurements and checks of one device.

    `checks` maps (operator, dtype, backend) to the fault that a check found, or to "". `made` is the time of the
    measurements (ISO 8601, UTC), or "" without any. `source` is FROM_BOUNDS for an order that was never measured, else
    "".
    """

    fingerprint: dict[str, str]
    made: str = ""
    entries: dict[Key, Entry] = field(default_factory=dict)
    checks: dict[Key, str] = field(default_factory=dict)
    path: Path | None = None
    origin: str = ""  # where the order comes from, for messages
    source: str = ""


def load(path: Path) -> Record:
    """Read a record.

    Raises:
        UserError: the file is missing, damaged, or not a record of this version. The message says which.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"tuning record {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        stand_ins.refuse(path)
        raise UserError(f"tuning record {path} is damaged: {error}") from error
    try:
        if data["schema"] != SCHEMA:
            raise UserError(f"tuning record {path} has schema {data['schema']!r}, but this version reads {SCHEMA}")
        record = from_json(data)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"tuning record {path} is damaged: {type(error).__name__}: {error}") from error
    record.path = path
    return record


def save(record: Record, path: Path) -> None:
    """Write the record completely or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    with replacing(path) as partial:
        partial.write_text(to_text(to_json(record)), encoding="utf-8")


def to_json(record: Record) -> dict[str, Any]:
    """The record as JSON data."""
    names = "operator", "dtype"
    return {
        "schema": SCHEMA,
        "made": record.made,
        **({"source": record.source} if record.source else {}),
        "fingerprint": record.fingerprint,
        "entries": [
            {
                **dict(zip((*names, "shapes"), key, strict=True)),
                "order": list(entry.order),
                "ms": dict(entry.ms),
                **({"bound_ms": dict(entry.bound_ms)} if entry.bound_ms else {}),
            }
            for key, entry in record.entries.items()
        ],
        "checks": [
            {**dict(zip((*names, "backend"), key, strict=True)), "error": error} for key, error in record.checks.items()
        ],
    }


def from_json(data: Mapping[str, Any]) -> Record:
    """The record from JSON data.

    Raises:
        KeyError, TypeError, AttributeError, ValueError: the data is not a record, or names an unknown backend.
    """
    entries, checks = {}, {}
    for item in data["entries"]:
        ms, bound_ms = (
            {_backend(name): float(value) for name, value in times.items()}
            for times in (item["ms"], item.get("bound_ms", {}))
        )
        order = tuple(_backend(name) for name in item["order"])
        entries[_text(item["operator"]), _text(item["dtype"]), _text(item["shapes"])] = Entry(order, ms, bound_ms)
    for item in data["checks"]:
        checks[_text(item["operator"]), _text(item["dtype"]), _backend(item["backend"])] = _text(item["error"])
    fingerprint = {_text(name): _text(value) for name, value in data["fingerprint"].items()}
    if missing := {"device", "name", "architecture"} - fingerprint.keys():
        raise ValueError(f"the fingerprint lacks {', '.join(sorted(missing))}")
    source = _text(data.get("source", ""))
    if source not in ("", FROM_BOUNDS):
        raise ValueError(f"it names the unknown source {source!r}; known: {FROM_BOUNDS}")
    return Record(fingerprint, _text(data["made"]), entries, checks, source=source)


def to_text(data: Mapping[str, Any]) -> str:
    """JSON with one line per entry, so that a diff of two records is readable."""
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
        raise TypeError(f"expected a string, got {value!r}")
    return value


def _backend(value: Any) -> str:
    name = _text(value)
    if name not in BACKENDS:
        raise ValueError(f"it names the unknown backend {name!r}; known: {', '.join(BACKENDS)}")
    return name

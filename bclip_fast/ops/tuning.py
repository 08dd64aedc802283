"""Tuning records: the correct backends of each device, fastest first. They give the order of `auto`.

A record belongs to one device in one environment. Its fingerprint names the processor or GPU, the instruction set in
use, the drivers, the versions and the build of the kernels. `bclip tune` writes its file to BCLIP_CACHE/tuning, by
default ~/.cache/bclip_fast/tuning. Without a record, the package's defaults for the instruction set or the GPU's
architecture take its place (`defaults/`, files of the same format). Those of GPUs come from lower bounds of the
kernels' times (benchmarks/bounds/), because no GPU has been measured.

BCLIP_TUNE=PATH names a record's file. BCLIP_TUNE=off neither reads nor writes records.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from bclip_fast.errors import UserError
from bclip_fast.io.hashing import sha256

from .cuda_device import CUDA_HOST
from .dtypes import dtype_name
from .fingerprint import differences, fingerprint
from .record_files import FROM_BOUNDS, Key, Record, load, save

log = logging.getLogger(__name__)

DEFAULTS = Path(__file__).parent / "defaults"


def unmeasured(kind: str) -> Record:
    """An empty record, for the package's order of backends."""
    return Record({"device": kind, "name": kind, "architecture": "none"}, origin="the package's order")


def mode() -> str:
    """The value of BCLIP_TUNE: "" for the cache, "off", or a path."""
    return os.environ.get("BCLIP_TUNE", "")


def folder() -> Path:
    """The folder of this machine's records: BCLIP_CACHE/tuning, by default ~/.cache/bclip_fast/tuning."""
    cache = os.environ.get("BCLIP_CACHE")
    return (Path(cache) if cache else Path.home() / ".cache" / "bclip_fast") / "tuning"


def path_for(fingerprint: Mapping[str, str]) -> Path:
    """The path of the record with this fingerprint."""
    digest = sha256(json.dumps(fingerprint, sort_keys=True))[:12]
    name = re.sub(r"[^\w.]+", "-", f"{fingerprint['name']}-{fingerprint['architecture']}").strip("-")
    return folder() / f"{name}-{digest}.json"


# The records that this process uses.

_records: dict[tuple[str, int], Record] = {}
_run: dict[str, Record] = {}
_orders: dict[tuple[str, int, str, torch.dtype | None, str, tuple[str, ...]], tuple[str, ...]] = {}


def order(
    operator: str, kind: str, index: int, dtype: torch.dtype | None, shapes: str, otherwise: tuple[str, ...]
) -> tuple[str, ...]:
    """The backends that `auto` tries for such calls on the device, fastest first. `otherwise` without an entry.

    Raises:
        UserError: BCLIP_TUNE names a file that is not a record.
    """
    names = _orders.get((kind, index, operator, dtype, shapes, otherwise))
    if names is None:
        record = of_device(kind, index)
        entry = record.entries.get((operator, dtype_name(dtype), shapes))
        names = otherwise if entry is None else entry.order + tuple(x for x in otherwise if x not in entry.order)
        names = tuple(name for name in names if not record.checks.get((operator, dtype_name(dtype), name)))
        _orders[kind, index, operator, dtype, shapes, otherwise] = names
    return names


# The mark that torch.compiler.assume_constant_result sets. That function also imports Dynamo and Triton: two seconds. A
# graph keeps the order that it was traced with.
order._dynamo_marked_constant = True  # type: ignore[attr-defined]


def of_device(kind: str, index: int = 0) -> Record:
    """The record in use: that of the run, of BCLIP_TUNE, of the machine, or else the package's defaults.

    Raises:
        UserError: BCLIP_TUNE names a file that is not a record.
    """
    if kind in _run:
        return _run[kind]
    record = _records.get((kind, index))
    if record is None:
        record = _records[kind, index] = _find(kind, index)
    return record


def _find(kind: str, index: int) -> Record:
    if kind not in ("cpu", "cuda"):
        return unmeasured(kind)
    here = fingerprint(kind, index)
    if emulated():
        return Record(here, origin="kernels are emulated: the package's order")
    if mode() not in ("", "off"):
        named = load(Path(mode()))
        if named.fingerprint["device"] == kind:
            if differing := differences(named.fingerprint, here):
                log.warning(
                    "%s, named by BCLIP_TUNE, was made on another device or version (there / here): %s",
                    mode(),
                    differing,
                )
                named.checks = {}
            named.origin = "the record that BCLIP_TUNE names"
            return named
    default = shipped(here)
    if mode() != "":
        return default
    try:
        path = path_for(here)
        if not path.exists():
            return default
        cached = load(path)
        if cached.fingerprint != here:
            raise UserError(f"tuning record {path} is of another device: {differences(cached.fingerprint, here)}")
    except (UserError, OSError, RuntimeError) as error:  # RuntimeError: the user has no home directory
        log.warning("%s; using the package's defaults instead. `bclip tune` makes a new record", error)
        return default
    if not cached.made:
        default.checks = cached.checks
        return default
    cached.origin = "this machine's record"
    return cached


def emulated() -> bool:
    """Whether GPU kernels run emulated on the CPU, which no record covers."""
    return CUDA_HOST is not None or os.environ.get("TRITON_INTERPRET") == "1"


def shipped(here: Mapping[str, str]) -> Record:
    """The package's defaults for a device with this fingerprint."""
    path = DEFAULTS / f"{here['architecture']}.json"
    if not path.exists():
        origin = f"the package's order, which nobody has measured on {here['architecture']}"
        return Record(dict(here), origin=origin)
    record = load(path)
    # The package's tests checked these backends, but nobody has on this device.
    origin = f"the package's defaults for {here['architecture']}"
    if record.source == FROM_BOUNDS:
        origin += ", from bounds, not measured"
    return Record(dict(here), entries=record.entries, origin=origin, source=record.source)


def note_check(kind: str, index: int, key: Key, error: str, *, keep: bool = True) -> None:
    """Remember a check's result in this process and, with `keep` and without BCLIP_TUNE, in the machine's record."""
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
        log.info("the result of the check cannot be saved: %s", problem)


@contextmanager
def in_force(records: Mapping[str, Record]) -> Iterator[None]:
    """Make `auto` use these records, by kind of device, inside the block."""
    previous = dict(_run)
    install({**previous, **records})
    try:
        yield
    finally:
        install(previous)


def install(records: Mapping[str, Record]) -> None:
    """Make `auto` use these records in this process from now on. An empty mapping restores the machine's records."""
    _run.clear()
    _run.update(records)
    _orders.clear()


def reset() -> None:
    """Forget all records, so that the next call reads the environment and the files again."""
    install({})
    _records.clear()

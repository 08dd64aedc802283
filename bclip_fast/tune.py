"""`bclip tune`: check and time the backends on this device, and write the record that `auto` reads.

Each operator is called in every dtype and class of shapes, forward and backward, with every backend that takes the
call. A backend that disagrees with the reference is left out. The others take turns, and the record keeps their median
times.
"""

from __future__ import annotations

import datetime
import logging
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from bclip_fast.errors import UserError, choices
from bclip_fast.io.progress import track
from bclip_fast.ops import fingerprint, record_files, trial_cases, trials, tuning
from bclip_fast.ops.dispatch import BACKENDS, use_backend
from bclip_fast.ops.record_files import Entry, Key, Record
from bclip_fast.ops.trial_cases import Trial

log = logging.getLogger(__name__)

# The names that users type and that records hold. "pooled_attention" is `ops.single_query_attention`.
OPERATORS = (
    "fused_attention",
    "varlen_attention",
    "pooled_attention",
    "clip_loss",
    "siglip_loss",
    "add_norm",
    "gelu",
    "linear",
    "linear_gelu",
    "image",
)

# A backend within this factor of the fastest counts as equally fast. The order of BACKENDS decides among these. Two
# measurements of one machine then rarely disagree.
TIE = 1.05
# A backend that is this many times slower than the fastest is called only twice.
HOPELESS = 5.0
_OURS = ("triton", "cuda", "cpu")


@dataclass(frozen=True)
class TuneConfig:
    """Measure the operators' backends on this machine, and keep the result for `auto`."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to measure. `auto` is the current GPU, or the processor of a machine without a GPU."""
    operators: tuple[str, ...] = ()
    """Operators to measure: fused_attention, varlen_attention, pooled_attention, clip_loss, siglip_loss, add_norm,
    gelu, linear, linear_gelu, image. All by default. The record keeps its entries of the others."""
    seconds: float = 0.5
    """Seconds for each operator, dtype and class of shapes. The slowest calls take longer."""
    out: Path | None = None
    """File of the record. By default the file in the cache, where every later call finds it."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.operators if name not in OPERATORS]:
            raise UserError(f"operators: {unknown[0]!r} is unknown{choices(unknown[0], OPERATORS)}")
        if not 0 < self.seconds < math.inf:
            raise UserError(f"seconds={self.seconds} must be a finite number above 0")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("device=cuda, but torch sees no GPU")


def run(config: TuneConfig) -> None:
    """Run the command.

    Raises:
        UserError: kernels are emulated, or the record cannot be written.
    """
    from rich.console import Console

    if tuning.emulated():
        raise UserError("BCLIP_CUDA_HOST or TRITON_INTERPRET=1 is set: times of emulated kernels are meaningless")
    device = _device(config)
    here = fingerprint.fingerprint(device.type, device.index or 0)
    path = config.out or _path_in_cache(here)
    _check_destination(path, Record(here), config.operators)
    previous = "" if tuning.mode() or config.out else tuning.of_device(device.type, device.index or 0).origin
    todo = list(_trials(device, config.operators))
    busy = os.getloadavg()[0]
    if device.type == "cpu" and busy > 0.5 * (os.cpu_count() or 1):
        log.warning("the load is %.1f: other work makes the times unreliable", busy)
    with track("", len(todo), transient=True, elapsed=True) as advance:

        def show(trial: Trial) -> None:
            advance(1, f"{trial.operator}, {trial.what}")

        record = measure(here, todo, config.seconds, show)
    if config.operators and path.exists():
        record = _merged(path, record, config.operators)
    try:
        record_files.save(record, path)
    except OSError as problem:
        raise UserError(f"{path} cannot be written: {problem.strerror}; --out names another file") from problem
    terminal = Console()
    # A file or pipe has no width.
    (terminal if terminal.is_terminal else Console(width=120)).print(_table(record))
    for (operator, dtype, backend), error in record.checks.items():
        if error:
            log.warning(
                "%s in %s fails its check with the backend %s, so `auto` does not take it: %s",
                operator,
                dtype,
                backend,
                error,
            )
    print(f"{here['name']}, {here['architecture']}: {path}")
    if previous:
        print(f"It replaces {previous}")
    if tuning.mode() and config.out is None:
        print(f"BCLIP_TUNE={tuning.mode()} is set, so no call reads this record")


def measure(here: Mapping[str, str], todo: Sequence[Trial], seconds: float, show: Callable[[Trial], None]) -> Record:
    """A record of these trials for the device with the fingerprint `here`. `show` is called after each trial."""
    now = datetime.datetime.now(datetime.timezone.utc)
    record = Record(dict(here), made=now.isoformat(timespec="seconds"))
    blank = Record(dict(here))
    # Measure every backend, even if a record or BCLIP_BACKEND excludes it.
    with tuning.in_force({here["device"]: blank}), use_backend("auto"):
        for trial in todo:
            decision = trial.decide()
            usable = [name for name in BACKENDS if name not in decision.refusals and name != "reference"]
            right = []
            for name in usable:
                key = (*decision.key[:2], name)
                if key not in record.checks:
                    record.checks[key], _ = trials.check(trial.operator, name, trial.device, decision.dtype)
                if not record.checks[key]:
                    right.append(name)
            if usable and "reference" not in decision.refusals:
                ms = time_of(trial, [*right, "reference"], seconds)
                record.entries[decision.key] = Entry(ranked(ms), {name: round(t, 4) for name, t in ms.items()})
            show(trial)
    return record


def time_of(trial: Trial, backends: Sequence[str], seconds: float) -> dict[str, float]:
    """Each backend's median time of forward and backward, in milliseconds. The backends take turns."""
    tensors = trial.make()

    def once(name: str) -> float:
        start = time.perf_counter()
        trial.run(name, tensors)
        if trial.device.type == "cuda":
            torch.cuda.synchronize(trial.device)
        return 1e3 * (time.perf_counter() - start)

    first = {}
    for name in backends:
        once(name)  # compiles, imports, allocates
        first[name] = once(name)
    fastest = min(first.values())
    times = {name: [ms] for name, ms in first.items() if ms <= HOPELESS * fastest}
    rounds = int(1e3 * seconds / sum(ms[0] for ms in times.values()))
    for _ in range(min(max(rounds, 3), 100)):
        for name, measured in times.items():
            measured.append(once(name))
    return {name: statistics.median(times.get(name, [ms])) for name, ms in first.items()}


def ranked(ms: Mapping[str, float]) -> tuple[str, ...]:
    """The backends by time, the fastest first. The order of BACKENDS decides among equally fast ones."""
    fastest = min(ms.values())
    return tuple(sorted(ms, key=lambda name: (0.0 if ms[name] <= TIE * fastest else ms[name], BACKENDS.index(name))))


def _path_in_cache(here: Mapping[str, str]) -> Path:
    try:
        return tuning.path_for(here)
    except RuntimeError as problem:
        raise UserError(
            "the cache's folder is unknown, because this user has no home directory: set BCLIP_CACHE or --out"
        ) from problem


def _check_destination(path: Path, record: Record, operators: Sequence[str]) -> None:
    """Raise UserError before minutes of measurements if the result could not be written."""
    if operators and path.exists():
        _merged(path, record, operators)
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a directory")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as problem:
        raise UserError(f"{path} cannot be written: {problem.strerror}; --out names another file") from problem


def _device(config: TuneConfig) -> torch.device:
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _trials(device: torch.device, operators: Sequence[str]) -> Iterator[Trial]:
    for dtype in trial_cases.dtypes(device):
        for trial in trial_cases.timed(device, dtype):
            if not operators or trial.operator.partition(".")[0] in operators:
                yield trial


def _merged(path: Path, record: Record, operators: Sequence[str]) -> Record:
    """`record` with the other operators' entries of an older record of the same device."""
    try:
        older = record_files.load(path)
    except UserError as problem:
        raise UserError(f"{problem}; measure all operators, or delete the file") from problem
    if older.fingerprint != record.fingerprint:
        differing = fingerprint.differences(older.fingerprint, record.fingerprint)
        raise UserError(f"{path} is of another device or version ({differing}): measure all operators, or give --out")

    def others(items: Mapping[Key, Any]) -> dict[Key, Any]:
        return {key: value for key, value in items.items() if key[0].partition(".")[0] not in operators}

    record.entries = others(older.entries) | record.entries
    record.checks = others(older.checks) | record.checks
    return record


def _table(record: Record) -> Any:
    from rich.table import Table

    table = Table(title="forward and backward, median ms", title_justify="left")
    for name in ("operator", "dtype", "shapes"):
        table.add_column(name)
    for name in ("ours", "torch", "ours / torch"):
        table.add_column(name, justify="right")
    table.add_column("auto takes")
    for (operator, dtype, shapes), entry in record.entries.items():
        ours = min((ms for name, ms in entry.ms.items() if name in _OURS), default=None)
        torchs = min((ms for name, ms in entry.ms.items() if name not in _OURS), default=None)
        ratio = f"{ours / torchs:.2f}" if ours and torchs else ""
        cells = (f"{ms:.3g}" if ms is not None else "" for ms in (ours, torchs))
        table.add_row(operator, dtype, shapes, *cells, ratio, entry.order[0])
    return table

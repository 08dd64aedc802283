"""`bclip tune`: which backends are right on this device, and which of them is fastest; written where `auto` looks.

Each operator is called in every dtype and class of shapes, forward and backward, by every backend that takes the call.
A backend that disagrees with the reference is left out. The others take turns, and the record keeps their medians.
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

from .errors import UserError
from .io.progress import track
from .ops import trials, tuning
from .ops.dispatch import BACKENDS, use_backend
from .ops.trials import Trial
from .ops.tuning import Entry, Key, Record

log = logging.getLogger(__name__)

OPERATORS = (
    "fused_attention",
    "varlen_attention",
    "pooled_attention",
    "clip_loss",
    "siglip_loss",
    "add_norm",
    "gelu",
    "linear",
    "image",
)

# Within this of the fastest a backend counts as equally fast, and the order of BACKENDS decides: two measurements of
# one machine then seldom disagree.
TIE = 1.05
# A backend this many times slower than the fastest is called no more than twice.
HOPELESS = 5.0
_OURS = ("triton", "cuda", "cpu")


@dataclass(frozen=True)
class TuneConfig:
    """Measures the operators' backends on this machine and keeps the result for `auto`."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What to measure; auto is the current GPU where there is one, else the processor."""
    operators: tuple[str, ...] = ()
    """Only these, beside what the record holds of the others: fused_attention, varlen_attention, pooled_attention,
    clip_loss, siglip_loss, add_norm, gelu, linear, image. All unless given."""
    seconds: float = 0.5
    """For each operator, dtype and class of shapes; the slowest calls take longer."""
    out: Path | None = None
    """The record's file; unless given the one in the cache, where every later call finds it."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.operators if name not in OPERATORS]:
            raise UserError(f"operators: {', '.join(unknown)} unknown; there are {', '.join(OPERATORS)}")
        if not 0 < self.seconds < math.inf:
            raise UserError(f"seconds={self.seconds}: must be a finite number above 0")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("device=cuda: torch sees no GPU")


def run(config: TuneConfig) -> None:
    """The command.

    Raises:
        UserError: kernels are emulated, or the record cannot be written.
    """
    from rich.console import Console

    if tuning.emulated():
        raise UserError("BCLIP_CUDA_HOST or TRITON_INTERPRET=1 is set: times of emulated kernels say nothing")
    device = _device(config)
    fingerprint = tuning.fingerprint(device.type, device.index or 0)
    path = config.out or _path_in_cache(fingerprint)
    _check_destination(path, Record(fingerprint), config.operators)
    todo = list(_wanted(device, config.operators))
    busy = os.getloadavg()[0]
    if device.type == "cpu" and busy > 0.5 * (os.cpu_count() or 1):
        log.warning("the load is %.1f: times taken beside other work are poor evidence", busy)
    with track("", len(todo), transient=True, elapsed=True) as advance:

        def tell(trial: Trial) -> None:
            advance(1, f"{trial.operator}, {trial.what}")

        record = measure(fingerprint, todo, config.seconds, tell)
    if config.operators and path.exists():
        record = _merged(path, record, config.operators)
    try:
        tuning.save(record, path)
    except OSError as problem:
        raise UserError(f"{path} cannot be written: {problem.strerror}; --out names another file") from problem
    terminal = Console()
    # A file or pipe has no width of its own.
    (terminal if terminal.is_terminal else Console(width=120)).print(_table(record))
    for (operator, dtype, backend), error in record.checks.items():
        if error:
            log.warning("%s in %s is wrong with the backend %s and not taken: %s", operator, dtype, backend, error)
    print(f"{fingerprint['name']}, {fingerprint['architecture']}: {path}")
    if tuning.mode() and config.out is None:
        print(f"BCLIP_TUNE={tuning.mode()} is set, so no call reads this record")


def measure(
    fingerprint: Mapping[str, str], todo: Sequence[Trial], seconds: float, tell: Callable[[Trial], None]
) -> Record:
    """A record of these trials; `tell` is called after each."""
    now = datetime.datetime.now(datetime.timezone.utc)
    record = Record(dict(fingerprint), made=now.isoformat(timespec="seconds"))
    blank = Record(dict(fingerprint))
    # Neither what is recorded nor BCLIP_BACKEND keeps a backend from being measured.
    with tuning.in_force({fingerprint["device"]: blank}), use_backend("auto"):
        for trial in todo:
            decision = trial.decide()
            found = [name for name in BACKENDS if name not in decision.refusals and name != "reference"]
            for name in found:
                key = (*decision.key[:2], name)
                if key not in record.checks:
                    record.checks[key], _ = trials.check(trial.operator, name, trial.device, decision.dtype)
            right = [name for name in found if not record.checks[(*decision.key[:2], name)]]
            if found and "reference" not in decision.refusals:
                ms = time_of(trial, [*right, "reference"], seconds)
                record.entries[decision.key] = Entry(ranked(ms), {name: round(t, 4) for name, t in ms.items()})
            tell(trial)
    return record


def time_of(trial: Trial, backends: Sequence[str], seconds: float) -> dict[str, float]:
    """Each backend's median time of forward and backward, in milliseconds; they take turns."""
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
        for name, found in times.items():
            found.append(once(name))
    return {name: statistics.median(times.get(name, [ms])) for name, ms in first.items()}


def ranked(ms: Mapping[str, float]) -> tuple[str, ...]:
    """The fastest first; of those that are equally fast, by the order of BACKENDS."""
    fastest = min(ms.values())
    return tuple(sorted(ms, key=lambda name: (0.0 if ms[name] <= TIE * fastest else ms[name], BACKENDS.index(name))))


def _path_in_cache(fingerprint: Mapping[str, str]) -> Path:
    try:
        return tuning.path_for(fingerprint)
    except RuntimeError as problem:
        raise UserError(
            "the cache's folder is unknown, as this user has no home: set BCLIP_CACHE or --out"
        ) from problem


def _check_destination(path: Path, record: Record, operators: Sequence[str]) -> None:
    """Raises, before minutes are spent on measurements, what would keep the result from being written."""
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


def _wanted(device: torch.device, operators: Sequence[str]) -> Iterator[Trial]:
    for dtype in trials.dtypes(device):
        for trial in trials.timed(device, dtype):
            if not operators or trial.operator.partition(".")[0] in operators:
                yield trial


def _merged(path: Path, record: Record, operators: Sequence[str]) -> Record:
    """`record` with what an older one of the same device holds of other operators."""
    try:
        older = tuning.load(path)
    except UserError as problem:
        raise UserError(f"{problem}; measure all operators, or delete the file") from problem
    if older.fingerprint != record.fingerprint:
        differing = tuning.differences(older.fingerprint, record.fingerprint)
        raise UserError(f"{path} is of another device or version ({differing}): measure all operators, or give --out")

    def others(found: Mapping[Key, Any]) -> dict[Key, Any]:
        return {key: value for key, value in found.items() if key[0].partition(".")[0] not in operators}

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
        figures = (f"{ms:.3g}" if ms is not None else "" for ms in (ours, torchs))
        table.add_row(operator, dtype, shapes, *figures, ratio, entry.order[0])
    return table

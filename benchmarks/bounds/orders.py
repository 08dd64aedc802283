"""The order of backends that the bounds give, as the package's defaults for GPUs without a record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from bclip_fast.ops.record_files import FROM_BOUNDS, Entry, Key, Record, load, save
from bclip_fast.ops.tuning import DEFAULTS

from . import store
from .model import Bound, Work
from .rates import GPUS

# A backend within this factor of the least bound counts as equal, because bounds are less exact than measurements.
TIE = 1.1
# By architecture, the GPU whose bounds give its order. sm_90a is a Hopper GPU with the CUDA kernels made for it.
RECORDS = {"80": "a100", "90": "h100", "90a": "h100"}
# The package's order among equal backends.
BACKENDS = "triton", "cuda"

# The shape that stands for each class of shapes of a record, by operator.
CLASSES = {
    "clip_loss": {"B <= 256": "B=128, D=512", "B <= 1024": "B=512, D=512", "B > 1024": "B=65536, D=512"},
    "fused_attention": {
        "d <= 64, N <= 512": "256 x 197, 12 x 64",
        "d <= 64, N > 512": "64 x 577, 12 x 64",
        "d > 64, N <= 512": "256 x 197, 8 x 96",
        "d > 64, N > 512": "64 x 577, 6 x 128",
    },
    "pooled_attention": {"": "256 x 197, 12 x 64"},
    "add_norm": {"large": "50432 x 768"},
    "gelu": {"large": "50432 x 3072"},
}
CLASSES["siglip_loss"] = CLASSES["clip_loss"]


def write(works: Sequence[Work]) -> list[Path]:
    """Write the files of `RECORDS` to ops/defaults of the source tree. Leave a measured record in its place.

    Returns the paths of the written files.
    """
    paths = []
    for architecture in RECORDS:
        record = record_of(works, architecture)
        path = DEFAULTS / f"{record.fingerprint['architecture']}.json"
        if not (path.exists() and load(path).source != FROM_BOUNDS):
            save(record, path)
            paths.append(path)
    return paths


def record_of(works: Sequence[Work], architecture: str) -> Record:
    """Return the record of an architecture of `RECORDS`. Bounds of forward and backward kernels of a shape add up."""
    gpu = RECORDS[architecture]
    fingerprint = {"device": "cuda", "name": f"bounds of {GPUS[gpu].name}", "architecture": f"sm_{architecture}"}
    # A module built with CUTLASS has the losses' kernels for Hopper, too, and takes only these there.
    unused = "contrastive_" if architecture == "90a" else "hopper_"
    rows = [row for row in store.bounds(works, gpu) if row[0].backend != "cuda" or not row[0].kernel.startswith(unused)]
    return Record(fingerprint, entries=dict(_entries(rows)), source=FROM_BOUNDS)


def _entries(rows: Sequence[tuple[Work, Bound]]) -> Iterator[tuple[Key, Entry]]:
    for operator, classes in CLASSES.items():
        for shapes, shape in classes.items():
            entry = entry_of(rows, operator, shape)
            # The varlen kernels are those of sequences of equal length, and bfloat16 costs as much as float16.
            operators = (operator, "varlen_attention") if operator == "fused_attention" else (operator,)
            for name in operators:
                for dtype in ("bfloat16", "float16"):
                    yield (name, dtype, shapes), entry


def entry_of(rows: Sequence[tuple[Work, Bound]], operator: str, shape: str) -> Entry:
    """Return the entry of an operator at a shape."""
    ms: dict[str, float] = {}
    for work, each in rows:
        if (work.operator, work.shape) == (operator, shape):
            ms[work.backend] = ms.get(work.backend, 0.0) + 1e3 * each.seconds
    least = min(ms.values())
    order = sorted(ms, key=lambda name: (0.0 if ms[name] <= TIE * least else ms[name], BACKENDS.index(name)))
    return Entry(tuple(order), bound_ms={backend: round(ms[backend], 4) for backend in order})

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
    """Write ops/defaults/sm_80.json and sm_90.json of the source tree. Leave a measured record in its place.

    Returns the paths of the written files.
    """
    paths = []
    for gpu in ("a100", "h100"):
        record = record_of(works, gpu)
        path = DEFAULTS / f"{record.fingerprint['architecture']}.json"
        if not (path.exists() and load(path).source != FROM_BOUNDS):
            save(record, path)
            paths.append(path)
    return paths


def record_of(works: Sequence[Work], gpu: str) -> Record:
    """Return the record of a GPU of this name. Bounds of forward and backward kernels of a shape add up."""
    name = GPUS[gpu].name
    fingerprint = {"device": "cuda", "name": f"bounds of {name}", "architecture": f"sm_{GPUS[gpu].architecture}"}
    return Record(fingerprint, entries=dict(_entries(works, gpu)), source=FROM_BOUNDS)


def _entries(works: Sequence[Work], gpu: str) -> Iterator[tuple[Key, Entry]]:
    rows = store.bounds(works, gpu)
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

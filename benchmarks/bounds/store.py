"""The analysed kernels on disk: results/bounds.json, and the bounds of an earlier commit beside it."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from bclip_fast.errors import UserError
from bclip_fast.io.hashing import sha256_of_parts

from . import cuda_code, machine_code, triton_works
from .model import Bound, Work, bound
from .rates import GPUS

RESULTS = Path(__file__).parents[1] / "results"
ANALYSIS, BEFORE, REPORT = RESULTS / "bounds.json", RESULTS / "bounds_before.json", RESULTS / "bounds.md"

# By architecture, the name of its code in the CUDA module.
CUDA_CODE = {"80": "80", "90": "90a"}

# A row of a table: GPU, backend, kernel and shape.
Key = tuple[str, str, str, str]


class Analysis(NamedTuple):
    """The kernels' work, and its build: digests of the sources of the CUDA and of the Triton kernels."""

    build: str
    works: list[Work]


def current_build() -> str:
    """Return the build of this source tree, or of this installation, which has no CUDA sources."""
    ops = next(iter(find_spec("bclip_fast").submodule_search_locations))  # type: ignore[union-attr,arg-type]
    triton = sorted(Path(ops, "ops").rglob("triton*.py"))
    cuda = Path(__file__).parents[2] / "csrc" / "cuda"
    sources = sorted(
        path for path in cuda.rglob("*") if path.suffix in (".cu", ".cuh") and "emulator" not in path.parts
    )
    parts = [f"CUDA {_digest(sources)}"] if sources else []
    return ", ".join([*parts, f"Triton kernels {_digest(triton)}"])


def _digest(paths: Sequence[Path]) -> str:
    return sha256_of_parts(path.read_bytes() for path in paths)[:12]


def analyse(architectures: Sequence[str] = tuple(CUDA_CODE), reused: Sequence[Work] = ()) -> Analysis:
    """Analyse the built module and compile the Triton kernels. It takes about a minute an architecture.

    reused: works of Triton kernels, which are then not compiled.

    Raises:
        UserError: a program, Triton, the CUDA module or its code for an architecture is missing.
    """
    if not machine_code.has_tools():
        raise UserError("cuobjdump and nvdisasm are missing: install the CUDA toolkit or Triton")
    if find_spec("triton") is None:
        raise UserError("Triton is missing: pip install triton")
    built = machine_code.architectures()
    if not built:
        raise UserError(
            "the CUDA module bclip_fast._cuda is missing: install nvcc and build the package with BCLIP_CUDA=1"
        )
    codes = [CUDA_CODE[architecture] for architecture in architectures]
    if absent := [code for code in codes if code not in built]:
        raise UserError(
            f"the CUDA module is built for {';'.join(built)} and not for {';'.join(absent)}: build it with "
            f"BCLIP_CUDA_ARCHS='{';'.join(codes)}'"
        )
    works = list(cuda_code.works(machine_code.of_module(codes)))
    for architecture in architectures:
        unchanged = [work for work in reused if (work.backend, work.architecture) == ("triton", architecture)]
        works += unchanged or triton_works.works((int(architecture) // 10, int(architecture) % 10))
    return Analysis(current_build(), works)


def unchanged_triton_works() -> list[Work]:
    """Return the Triton kernels of results/bounds.json, or nothing if their sources have changed since."""
    stored = load()
    digests = (build.rpartition("Triton kernels ")[2] for build in (stored.build, current_build()))
    return [work for work in stored.works if work.backend == "triton"] if len(set(digests)) == 1 else []


def save(analysis: Analysis) -> None:
    """Write results/bounds.json of the source tree, a line for each kernel and shape."""
    lines = ",\n  ".join(json.dumps(_plain(work)) for work in analysis.works)
    ANALYSIS.write_text(f'{{\n "build": {json.dumps(analysis.build)},\n "works": [\n  {lines}\n ]\n}}\n')


def load() -> Analysis:
    """Read results/bounds.json.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        data = json.loads(ANALYSIS.read_text())
        return Analysis(str(data["build"]), [_work(item) for item in data["works"]])
    except OSError as error:
        raise UserError(f"{ANALYSIS} cannot be read: {error.strerror}; --fresh analyses this build") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{ANALYSIS} is damaged: {error!r}; --fresh analyses this build") from error


def rounded(analysis: Analysis) -> Analysis:
    """Return the analysis with the rounded counts of a file."""
    return Analysis(analysis.build, [_work(_plain(work)) for work in analysis.works])


def _work(item: Mapping[str, Any]) -> Work:
    phases = tuple(Counter(phase) for phase in item["phases"])
    bodies = {role: Counter(body) for role, body in item["bodies"].items()}
    return Work(**{**item, "phases": phases, "bodies": bodies})


def _plain(work: Work) -> dict[str, Any]:
    fields = {field.name: getattr(work, field.name) for field in dataclasses.fields(work)}
    fields["phases"] = [_rounded(phase) for phase in work.phases]
    fields["bodies"] = {role: _rounded(body) for role, body in work.bodies.items()}
    return fields


def _rounded(mix: Counter[str]) -> dict[str, float]:
    return {kind: round(number, 2) for kind, number in sorted(mix.items())}


def bounds(works: Sequence[Work], gpu: str) -> list[tuple[Work, Bound]]:
    """Return the kernels that are built for a GPU of this name, each with its bound."""
    return [(work, bound(work, GPUS[gpu])) for work in works if work.architecture == GPUS[gpu].architecture]


def save_before(analysis: Analysis, commit: str) -> None:
    """Write the bounds of an earlier commit, for comparison."""
    rows = [
        {"gpu": gpu, "backend": work.backend, "kernel": work.kernel, "shape": work.shape}
        | {"ms": round(1e3 * each.seconds, 7), "slots": slots_of(work)}
        for gpu in ("a100", "h100")
        for work, each in bounds(analysis.works, gpu)
    ]
    lines = ",\n  ".join(map(json.dumps, rows))
    BEFORE.write_text(f'{{\n "commit": {json.dumps(commit)},\n "rows": [\n  {lines}\n ]\n}}\n')


def slots_of(work: Work) -> list[float]:
    """Return the issue slots for each element, of the longest part of the epilogue and of all of it, or nothing."""
    return [round(work.element_slots, 1), round(work.epilogue_slots, 1)] if work.elements else []


def load_before() -> tuple[str, dict[Key, dict[str, Any]]]:
    """Return the earlier commit, and its rows."""
    data = json.loads(BEFORE.read_text())
    return data["commit"], {(row["gpu"], row["backend"], row["kernel"], row["shape"]): row for row in data["rows"]}

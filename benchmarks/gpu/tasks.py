"""Steps of `make gpu` that run no tests: `python -m bclip_fast.benchmarks.gpu.tasks NAME --device cuda`.

They call the package's functions and not its commands, because the machine may lack tyro.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def emulator(options: argparse.Namespace) -> None:
    """Build the CUDA kernels for the emulator."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    import cuda_emulator

    print(cuda_emulator.path())


def compile_kernels(options: argparse.Namespace) -> None:
    """Compile the Triton kernels of all figures into Triton's cache. Several processes share the calls."""
    context = multiprocessing.get_context("spawn")
    count = options.processes
    with context.Pool(count) as pool:
        parts = pool.starmap(_compile_part, [(options.device, index, count) for index in range(count)])
    problems = list(itertools.chain(*parts))
    print("\n".join(problems) or "all kernels compile")
    sys.exit(len(problems))


def _compile_part(device: str, index: int, count: int) -> list[str]:
    """Make every `count`th call once, from the one at `index` on. Return the errors."""
    problems = []
    for name, call in list(_calls(device))[index::count]:
        try:
            call()
        except Exception as error:  # a compiler may raise anything
            problems.append(f"{name}: {type(error).__name__}: {error}")
    return problems


def _calls(device: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the calls of Triton's kernels in the benchmarks and in the tuning, by name."""
    import torch

    from bclip_fast.benchmarks.cases import CASES, TINY, Unavailable
    from bclip_fast.ops import trial_cases

    def measured(case: Any) -> None:
        try:
            run = case.contenders["ours:triton"]()
        except Unavailable as reason:
            print(f"{case.id}: {reason}")
            return
        run(*case.make_inputs())

    for case in CASES:
        if "ours:triton" in case.contenders and case.dtype != torch.float32:
            yield case.id, lambda case=case: measured(case)  # type: ignore[misc]
    place = torch.device(device)
    for dtype in trial_cases.dtypes(place):
        trials = [*trial_cases.small(place, dtype)][: TINY or None]
        if not TINY:
            trials += trial_cases.timed(place, dtype)
        for trial in trials:
            if "triton" not in trial.decide().refusals:
                yield f"{trial.operator}, {trial.what}", lambda trial=trial: trial.run("triton", trial.make())  # type: ignore[misc]


def operators(options: argparse.Namespace) -> None:
    """Measure the operators' cases and write each row as soon as it is measured."""
    from bclip_fast.benchmarks.measure import suite

    rows, status = suite(options.only, folders=options.to)
    print(f"{len(rows)} rows")
    sys.exit(status or not rows)


def step(options: argparse.Namespace) -> None:
    """Measure the training step, with the improvements turned on one by one."""
    from bclip_fast.benchmarks import measure
    from bclip_fast.benchmarks.cases import CAPTION_TOKENS, MORE, TINY, Unavailable, open_clip
    from bclip_fast.benchmarks.cases.model import StepConfig
    from bclip_fast.benchmarks.step import measure_step, show_step

    try:
        open_clip()
        has_open_clip = True
    except Unavailable as reason:
        print(reason)
        has_open_clip = False
    with tempfile.TemporaryDirectory() as folder:
        lengths = Path(folder) / "lengths"
        lengths.write_text("".join(f"{tokens} 1\n" for tokens in CAPTION_TOKENS))
        sizes = ("quickstart", 2, "fp32") if TINY else ("biomedclip_b16", 8 * MORE, "bf16")
        config = StepConfig(*sizes, lengths=str(lengths), rounds=1 if TINY else 5, open_clip=has_open_clip)
        rows = [{**measure.environment(), **row} for row in measure_step(config)]
    measure.append(rows, measure.result_files(options.to))
    show_step(rows)


def tune(options: argparse.Namespace) -> None:
    """Write the tuning record into a folder. On a GPU, copy it to the cache, where `auto` finds it."""
    # Times of emulated kernels would be meaningless. The package reads the variable when it is imported.
    os.environ.pop("BCLIP_CUDA_HOST", None)
    from bclip_fast import tune as tuning_command
    from bclip_fast.benchmarks.cases import TINY
    from bclip_fast.ops import fingerprint, tuning

    out = options.out / "tuning.json"
    out.unlink(missing_ok=True)
    # Inductor compiles and times dozens of products for linear_gelu, which takes longer than this step may.
    names = ("gelu",) if TINY else tuple(name for name in tuning_command.OPERATORS if name != "linear_gelu")
    tuning_command.run(tuning_command.TuneConfig(options.device, names, 0.01 if TINY else 0.05, out))
    if not TINY:
        cached = tuning.path_for(fingerprint.fingerprint(options.device, 0))
        cached.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(out, cached)
        print(cached)


def training(options: argparse.Namespace) -> None:
    """Train ten steps with DDP on one rank."""
    from .training import train_engine

    train_engine(options.device)


def trainer(options: argparse.Namespace) -> None:
    """Run the trainer from shards, with DDP on one rank."""
    from .training import train_from_shards

    train_from_shards(options.device)


TASKS: dict[str, Callable[[argparse.Namespace], None]] = {
    "emulator": emulator,
    "compile": compile_kernels,
    "operators": operators,
    "step": step,
    "tune": tune,
    "training": training,
    "trainer": trainer,
}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--processes", type=int, default=1, help="of compile")
    parser.add_argument("--only", default="", help="selection of operators, as for pytest's -k")
    parser.add_argument("--to", type=Path, action="append", default=[], help="folder of rows")
    parser.add_argument("--out", type=Path, help="folder of the tuning record")
    options = parser.parse_args()
    TASKS[options.task](options)


if __name__ == "__main__":
    main()

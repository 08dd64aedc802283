"""Run the steps, and print the table. The exit status is the number of failed steps, or 1 if none can run."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from .needs import dry_run, obstacle, versions
from .runner import run_steps
from .steps import RESULTS, ROOT, Setting, can_import, environment, steps
from .summary import aligned, file_sizes, read_rows, table

NOT_REHEARSED = """Not rehearsed, because only a GPU has it: the machine code of nvcc and Triton, bfloat16 in Triton's
kernels, NCCL, nvJPEG's own decoder, DALI's GPU half, capture of CUDA graphs, compute-sanitizer, and all times."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=sys.modules[__package__].__doc__)
    parser.add_argument("--rehearse", action="store_true", help="run without a GPU, with tiny sizes")
    parser.add_argument("--dry-run", action="store_true", help="list the steps and what each of them needs")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="run only these steps")
    options = parser.parse_args(arguments)
    default = ROOT / "build" / ("gpu_rehearsal" if options.rehearse else "gpu")
    out = Path(os.environ.get("OUT") or default).resolve()
    setting = Setting(out, options.rehearse, can_import("xdist.plugin"))
    print(versions(), flush=True)
    if options.dry_run:
        print("\n".join(aligned([["step", "limit", "what", "needs", "here"], *dry_run(setting)])))
        return 0
    plan = steps(setting)
    if options.only:
        if unknown := set(options.only) - {step.name for step in plan}:
            parser.error(f"unknown steps: {', '.join(sorted(unknown))}")
        plan = [step for step in plan if step.name in options.only]
    problem = obstacle(plan, setting)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "gpu.log").open("a").close()
    except OSError as error:
        problem = problem or f"the folder OUT={out} cannot be written: {error.strerror}. Set OUT to another one"
    if problem:
        print(f"== {problem}", flush=True)
        return 1
    if not options.rehearse and str(RESULTS) not in setting.folders:
        print(f"== {RESULTS} cannot be written: only {out} gets the rows", flush=True)
    sizes = file_sizes(out)
    outcomes = run_steps(plan, setting, {**os.environ, **environment(setting)})
    text = table(outcomes, read_rows(out, sizes))
    (out / "table.txt").write_text(text + "\n")
    (out / "steps.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    print(text)
    if options.rehearse:
        print(NOT_REHEARSED)
    failed = [outcome.name for outcome in outcomes if outcome.failure]
    print(f"== failed: {', '.join(failed)}" if failed else "== no step failed", f"({out})", flush=True)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())

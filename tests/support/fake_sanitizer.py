"""Stands in for compute-sanitizer in a rehearsal of `make gpu`: it checks the options, then runs the program.

The options are those of compute-sanitizer 2025.3, as far as `make gpu` may use them. An unknown one ends it, as it ends
the real program.
"""

from __future__ import annotations

import argparse
import os
import subprocess


def main() -> None:
    parser = argparse.ArgumentParser(prog="compute-sanitizer", allow_abbrev=False)
    parser.add_argument("--tool", choices=["memcheck", "racecheck", "initcheck", "synccheck"], default="memcheck")
    parser.add_argument("--error-exitcode", type=int, default=0)
    parser.add_argument("--target-processes", choices=["application-only", "all"], default="application-only")
    parser.add_argument("--kernel-name", type=_filter)
    parser.add_argument("--print-limit", type=int)
    parser.add_argument("program", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    if not options.program:
        parser.error("no program")
    if "PYTORCH_NO_CUDA_MEMORY_CACHING" not in os.environ:
        parser.error("torch's caching allocator would hide wrong addresses: set PYTORCH_NO_CUDA_MEMORY_CACHING=1")
    print(f"{options.tool} of {options.kernel_name}")
    raise SystemExit(subprocess.run(options.program).returncode)


def _filter(text: str) -> str:
    kind, separator, name = text.partition("=")
    if kind not in ("kns", "kne", "kernel_substring", "kernel_name") or not separator or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not kns=NAME")
    return text


if __name__ == "__main__":
    main()

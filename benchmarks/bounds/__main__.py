"""`python -m benchmarks.bounds` analyses this build and writes results/bounds.json, results/bounds.md and ops/defaults.

It takes two minutes, or less than one if the Triton kernels are those of results/bounds.json. `--compile` compiles
these nevertheless, for example after an update of Triton. `--before COMMIT` writes results/bounds_before.json instead,
and only names the commit in it.
"""

from __future__ import annotations

import argparse
import sys

from bclip_fast.errors import UserError

from . import orders, report, store


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bounds", description=__doc__)
    parser.add_argument("--before", metavar="COMMIT", help="save the bounds as those of an earlier commit")
    parser.add_argument("--compile", action="store_true", help="compile the Triton kernels, even if they are unchanged")
    arguments = parser.parse_args()
    before = arguments.before
    try:
        # The files hold rounded counts, and the report comes from these.
        analysis = store.rounded(store.analyse(reused=[] if arguments.compile else store.unchanged_triton_works()))
    except UserError as error:
        sys.exit(str(error))
    if not any(work.kernel.startswith("hopper") for work in analysis.works):
        sys.exit(
            "the CUDA module is built without kernels for Hopper, which the report needs: "
            "pip install --no-deps nvidia-cutlass, and build it again"
        )
    if before:
        store.save_before(analysis, before)
        return
    store.save(analysis)
    store.REPORT.write_text(report.markdown(analysis))
    print(*(store.ANALYSIS, store.REPORT, *orders.write(analysis.works)), sep="\n")


if __name__ == "__main__":
    main()

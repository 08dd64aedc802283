"""`python -m benchmarks.bounds` analyses this build and writes results/bounds.json, results/bounds.md and ops/defaults.

`--before COMMIT` writes results/bounds_before.json instead.
"""

from __future__ import annotations

import sys

from . import orders, report, store

if __name__ == "__main__":
    # The files hold rounded counts, and the report comes from these.
    analysis = store.rounded(store.analyse())
    if sys.argv[1:2] == ["--before"]:
        store.save_before(analysis, sys.argv[2])
    else:
        store.save(analysis)
        store.REPORT.write_text(report.markdown(analysis))
        orders.write(analysis.works)

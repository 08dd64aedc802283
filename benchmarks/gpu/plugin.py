"""A plugin of pytest for the tests of `make gpu`.

- `--sample N`: collect everything, then run only N small tests of each file. A rehearsal does this.
- After an illegal memory access, every later CUDA call of the process fails too. So this process of pytest-xdist ends,
  and a new one runs the other tests.
"""

from __future__ import annotations

import collections
import os
import re
from collections.abc import Generator
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.addoption("--sample", type=int, default=0, metavar="N", help="run only N of the selected tests of each file")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep a sample. Fail if a file contributes nothing to it."""
    size = config.getoption("--sample")
    if not size:
        return
    by_file: dict[Any, list[pytest.Item]] = collections.defaultdict(list)
    for item in items:
        by_file[item.path].append(item)
    files = {str(config.invocation_params.dir / arg) for arg in config.args if arg.endswith(".py")}
    if absent := files - set(map(str, by_file)):
        raise pytest.UsageError(f"no test is selected in {', '.join(sorted(absent))}")
    kept = [item for tests in by_file.values() for item in sorted(tests, key=_largest_number)[:size]]
    print(f"sample: {len(kept)} of {len(items)} selected tests")
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


def _largest_number(item: pytest.Item) -> int:
    """Return the largest number in the test's id, which is often its largest size."""
    return max(map(int, re.findall(r"\d+", item.nodeid.rpartition("::")[2])), default=0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """End a worker whose CUDA context is broken."""
    result = yield
    if "PYTEST_XDIST_WORKER" in os.environ and is_broken():
        os._exit(1)
    return result


def is_broken() -> bool:
    """Return whether CUDA was used in this process and no longer works."""
    import torch

    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False

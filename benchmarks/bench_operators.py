"""The benchmark suite: `pytest benchmarks -k contrastive --rows=out.jsonl`.

`bclip bench` runs it and shows the results. `--large` adds the cases that take minutes per call.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
from torch import Tensor

from bclip_fast.benchmarks.cases import CASES, DEVICE, TINY, Case, Inputs, Unavailable
from bclip_fast.benchmarks.measure import (
    append,
    environment,
    error_of,
    matmul_rate,
    peak_extra_bytes,
    synchronised,
    truth_of,
)

PAIRS = [pytest.param(case, name, id=f"{case.id}-{name}") for case in CASES for name in case.contenders]


@functools.lru_cache(maxsize=1)
def prepare(case: Case) -> tuple[Inputs, list[Tensor]]:
    """Return the inputs and the truth of a case. The last result is cached for the case's other contenders."""
    inputs = case.make_inputs()
    return inputs, truth_of(case, inputs)


@pytest.mark.parametrize(("case", "contender"), PAIRS)
def test_operator(case: Case, contender: str, benchmark: Any, request: pytest.FixtureRequest) -> None:
    """Time a contender, and check its results against the truth."""
    if case.large and not request.config.getoption("--large"):
        pytest.skip("takes minutes per call: --large")
    try:
        run = synchronised(case.contenders[contender]())
        inputs, truth = prepare(case)
    except Unavailable as reason:
        pytest.skip(f"{contender}: {reason}")
    if case.large:
        once = functools.partial(benchmark.pedantic, run, inputs, rounds=1, iterations=1)
        extra_bytes, results = peak_extra_bytes(once)
        error = error_of(results, truth)
    else:
        results = run(*inputs)  # warm up
        error = error_of(results, truth)  # raises before the timing if the results are wrong
        extra_bytes, results = peak_extra_bytes(lambda: run(*inputs))
        rounds = 1 if TINY else 5 if DEVICE.type == "cpu" else 20
        benchmark.pedantic(run, inputs, rounds=rounds, iterations=1)
    if benchmark.stats is None:  # pytest-benchmark measures nothing in a worker of pytest-xdist
        return
    times = benchmark.stats.stats
    row = dict(
        **environment(),
        operator=case.operator,
        case=case.name,
        contender=contender,
        error=error,
        num_results=len(results),
        num_compared=sum(result is not None for result in results),
        extra_bytes=extra_bytes,
        flops=case.flops,
        bytes=case.bytes,
        unit=case.unit,
        num_units=case.num_units,
        curve=case.curve,
        batch=case.batch,
        dtype=str(case.dtype).removeprefix("torch."),
        **(matmul_rate(case.dtype) if case.flops else {}),
        seconds=times.median,
        min=times.min,
        max=times.max,
    )
    append([row], request.config.getoption("--rows"))

"""`pytest benchmarks -k contrastive --benchmark-json=out.json`; `bclip bench` runs the same and renders it."""

from __future__ import annotations

import functools

import pytest

from bclip_fast.benchmarks.cases import CASES, Case, Unavailable
from bclip_fast.benchmarks.measure import (
    device_of,
    error_of,
    matmul_flops_per_second,
    peak_extra_bytes,
    truth_of,
)

PAIRS = [pytest.param(case, name, id=f"{case.id}-{name}") for case in CASES for name in case.contenders]


@functools.lru_cache(maxsize=1)
def prepared(case: Case) -> tuple:
    inputs = case.make_inputs()
    return inputs, truth_of(case, inputs)


@pytest.mark.parametrize(("case", "contender"), PAIRS)
def test_operator(case, contender, benchmark):
    try:
        run = case.contenders[contender]()
        inputs, truth = prepared(case)
    except Unavailable as reason:
        pytest.skip(f"{contender}: {reason}")
    benchmark.group = case.id
    benchmark.extra_info.update(
        operator=case.operator,
        case=case.name,
        contender=contender,
        error=error_of(run(*inputs), truth),  # green first, and a warm-up
        flops=case.flops,
        bytes=case.bytes,
        unit=case.unit,
        num_units=case.num_units,
        batch=case.batch,
        dtype=str(case.dtype).removeprefix("torch."),
        matmul_flops_per_second=matmul_flops_per_second(case.dtype) if case.flops else 0.0,
    )
    benchmark.extra_info["extra_bytes"] = peak_extra_bytes(lambda: run(*inputs), device_of(inputs))
    benchmark.pedantic(run, inputs, rounds=5, iterations=1)

"""The oracle passes kernels that compute like ours, and rejects each of them with one injected fault."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from arithmetic import Arithmetic, Faulty
from formulas import add_norm, attention, clip_loss, gelu, linear, siglip_loss, single_query_attention
from oracle import compared, expected, factor_of, faults
from targets import dense, dense_siglip

from bclip_fast.ops.attention import reference
from bclip_fast.ops.attention.call import AttentionCall, SingleQueryCall
from bclip_fast.ops.attention.single_query import reference as single_query
from bclip_fast.ops.contrastive import reference as contrastive
from bclip_fast.ops.pointwise import reference as pointwise

SEED = torch.tensor(2**40 + 5)
# The scale of the scores, and the lengths of the sequences. Attention that spreads over many keys shows an error in
# sums over keys. Attention to few keys shows an error in the outputs and in their products with the upstream gradient.
SPREAD, SHARP = (0.12, [40, 60]), (0.4, [14, 31])


def attends(scale, lengths, packed=False, causal=False, dropout_p=0.0):
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32) if packed else None
    rows = sum(lengths)
    options = bounds, None, max(lengths) if packed else rows, causal, dropout_p, SEED if dropout_p else None, scale
    return (
        lambda *parts: reference.attention(AttentionCall(torch.stack(parts, 1), *options)),
        lambda dtype: [torch.randn(rows, 2, 64).to(dtype) for _ in range(3)],
        attention(options),
    )


def pools(scale, lengths, causal=False, dropout_p=0.0):
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    options = bounds[1:].long() - 1, bounds, causal, dropout_p, SEED if dropout_p else None, scale
    return (
        lambda query, *pairs: single_query.attention(SingleQueryCall(query, torch.stack(pairs, 1), *options)),
        lambda dtype: [torch.randn(rows, 4, 64).to(dtype) for rows in (len(lengths), sum(lengths), sum(lengths))],
        single_query_attention(options),
    )


def features(rows, width, dtype):
    return F.normalize(torch.randn(rows, width, dtype=torch.float64)).to(dtype)


def contrasts(definition, formula, *scalars, columns=37):
    def draw(dtype):
        return [features(37, 24, dtype), features(columns, 24, dtype), *map(torch.tensor, scalars)]

    return definition, draw, formula


def normalizes(post, dropout_p):
    def draw(dtype):
        return [torch.randn(33, 50), torch.randn(33, 50).to(dtype), torch.rand(50) + 0.5, torch.randn(50)]

    def definition(stream, branch, weight, bias):
        normed, total = pointwise.add_norm(stream, branch, weight, bias, 1e-6, dropout_p, SEED)
        rounded = normed if normed.dtype == torch.float64 else normed.to(branch.dtype)
        return torch.cat([rounded.to(normed.dtype), 0.5 * (normed if post else total)])

    def formula(arithmetic, inputs, upstream):
        return add_norm(1e-6, dropout_p, SEED, post, inputs[1].dtype)(arithmetic, inputs, upstream)

    return definition, draw, formula


GROUPS = (torch.arange(37) % 11)[:, None] == (torch.arange(41) + 2) % 13
# The settings of each operator. A fault must fail in at least one of them.
OPERATORS = {
    "attention dense": [attends(*SPREAD), attends(*SHARP)],
    "attention causal": [attends(*SPREAD, causal=True), attends(*SHARP, causal=True)],
    "attention packed": [attends(*SPREAD, packed=True), attends(*SHARP, packed=True)],
    "attention dropout": [attends(*SPREAD, packed=True, dropout_p=0.3), attends(*SHARP, packed=True, dropout_p=0.3)],
    "single-query attention": [pools(*SPREAD), pools(*SHARP)],
    "single-query attention dropout": [pools(*SPREAD, True, 0.3), pools(*SHARP, True, 0.3)],
    "clip_loss": [contrasts(contrastive.dense, clip_loss(), 14.3)],
    "clip_loss groups": [contrasts(lambda *a: dense(*a, GROUPS), clip_loss(GROUPS), 20.0, columns=41)],
    "siglip_loss": [contrasts(contrastive.dense_siglip, siglip_loss(), 10.0, -5.0)],
    "siglip_loss groups": [contrasts(lambda *a: dense_siglip(*a, GROUPS), siglip_loss(GROUPS), 10.0, -5.0, columns=41)],
    "add_norm": [normalizes(post=False, dropout_p=0.3)],
    "add_norm post": [normalizes(post=True, dropout_p=0.0)],
    "gelu": [(F.gelu, lambda dtype: [(2 * torch.randn(70, 17)).to(dtype)], gelu)],
    "linear": [(F.linear, lambda dtype: [torch.randn(*s).to(dtype) for s in ((70, 40), (48, 40), (48,))], linear)],
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Relative errors of the exponential's factor log2(e): a few times the rounding of the scores.
SHIFTS = {torch.float32: 2.0**-18, torch.bfloat16: 2.0**-4, torch.float16: 2.0**-7}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_right_kernel_passes_and_each_injected_fault_fails(operator, dtype):
    kinds = [dtype] if dtype.itemsize == 2 else [torch.bfloat16, torch.float16]
    missed = []
    for definition, draw, formula in OPERATORS[operator]:
        cases = expected(definition, lambda draw=draw: draw(dtype), formula, 13 if "single-query" in operator else 6)

        def faults_of(arithmetic, cases=cases, formula=formula):
            return faults(cases, [formula(arithmetic, case.inputs, case.upstream) for case in cases])

        assert faults_of(Arithmetic()) == []
        undetected = set()
        for kind in [*kinds, "lost term", SHIFTS[dtype]]:
            faults_of(right := Faulty(kind))
            undetected |= {
                (kind, site, right.num_sites) for site in range(right.num_sites) if not faults_of(Faulty(kind, site))
            }
        missed.append(undetected)
    assert set.intersection(*missed) == set()


@pytest.mark.parametrize("operator", OPERATORS)
def test_kernel_with_three_times_eagers_error_fails(operator):
    definition, draw, formula = OPERATORS[operator][0]
    cases = expected(definition, lambda: draw(torch.float32), formula)
    for place, true in enumerate(cases[0].truth):
        truth, usual = [case.truth[place] for case in cases], [[way[place] for way in case.usual] for case in cases]
        results = [true + 3 * (ways[0].double() - true) for true, ways in zip(truth, usual, strict=True)]
        assert list(compared([result.float() for result in results], usual, truth, None, 100)) or true.numel() < 30, (
            place
        )


def test_kernel_with_eagers_error_passes():
    """On another processor, eager's errors have the same size but other signs."""
    for settings in OPERATORS.values():
        definition, draw, formula = settings[0]
        cases = expected(definition, lambda draw=draw: draw(torch.float32), formula)
        results = [
            [2 * true - one.double() for true, one in zip(case.truth, case.usual[0], strict=True)] for case in cases
        ]
        assert faults(cases, results) == []


@pytest.mark.parametrize(("count", "factor"), [(100, 2), (10**6, 2), (3, 240), (10, 13), (99, 4)])
def test_factor_for_few_errors_is_larger(count, factor):
    assert factor_of(count) == pytest.approx(factor, rel=0.15)

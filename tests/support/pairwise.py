"""Covering arrays: few cases that together contain every pair of values of different parameters.

Faults that depend on three parameters at once are rare (Kuhn, Wallace and Gallo 2004, "Software fault interactions and
implications for software testing"). The full product covers them, and runs under the marker `long`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest

Case = tuple[Any, ...]


def covering(values: Sequence[Sequence[Any]], allowed: Callable[[Case], bool] = lambda case: True) -> list[Case]:
    """Cases of the product of `values` that contain every pair of values that any allowed case contains.

    The choice is greedy and deterministic: the first case with the most new pairs comes next.
    """
    places = itertools.product(*(range(len(one)) for one in values))
    cases = [place for place in places if allowed(_values_at(values, place))]
    missing = {pair for case in cases for pair in _pairs(case)}
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(missing & _pairs(case)))
        missing -= _pairs(best)
        chosen.append(best)
    # Cases keep the product's order. A single parameter has no pairs.
    return [_values_at(values, place) for place in (sorted(chosen) if len(values) > 1 else cases)]


def _values_at(values: Sequence[Sequence[Any]], places: Case) -> Case:
    return tuple(one[place] for one, place in zip(values, places, strict=True))


def _pairs(case: Case) -> set[Any]:
    return set(itertools.combinations(enumerate(case), 2))


def pairwise(allowed: Callable[..., bool] | None = None, **values: Sequence[Any]) -> pytest.MarkDecorator:
    """`pytest.mark.parametrize` over a covering array of the values. The rest of the product is marked `long`.

    A name such as `backend_and_dtype` stands for two arguments, backend and dtype, and its values are pairs. `allowed`
    takes the arguments by name.
    """
    names = [name.split("_and_") for name in values]
    arguments = list(itertools.chain(*names))

    def flat(case: Case) -> Case:
        parts = zip(names, case, strict=True)
        return tuple(itertools.chain.from_iterable(one if len(group) > 1 else (one,) for group, one in parts))

    def is_allowed(case: Case) -> bool:
        return allowed is None or allowed(**dict(zip(arguments, flat(case), strict=True)))

    few = covering(list(values.values()), is_allowed)
    parameters = []
    for case in filter(is_allowed, itertools.product(*values.values())):
        label = "-".join(map(str, flat(case)))
        parameters.append(pytest.param(*flat(case), id=label, marks=() if case in few else pytest.mark.long))
    return pytest.mark.parametrize(arguments, parameters)

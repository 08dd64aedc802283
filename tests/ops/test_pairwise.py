from __future__ import annotations

import itertools
import random

import pytest
from pairwise import covering, pairwise


def pairs(cases):
    return {pair for case in cases for pair in itertools.combinations(enumerate(case), 2)}


@pytest.mark.parametrize("sizes", [(2, 2), (4, 3, 2), (6, 4, 4, 2, 2), (3, 3, 3, 3), (1, 5, 1), (7,)], ids=str)
def test_covering_array_holds_every_pair_of_values(sizes):
    values = [[f"{place}{number}" for number in range(size)] for place, size in enumerate(sizes)]
    few = covering(values)
    assert pairs(few) == pairs(itertools.product(*values))
    assert len(few) == len(set(few))
    assert set(few) <= set(itertools.product(*values))
    # The least possible number is the product of the two largest sizes. A greedy array is only slightly larger.
    least = sorted(sizes)[-1] * (sorted(sizes)[-2] if len(sizes) > 1 else 1)
    assert least <= len(few) <= 1.5 * least + 2
    assert few == covering(values)


@pytest.mark.parametrize("seed", range(5))
def test_covering_array_with_a_constraint_holds_every_allowed_pair(seed):
    values = [range(4), range(3), range(3), range(2)]
    draw = random.Random(seed)
    allowed = {case for case in itertools.product(*values) if draw.random() < 0.6}
    few = covering(values, allowed.__contains__)
    assert set(few) <= allowed
    assert pairs(few) == pairs(allowed)


def test_covering_array_of_nothing_is_empty():
    assert covering([[1, 2], []]) == []
    assert covering([[1, 2], [3]], lambda case: False) == []


def test_mark_covers_the_full_product_and_marks_the_rest_long():
    mark = pairwise(
        a_and_b=[(1, "x"), (2, "y")], c=[3, 4, 5], d=[True, False], allowed=lambda a, b, c, d: not (d and a == c)
    )
    arguments, parameters = mark.args
    assert arguments == ["a", "b", "c", "d"]
    assert len(parameters) == 12
    assert [one.id for one in parameters[:2]] == ["1-x-3-True", "1-x-3-False"]
    assert sum(not one.marks for one in parameters) == 6

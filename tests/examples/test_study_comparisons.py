"""Intervals of paired differences, and which of many survive that they are many."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ttest_rel
from study.comparisons import Comparison, holm


def with_p(p: float) -> Comparison:
    """Two differences 1 ± d with this p-value: Student's t with one degree is Cauchy's."""
    d = float(np.tan(np.pi * p / 2))  # |t| = mean / (d √2 / √2)
    found = Comparison((1 - d, 1 + d))
    assert found.p_value == pytest.approx(p)
    return found


def test_the_p_value_is_that_of_the_paired_t_test_and_of_the_interval() -> None:
    generator = np.random.default_rng(0)
    for count in (2, 3, 10):
        for shift in (0.0, 0.5, 2.0):
            first, second = generator.normal(shift, 1, count), generator.normal(0, 1, count)
            found = Comparison.between(first.tolist(), second.tolist())
            assert found.p_value == pytest.approx(ttest_rel(first, second).pvalue)
            low, high = map(float, str(found).split("[")[1].rstrip("]").split(","))
            if min(abs(low), abs(high)) > 0.01:  # more than the text is rounded by
                assert found.excludes_zero == (low > 0 or high < 0)


def test_a_single_difference_has_no_interval() -> None:
    single = Comparison.between([3.0], [1.5])
    assert str(single) == "+1.50"
    assert single.p_value is None
    assert not single.excludes_zero
    assert holm([single]) == set()
    with pytest.raises(ValueError, match="zip"):
        Comparison.between([1.0, 2.0], [1.0])


@pytest.mark.parametrize(("value", "p"), [(0.0, 1.0), (0.5, 0.0)])
def test_differences_that_are_all_the_same(value: float, p: float) -> None:
    assert Comparison((value, value)).p_value == p


def test_holm_holds_each_against_those_that_are_left() -> None:
    # 0.05 / 4, / 3, / 2, / 1: by Bonferroni's correction the second and third would fall.
    found = [with_p(p) for p in (0.03, 0.001, 0.024, 0.016)]
    assert holm(found) == {*found}
    # From the first that is above on, none.
    found = [with_p(p) for p in (0.001, 0.02, 0.021, 0.0499)]
    assert holm(found) == {found[0]}
    assert holm([*found, found[0], Comparison((9.0,))]) == {found[0]}  # twice is once
    assert holm([]) == set()


def test_holm_rejects_nothing_too_often() -> None:
    """Of 200 families of twenty comparisons without a difference, about 5 % lose one."""
    generator = np.random.default_rng(1)
    families = 200
    false = sum(
        bool(holm(Comparison(tuple(row)) for row in generator.normal(size=(20, 4)).tolist()))
        for _ in range(families)
    )
    assert false / families == pytest.approx(0.05, abs=0.05)

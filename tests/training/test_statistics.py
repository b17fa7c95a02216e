"""Intervals against scipy's own, a table's value, and laws."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats  # type: ignore[import-untyped]

from training.statistics import paired, summary

numbers = st.lists(st.floats(0, 1), min_size=2, max_size=12)


def test_summary_by_hand() -> None:
    # t(0.975, 4) = 2.776 (Student's table); sd of 1..5 is √2.5.
    found = summary([1, 2, 3, 4, 5])
    assert found["mean"] == 3
    assert found["sd"] == pytest.approx(2.5**0.5)
    half = 2.776 * (2.5 / 5) ** 0.5
    assert found["interval_95"] == pytest.approx([3 - half, 3 + half], abs=1e-3)


def test_one_value_says_nothing_of_its_spread() -> None:
    assert summary([0.9]) == {"mean": 0.9, "sd": None, "interval_95": None}


@given(numbers, st.data())
def test_paired_is_scipys_paired_test(values: list[float], data: st.DataObject) -> None:
    others = data.draw(st.lists(st.floats(0, 1), min_size=len(values), max_size=len(values)))
    found = paired(values, others)
    assume(found["sd"] > 1e-6)  # where all differences are equal scipy warns of lost precision
    expected = stats.ttest_rel(values, others).confidence_interval(0.95)
    assert found["interval_95"] == pytest.approx([expected.low, expected.high], abs=1e-9)


def test_what_varies_alike_cancels_out() -> None:
    assert paired([1.5, 2.5, 3.5], [1, 2, 3]) == {"mean": 0.5, "sd": 0.0, "interval_95": [0.5, 0.5]}


def test_pairs_must_be_complete() -> None:
    with pytest.raises(ValueError, match="longer"):
        paired([1, 2], [1, 2, 3])

"""Schedules: by hand at their landmarks, between their ends everywhere."""

import math
from typing import Literal

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from training.schedule import Schedule, at, extremes, one_cycle

unit = st.floats(0, 1)
numbers = st.floats(-100, 100)
Kind = Literal["linear", "cosine", "warmup", "step"]
ramps: list[Kind] = ["linear", "cosine", "warmup"]


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    begin, finish = sorted((draw(unit), draw(unit)))
    assume(finish - begin > 1e-6)
    kind: Kind = draw(st.sampled_from([*ramps, "step"]))
    return Schedule(kind=kind, start=draw(numbers), end=draw(numbers), begin=begin, finish=finish)


def test_one_cycle_by_hand() -> None:
    assert one_cycle(0.0, 0.2) == 0.0
    assert one_cycle(0.1, 0.2) == pytest.approx(0.5)
    assert one_cycle(0.2, 0.2) == pytest.approx(1.0)
    assert one_cycle(0.6, 0.2) == pytest.approx(0.5)  # the middle of the cosine
    assert one_cycle(1.0, 0.2) == pytest.approx(0.0)
    assert one_cycle(0.0, 0.0) == 1.0  # a plain cosine
    assert one_cycle(0.25, 0.0) == pytest.approx((1 + math.sqrt(0.5)) / 2)


@given(a=unit, b=unit, warmup=st.floats(0, 0.99))
def test_one_cycle_rises_then_falls_between_0_and_1(a: float, b: float, warmup: float) -> None:
    low, high = sorted((a, b))
    first, second = one_cycle(low, warmup), one_cycle(high, warmup)
    assert 0 <= first <= 1
    if high < warmup:
        assert first <= second
    if low >= warmup:
        assert first >= second


@pytest.mark.parametrize(
    ("schedule", "expected"),  # at 0, 0.25, 0.5, 0.75, 1
    [
        (Schedule(kind="linear", start=5, end=1), [5, 4, 3, 2, 1]),
        (Schedule(kind="linear", start=0, end=4, begin=0.5, finish=0.75), [0, 0, 0, 4, 4]),
        (Schedule(kind="linear", start=0, end=4, begin=0.25, finish=0.75), [0, 0, 2, 4, 4]),
        (Schedule(kind="cosine", start=4, end=0), [4, 2 + math.sqrt(2), 2, 2 - math.sqrt(2), 0]),
        (Schedule(kind="warmup", end=0.9, finish=0.5), [0, 0.45, 0.9, 0.9, 0.9]),
        (Schedule(kind="step", end=1, begin=0.5), [0, 0, 1, 1, 1]),
        (Schedule(kind="step", start=2, end=1, begin=0.6), [2, 2, 2, 1, 1]),
    ],
    ids=str,
)
def test_schedules_by_hand(schedule: Schedule, expected: list[float]) -> None:
    assert [schedule(progress / 4) for progress in range(5)] == pytest.approx(expected, abs=1e-12)


@given(schedule=schedules(), a=unit, b=unit)
def test_a_schedule_stays_between_its_ends_and_goes_one_way(schedule: Schedule, a: float, b: float) -> None:
    low, high = sorted((schedule.start, schedule.end))
    before, after = (schedule(progress) for progress in sorted((a, b)))
    slack = 1e-12 * max(abs(low), abs(high))  # of rounding
    assert low - slack <= before <= high + slack
    if schedule.start <= schedule.end:
        assert before <= after + slack
    else:
        assert before >= after - slack
    assert extremes(schedule) == (low, high)


@given(schedule=schedules())
def test_a_schedule_starts_at_its_start_and_ends_at_its_end(schedule: Schedule) -> None:
    if schedule.begin > 0:
        assert schedule(0.0) == schedule.start
    assert schedule(schedule.finish) == pytest.approx(schedule.end)
    assert schedule(1.0) == pytest.approx(schedule.end)


@given(kind=st.sampled_from(ramps), share=unit, begin=st.floats(0, 0.4), length=st.floats(0.1, 0.5))
def test_a_cosine_is_slow_at_both_ends_and_the_others_are_lines(
    kind: Kind, share: float, begin: float, length: float
) -> None:
    schedule = Schedule(kind=kind, start=0, end=1, begin=begin, finish=begin + length)
    expected = math.sin(math.pi / 2 * share) ** 2 if kind == "cosine" else share
    assert schedule(begin + share * length) == pytest.approx(expected, abs=1e-9)


def test_a_number_is_what_it_is_and_a_schedule_what_it_is_now() -> None:
    schedule = Schedule(kind="linear", start=5, end=1)
    assert (at(3.0, 0.7), at(schedule, 0.25)) == (3.0, 4.0)
    assert (extremes(3.0), extremes(schedule)) == ((3.0, 3.0), (1, 5))

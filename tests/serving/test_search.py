"""The search's contract, on plain functions: what is measured how often, what may win, what it cannot win by."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handler.errors import DistilleryError
from serving.archive import ServeSettings
from serving.bench import Figures
from serving.search import Candidate, Values, search

PACKED = Candidate(128, 1, 0, "auto")
SPACE: dict[str, Values] = {
    "batch_size": lambda _: [1, 8, 128],
    "workers": lambda _: [1, 2],
    "threads": lambda best: [4 // best.workers],
    "engine": lambda _: ["eager", "onnx"],
}


def figures(requests_per_s: float, p50_ms: float = 1.0) -> Figures:
    return Figures(requests_per_s, p50_ms, 2 * p50_ms, 0.1)


GAINS = st.dictionaries(st.sampled_from([1, 8, 128, "eager", "onnx", "two workers", "threads"]), st.integers(1, 100))


@given(GAINS)
def test_where_dimensions_do_not_touch_each_other_the_best_of_all_is_found(gains: dict[object, int]) -> None:
    def measure(one: Candidate) -> Figures:
        more = ["two workers"] * (one.workers == 2) + ["threads"] * (one.threads > 0)
        return figures(sum(gains.get(name, 0) for name in (one.batch_size, one.engine, *more)))

    best, rows = search(PACKED, SPACE, measure, 1, "throughput")
    every = itertools.starmap(Candidate, itertools.product((1, 8, 128), (1, 2), (0, 4), ("auto", "eager", "onnx")))
    assert measure(best) == figures(max(measure(one).requests_per_s for one in every))
    assert best in [row.candidate for row in rows] and rows[0].candidate == PACKED


def test_all_of_a_dimension_are_measured_in_turns_beside_the_best_so_far() -> None:
    asked: list[Candidate] = []

    def measure(one: Candidate) -> Figures:
        asked.append(one)
        return figures(1000.0 * one.workers)

    best, rows = search(PACKED, SPACE, measure, 3, "throughput")
    assert [one.batch_size for one in asked[:9]] == [128, 1, 8] * 3
    assert set(Counter(asked[:9]).values()) == {3}
    assert [row.dimension for row in rows] == ["batch_size"] * 3 + ["workers"] * 2 + ["threads"] * 2 + ["engine"] * 3
    assert {row.candidate.workers for row in rows if row.dimension == "engine"} == {2}
    assert rows[6].candidate.threads == 2, "values may depend on the best so far"
    assert best == replace(PACKED, workers=2)


@pytest.mark.parametrize(("gain", "chosen"), [(199, 128), (201, 8)])
def test_a_gain_that_the_rounds_differ_by_changes_nothing(gain: int, chosen: int) -> None:
    noise = {128: iter((900, 1000, 1100)), 8: iter((1000 + gain, 1000 + gain, 1000 + gain))}
    space: dict[str, Values] = {"batch_size": lambda _: [8]}
    best, _ = search(PACKED, space, lambda one: figures(next(noise[one.batch_size])), 3, "throughput")
    assert best.batch_size == chosen


def test_latency_is_better_when_it_is_less() -> None:
    space: dict[str, Values] = {"batch_size": lambda _: [1, 8]}
    best, _ = search(PACKED, space, lambda one: figures(one.batch_size, one.batch_size), 2, "latency")
    assert best.batch_size == 1


def test_who_cannot_be_measured_is_a_row_with_its_reason_and_not_chosen() -> None:
    asked: list[int] = []

    def measure(one: Candidate) -> Figures:
        asked.append(one.batch_size)
        if one.batch_size == 8 and asked.count(8) == 2:
            raise DistilleryError("out of\n  memory")
        return figures(9000.0 if one.batch_size == 8 else 100.0)

    best, rows = search(PACKED, {"batch_size": lambda _: [8]}, measure, 4, "throughput")
    assert best == PACKED and asked.count(8) == 2, "it is not tried again"
    assert [row.problem for row in rows] == [None, "out of memory"]


def test_where_the_packed_one_fails_another_takes_its_place_and_where_all_fail_that_is_the_error() -> None:
    def measure(one: Candidate) -> Figures:
        if one.batch_size == 128 or one.engine == "broken":
            raise DistilleryError(f"no {one.batch_size}")
        return figures(1.0)

    best, _ = search(PACKED, {"batch_size": lambda _: [8]}, measure, 2, "throughput")
    assert best.batch_size == 8
    with pytest.raises(DistilleryError, match="no 128"):
        search(PACKED, {"engine": lambda _: ["broken"]}, measure, 2, "throughput")


def test_nothing_to_choose_from_is_not_measured() -> None:
    def measure(one: Candidate) -> Figures:
        raise AssertionError(one)

    assert search(PACKED, {"batch_size": lambda _: [128]}, measure, 2, "throughput") == (PACKED, [])


def test_a_candidate_is_what_the_archive_asks_for_and_changes_nothing_else() -> None:
    settings = ServeSettings(min_workers=2, max_workers=3, batch_size=4)
    candidate = Candidate.of(settings)
    assert candidate == Candidate(4, 2, 0, "auto")
    assert candidate.changes(settings)["max_workers"] == 3
    assert replace(candidate, workers=5).changes(settings)["max_workers"] == 5

"""Counting never costs an answer."""

from typing import Any

import pytest

from handler import metrics


class Sink:
    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def add_counter(self, *arguments: Any) -> None:
        self.calls.append(arguments)


def test_one_counter_an_outcome_and_one_for_all() -> None:
    sink = Sink()
    metrics.emit(sink, {"HIT": 3, "ERROR": 1})
    assert [call[:2] for call in sink.calls] == [
        ("distillery_requests_total", 4),
        ("distillery_cache_hits_total", 3),
        ("distillery_errors_total", 1),
    ]


def test_each_counter_has_a_list_of_dimensions_of_its_own() -> None:
    """TorchServe appends to the list it is given. Index 0 puts one request's id on the line, not the batch's."""
    sink = Sink()
    metrics.emit(sink, {"HIT": 1})
    assert sink.calls[0][2:] == (0, []) and sink.calls[0][3] is not sink.calls[1][3]


def test_no_sink_is_fine() -> None:
    metrics.emit(None, {"HIT": 1})


def test_a_fault_is_logged_not_raised(caplog: pytest.LogCaptureFixture) -> None:
    metrics.emit(Sink(), {"UNHEARD OF": 1})
    assert "metrics of a batch are lost" in caplog.text

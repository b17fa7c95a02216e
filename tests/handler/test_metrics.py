"""Sums, histograms in Prometheus' form, and what TorchServe is told of them; counting never costs an answer."""

import re
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import ts
from hypothesis import given
from hypothesis import strategies as st
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl

from handler import metrics
from handler.metrics import METRICS, Metrics, Values, to_torchserve

PATIENCE_S = 60.0


class Taken:
    """What was emitted, one after the other."""

    def __init__(self) -> None:
        self.counters: list[Values] = []
        self.gauges: list[Values] = []

    def __call__(self, counters: Values, gauges: Values) -> None:
        self.counters.append(counters)
        self.gauges.append(gauges)


def test_what_was_added_is_emitted_once() -> None:
    taken = Taken()
    found = Metrics(emit=taken)
    found.add("distillery_redis_errors_total", 3)
    found.add("distillery_refusals_total", label="bad_shape")
    found.add("distillery_redis_errors_total")
    found.flush()
    found.flush()
    assert taken.counters == [
        {("distillery_redis_errors_total", ""): 4, ("distillery_refusals_total", "bad_shape"): 1},
        {},
    ]


def test_of_totals_only_what_they_grew_by() -> None:
    """But once when they are still 0, so that Prometheus knows of them before they grow."""
    hits = ("distillery_cache_hits_total", "")
    taken, totals = Taken(), iter([0, 5, 7, 7, 8])
    found = Metrics(totals=lambda: {hits: next(totals)}, emit=taken)
    for _ in range(5):
        found.flush()
    assert taken.counters == [{hits: 0}, {hits: 5}, {hits: 2}, {}, {hits: 1}]


@given(st.lists(st.lists(st.floats(0, 2), max_size=5), min_size=1, max_size=4))
def test_a_bucket_counts_all_values_up_to_its_bound(batches: list[list[float]]) -> None:
    """In sum over all emissions, which is what a counter shows."""
    taken = Taken()
    found = Metrics(emit=taken)
    for values in batches:
        if values:
            found.observe("distillery_batch_seconds", *values)
        found.flush()

    def total(name: str, label: str = "") -> float:
        return sum(counters.get((f"distillery_batch_seconds_{name}", label), 0) for counters in taken.counters)

    values = [value for batch in batches for value in batch]
    for bound in METRICS["distillery_batch_seconds"].buckets:
        assert total("bucket", f"{bound:g}") == sum(value <= bound for value in values)
    assert total("bucket", "+Inf") == total("count") == len(values)
    assert total("sum") == pytest.approx(sum(values))


def test_predictions_by_class_and_how_sure_they_were() -> None:
    taken = Taken()
    found = Metrics(emit=taken)
    found.predicted([("c", 0.995), ("a", 0.5), ("c", 0.31)])
    found.flush()
    [counters] = taken.counters
    assert {key: n for key, n in counters.items() if key[0] == "distillery_predictions_total"} == {
        ("distillery_predictions_total", "a"): 1,
        ("distillery_predictions_total", "c"): 2,
    }
    assert [counters.get(("distillery_confidence_bucket", label)) for label in ("0.3", "0.4", "0.5", "0.99", "1")] == [
        None, 1, 2, 2, 3,
    ]  # fmt: skip


def test_a_batch_is_counted_timed_and_soon_emitted() -> None:
    taken, came = Taken(), threading.Event()

    def emit(counters: Values, gauges: Values) -> None:
        taken(counters, gauges)
        came.set()

    found = Metrics(gauges=lambda: {("distillery_resident_bytes", "1"): 7.0}, emit=emit)
    found.seconds["batch"].append(0.5)
    found.seconds["decode"].append(0.25)
    assert not taken.counters, "counted before the batch was over"
    found.batch(3)
    assert came.wait(PATIENCE_S)
    [counters] = taken.counters
    assert counters["distillery_requests_total", ""] == 3
    assert counters["distillery_batch_requests_bucket", "4"] == 1 and counters["distillery_batch_requests_sum", ""] == 3
    assert counters["distillery_decode_seconds_sum", ""] == 0.25 and counters["distillery_batch_seconds_sum", ""] == 0.5
    assert taken.gauges == [{("distillery_resident_bytes", "1"): 7.0}]


def test_many_batches_are_emitted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second emission is not before the interval is over: with one of an hour, never."""
    monkeypatch.setattr(metrics, "INTERVAL_S", 3600.0)
    taken, came = Taken(), threading.Event()
    found = Metrics(emit=lambda *values: (taken(*values), came.set()))  # type: ignore[func-returns-value, arg-type]
    found.batch(1)
    assert came.wait(PATIENCE_S)
    for _ in range(100):
        found.batch(1)
    assert len(taken.counters) == 1
    found.flush()
    assert taken.counters[1]["distillery_requests_total", ""] == 100


def test_without_a_thread_the_next_batch_tries_again() -> None:
    taken, came = Taken(), threading.Event()
    found = Metrics(emit=lambda *values: (taken(*values), came.set()))  # type: ignore[func-returns-value, arg-type]
    with pytest.MonkeyPatch.context() as without, pytest.raises(RuntimeError):
        without.setattr(threading.Thread, "start", lambda _: (_ for _ in ()).throw(RuntimeError("no new thread")))
        found.batch(1)
    found.batch(1)
    assert came.wait(PATIENCE_S)
    assert taken.counters[0]["distillery_requests_total", ""] == 2


def test_a_fault_is_logged_not_raised(caplog: pytest.LogCaptureFixture) -> None:
    Metrics(emit=lambda *_: 1 / 0).flush()  # type: ignore[arg-type]
    assert "metrics are lost" in caplog.text and "ZeroDivisionError" in caplog.text


@pytest.fixture
def sink() -> Any:
    """The metrics that TorchServe hands to a handler, configured as upstream has them."""
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):  # TorchServe leaves the file open
        found = MetricsCacheYamlImpl(str(Path(ts.__file__).parent / "configs" / "metrics.yaml"))
    found.initialize_cache()
    found.model_name = "student"
    return found


LINE = re.compile(r"\[METRICS\]([\w\s]+)\.([\w\s]+):([0-9\-,.e]+)\|#([^|]*)\|#type:([^|,]+)\|#hostname:([^,]+),([^,]+)")
"""What TorchServe reads a line of metrics by."""


def test_torchserve_can_read_every_line(sink: Any, caplog: Any) -> None:
    caplog.set_level("INFO")
    emit = to_torchserve(sink)
    counters = {("distillery_requests_total", ""): 2.0, ("distillery_predictions_total", "T-shirt, a:b|c#"): 1.0}
    counters |= {("distillery_batch_seconds_bucket", "+Inf"): 3.0, ("distillery_batch_seconds_sum", ""): 1.5e-7}
    for _ in range(2):
        emit(counters, {("distillery_resident_bytes", "9000"): 5e8})
    here = [record for record in caplog.records if record.thread == threading.get_ident()]  # not an earlier worker's
    lines = [record.getMessage() for record in here if "[METRICS]" in record.getMessage()]
    found = [LINE.fullmatch(line) for line in lines]
    assert len(found) == 10 and all(found)
    parts = [match.groups()[:5] for match in found if match][:5]
    own = "ModelName:student,Level:Model"
    assert parts == [
        ("distillery_requests_total", "Count", "2.0", own, "COUNTER"),
        ("distillery_predictions_total", "Count", "1.0", f"{own},class:T-shirt_ a_b_c_", "COUNTER"),
        ("distillery_batch_seconds_bucket", "Count", "3.0", f"{own},le:+Inf", "COUNTER"),
        ("distillery_batch_seconds_sum", "Count", "1.5e-07", own, "COUNTER"),
        ("distillery_resident_bytes", "Count", "500000000.0", f"{own},worker:9000", "GAUGE"),
    ]

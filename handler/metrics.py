"""The names of our metrics, and one emission a batch: each metric costs the server a log line to parse."""

import logging
from collections.abc import Mapping
from typing import Any

log = logging.getLogger(__name__)

REQUESTS = "distillery_requests_total"
OUTCOMES = {
    "HIT": "distillery_cache_hits_total",
    "MISS": "distillery_cache_misses_total",
    "BYPASS": "distillery_cache_bypassed_total",
    "ERROR": "distillery_errors_total",
}


def emit(sink: Any, outcomes: Mapping[str, int]) -> None:
    """Count a batch's requests by outcome (a key of OUTCOMES) in TorchServe's metrics; never raises."""
    if sink is None:
        return
    try:
        sink.request_ids = {}  # else TorchServe writes those of all requests behind each metric
        _add(sink, REQUESTS, sum(outcomes.values()))
        for outcome, count in outcomes.items():
            _add(sink, OUTCOMES[outcome], count)
    except Exception:  # an uncounted answer is better than none
        log.exception("metrics of a batch are lost")


def _add(sink: Any, name: str, count: int) -> None:
    # With an index it is a metric of the model; the list is ours, for TorchServe appends to its default.
    sink.add_counter(name, count, 0, [])

"""What is counted, under which names; handed on at most once a second, however many requests there are.

For the server each value is a line of log to parse, so a worker adds up and emits sums. Histograms are counters in
Prometheus' own form (`_bucket` with `le`, `_sum`, `_count`): those of TorchServe have no bucket below 5 ms.
"""

import bisect
import logging
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

log = logging.getLogger(__name__)
INTERVAL_S = 1.0
DELAY_S = 0.05  # so that the answers that are waiting go first
SECONDS = 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 1.0
Key = tuple[str, str]  # a metric's name, and the value of its label ("" where it has none)
Values = Mapping[Key, float]
_UNSAFE = str.maketrans(",:|#\n", "_____")  # with which TorchServe's lines of metrics end a label


@dataclass(frozen=True)
class Metric:
    """A counter with a label or without, a histogram (which has `buckets`), or a gauge."""

    label: str = ""
    buckets: tuple[float, ...] = ()
    gauge: bool = False


METRICS = {
    "distillery_requests_total": Metric(),
    "distillery_refusals_total": Metric(label="code"),
    "distillery_predictions_total": Metric(label="class"),
    "distillery_cache_hits_total": Metric(),
    "distillery_cache_shared_hits_total": Metric(),
    "distillery_cache_misses_total": Metric(),
    "distillery_cache_bypassed_total": Metric(),
    "distillery_cache_deduplicated_total": Metric(),
    "distillery_cache_expired_total": Metric(),
    "distillery_cache_evicted_total": Metric(),
    "distillery_redis_errors_total": Metric(),
    "distillery_batch_requests": Metric(buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256)),
    "distillery_batch_seconds": Metric(buckets=SECONDS),
    "distillery_lookup_seconds": Metric(buckets=SECONDS),
    "distillery_decode_seconds": Metric(buckets=SECONDS),
    "distillery_inference_seconds": Metric(buckets=SECONDS),
    "distillery_encode_seconds": Metric(buckets=SECONDS),
    "distillery_confidence": Metric(buckets=(0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)),
    "distillery_resident_bytes": Metric(label="worker", gauge=True),
}
BUCKETS: Mapping[str, Sequence[Key]] = {
    name: [(f"{name}_bucket", bound) for bound in (*map("{:g}".format, metric.buckets), "+Inf")]
    for name, metric in METRICS.items()
    if metric.buckets
}


class Timed:
    """The seconds that a `with` block takes, noted under a name; a generator as context takes five times as long."""

    def __init__(self, name: str, noted: list[tuple[str, float]]) -> None:
        self.name, self.noted = name, noted

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.noted.append((self.name, time.perf_counter() - self.began))


class Metrics:
    """Sums since the last emission, which another thread does; any may add.

    `totals` says what stands somewhere as a count since the start, `gauges` what is true at the moment; `emit` takes
    what counters have grown by, and gauges.
    """

    def __init__(
        self,
        totals: Callable[[], Values] = dict,
        gauges: Callable[[], Values] = dict,
        emit: Callable[[Values, Values], None] = lambda *_: None,
    ) -> None:
        self.totals, self.gauges, self.emit = totals, gauges, emit
        self.pending: defaultdict[Key, float] = defaultdict(float)
        self.seen: dict[Key, float] = {}
        self.noted: list[tuple[str, float]] = []
        self.lock, self.due, self.scheduled = threading.Lock(), 0.0, False

    def add(self, name: str, value: float = 1, label: str = "") -> None:
        """Add to a counter."""
        with self.lock:
            self.pending[name, label] += value

    def observe(self, name: str, *values: float) -> None:
        """Put values into a histogram."""
        bounds, keys = METRICS[name].buckets, BUCKETS[name]
        with self.lock:
            for value in values:
                self.pending[keys[bisect.bisect_left(bounds, value)]] += 1
            self.pending[f"{name}_sum", ""] += sum(values)

    def predicted(self, told: Sequence[tuple[int, float]], labels: Sequence[str]) -> None:
        """Count predictions, of which class and probability are `told`, and put the latter into a histogram."""
        for k, _ in told:
            self.add("distillery_predictions_total", label=labels[k])
        self.observe("distillery_confidence", *(sure for _, sure in told))

    def timed(self, step: str) -> Timed:
        """Times a block for the histogram of a step, which `batch` puts it into."""
        return Timed(f"distillery_{step}_seconds", self.noted)

    def batch(self, requests: int) -> None:
        """Count a batch that is over, and put the times of its steps into their histograms."""
        for name, seconds in self.noted:
            self.observe(name, seconds)
        self.noted.clear()
        self.add("distillery_requests_total", requests)
        self.observe("distillery_batch_requests", requests)
        if not self.scheduled:
            self.scheduled = True
            timer = threading.Timer(max(DELAY_S, self.due - time.monotonic()), self.flush)
            timer.daemon = True
            timer.start()

    def flush(self) -> None:
        """Emit what there is. A fault is logged, not raised: an uncounted answer is better than none."""
        self.scheduled, self.due = False, time.monotonic() + INTERVAL_S
        try:
            with self.lock:
                pending, self.pending = self.pending, defaultdict(float)
            totals = dict(self.totals())
            grown = {key: n - self.seen.get(key, 0) for key, n in totals.items() if n != self.seen.get(key)}
            self.seen = totals
            self.emit(_cumulative(pending | grown), self.gauges())
        except Exception:
            log.exception("metrics are lost")


def _cumulative(values: Values) -> dict[Key, float]:
    """The values, with each bucket in all those above it, as Prometheus wants it, and their count."""
    found = {key: value for key, value in values.items() if not key[0].endswith("_bucket")}
    for name, keys in BUCKETS.items():
        counted = 0.0
        for key in keys:
            counted += values.get(key, 0)
            if counted:
                found[key] = found[f"{name}_count", ""] = counted
    return found


def to_torchserve(sink: Any) -> Callable[[Values, Values], None]:
    """Emits into the metrics that TorchServe hands to a handler; those that its configuration lacks are added."""
    kinds = type(next(iter(sink.cache)))

    def emit(counters: Values, gauges: Values) -> None:
        for kind, values in ((kinds("counter"), counters), (kinds("gauge"), gauges)):
            for (name, label), value in values.items():
                names, own = ["ModelName", "Level"], [sink.model_name, "Model"]
                if label:
                    names.append("le" if name.endswith("_bucket") else METRICS[name].label)
                    own.append(label.translate(_UNSAFE))
                known = sink.cache.get(kind, {}).get(name) or sink.add_metric_to_cache(name, "Count", names, kind)
                known.add_or_update(value, own)

    return emit


def resident() -> Values:
    """The memory of this process, under the number that the server gave to its worker."""
    name = sys.argv[sys.argv.index("--sock-name") + 1] if "--sock-name" in sys.argv else f".{os.getpid()}"
    return {("distillery_resident_bytes", name.rpartition(".")[2]): psutil.Process().memory_info().rss}

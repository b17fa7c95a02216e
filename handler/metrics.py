"""What is counted, under which names; handed on at most once a second, however many requests there are.

For the server each value is a line of log to parse, so a worker adds up and emits sums. Histograms are counters in
Prometheus' own form (`_bucket` with `le`, `_sum`, `_count`): those of TorchServe have no bucket below 5 ms.
"""

import logging
import os
import sys
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
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
HISTOGRAMS = {name: metric.buckets for name, metric in METRICS.items() if metric.buckets}


class Metrics:
    """Sums since the last emission, which another thread does; any may add.

    What histograms are made of is noted only, and sorted into buckets when it is emitted. `totals` says what stands
    somewhere as a count since the start, `gauges` what is true at the moment; `emit` takes what counters have grown
    by, and gauges.
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
        self.noted: dict[str, deque[float]] = {name: deque() for name in HISTOGRAMS}
        self.seconds = {name.split("_")[1]: self.noted[name] for name in HISTOGRAMS if name.endswith("_seconds")}
        self.told: deque[tuple[str, float]] = deque()
        self.lock, self.due, self.scheduled = threading.Lock(), 0.0, False

    def add(self, name: str, value: float = 1, label: str = "") -> None:
        """Add to a counter."""
        with self.lock:
            self.pending[name, label] += value

    def observe(self, name: str, *values: float) -> None:
        """Put values into a histogram."""
        self.noted[name].extend(values)

    def predicted(self, told: Iterable[tuple[str, float]]) -> None:
        """Count predictions, of which class and probability are `told`, and put the latter into a histogram."""
        self.told.extend(told)

    def batch(self, requests: int) -> None:
        """Count a batch that is over."""
        self.noted["distillery_batch_requests"].append(requests)
        if not self.scheduled:
            timer = threading.Timer(max(DELAY_S, self.due - time.monotonic()), self.flush)
            timer.daemon = True
            self.scheduled = True
            try:
                timer.start()
            except RuntimeError:  # no thread is left: the next batch tries again, or notes would pile up for ever
                self.scheduled = False
                raise

    def flush(self) -> None:
        """Emit what there is. A fault is logged, not raised: an uncounted answer is better than none."""
        self.scheduled, self.due = False, time.monotonic() + INTERVAL_S
        try:
            with self.lock:
                found, self.pending = dict(self.pending), defaultdict(float)
            told = _taken(self.told)
            found |= Counter(("distillery_predictions_total", label) for label, _ in told)
            self.observe("distillery_confidence", *(sure for _, sure in told))
            for name, bounds in HISTOGRAMS.items():
                if values := _taken(self.noted[name]):
                    found |= _histogram(name, bounds, values)
            if requests := found.get(("distillery_batch_requests_sum", "")):
                found["distillery_requests_total", ""] = requests
            totals = dict(self.totals())
            found |= {key: n - self.seen.get(key, 0) for key, n in totals.items() if n != self.seen.get(key)}
            self.seen = totals
            self.emit(found, self.gauges())
        except Exception:
            log.exception("metrics are lost")


def _taken(values: deque[Any]) -> list[Any]:
    """What is in there now; others may go on adding at the end."""
    return [values.popleft() for _ in range(len(values))]


def _histogram(name: str, bounds: Sequence[float], values: Sequence[float]) -> dict[Key, float]:
    """How many of the values are up to each bound, as Prometheus wants it, their count and their sum."""
    counts = np.bincount(np.searchsorted(bounds, values), minlength=len(bounds) + 1).cumsum().tolist()
    labels = (*map("{:g}".format, bounds), "+Inf")
    found = {(f"{name}_bucket", label): float(n) for label, n in zip(labels, counts, strict=True) if n}
    return found | {(f"{name}_count", ""): float(len(values)), (f"{name}_sum", ""): float(sum(values))}


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

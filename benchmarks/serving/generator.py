"""How true the load generators are: against a server that does nothing, and one that stands still as often as it says.

Of requests that arrive at random, a share of `STALL_MS / EVERY_MS` meets a stall, each at a random place of it: so the
latency that a share p of them stays below is STALL_MS - (1 - p) · EVERY_MS. wrk has one request a client in each stall,
which would hide it (coordinated omission), and adds those that its clients would have sent meanwhile.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.serving.bench import AT_ONCE, Bench, Point
from benchmarks.serving.contestants import CONTESTANTS, nothing

RATES = (1000.0, 4000.0, 8000.0)
STALL_MS, EVERY_MS = 200, 1000
CLOSED = ("requests_per_s", "p50_ms", "p99_ms", "client_cpu")
OPEN = ("requests_per_s", "late_ms_p99", "p50_ms", "p99_ms", "client_cpu")
LATENCIES = ("p50_ms", "p90_ms", "p99_ms")


def check(bench: Bench, clients: Sequence[int]) -> dict[str, Any]:
    """wrk by clients, the open loop by rates, both against nothing; and both against the stalls, with what is due."""
    empty = CONTESTANTS["nothing"]
    with bench.serving(empty) as port:
        closed = {n: bench.measure(port, empty, Point("raw", "unique", n), 0) for n in clients}
        opened = {rate: bench.measure(port, empty, Point("raw", "unique", rate=rate), 0) for rate in RATES}
    with bench.serving(replace(empty, start=partial(nothing, options=(STALL_MS, EVERY_MS)))) as port:
        standing = bench.measure(port, empty, Point("raw", "unique", rate=RATES[0]), 0)
        omitting = bench.measure(port, empty, Point("raw", "unique", AT_ONCE), 0)
    return {
        "closed": {str(n): _kept(found, CLOSED) for n, found in closed.items()},
        "open": {f"{rate:g}": _kept(found, OPEN) for rate, found in opened.items()},
        "stalls": {
            "stall_ms": STALL_MS,
            "every_ms": EVERY_MS,
            "due": {f"p{p}_ms": due(p / 100) for p in (50, 90, 99)},
            "open": _kept(standing, LATENCIES),
            "closed": _kept(omitting, LATENCIES),
        },
    }


def due(share: float) -> float:
    """Milliseconds that a share of the requests stays below, of a server that is otherwise immediate."""
    return round(max(0.0, STALL_MS - (1 - share) * EVERY_MS), 3)


def _kept(found: dict[str, Any], names: Sequence[str]) -> dict[str, float]:
    return {name: round(found[name], 3) for name in names}

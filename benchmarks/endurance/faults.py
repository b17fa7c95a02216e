"""Redis stopped, paused and full in the midst of a steady load: no client notices, and afterwards it is used again.

An open loop of good bodies, each answer judged; latency counts from when a request was due. For each fault, as long
each: Redis well, Redis at fault, Redis well again.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.endurance import mix
from benchmarks.endurance.mix import Mix
from benchmarks.endurance.site import WORKERS, Site, serving
from serving import driver
from serving.driver import Drive
from tests.handler.redis_server import RedisServer

DISTINCT = 20_000
CONNECTIONS = 128
WAIT_S = 10.0  # for the last answers
LOOK_S = 0.05
BACK_S = 10.0  # within which Redis must be used again
SLOWER = 3.0  # times the p99 before
PHASES = ("before", "during", "after")
Fault = tuple[Callable[[RedisServer], object], Callable[[RedisServer], object]]


def full(server: RedisServer) -> None:
    """Every further entry is refused."""
    server.admin.config_set("maxmemory-policy", "noeviction")
    server.admin.config_set("maxmemory", "1")


def roomy(server: RedisServer) -> None:
    """As much room as there is."""
    server.admin.config_set("maxmemory", "0")


FAULTS: dict[str, Fault] = {
    "stopped": (RedisServer.stop, RedisServer.start),
    "paused": (RedisServer.pause, RedisServer.resume),
    "full": (full, roomy),
}


def run(bundle: Path, *, rate: float, seconds: int) -> dict[str, Any]:
    """The figures of each fault, and which bounds are broken."""
    sent = mix.made(bundle, DISTINCT, bad_share=0)
    with serving(bundle) as site:
        roomy(site.redis)
        before = site.pids()
        _drive(site, sent, driver.arrivals(rate, seconds, seed=0), 0)  # warm
        faults = {name: _one(site, sent, name, rate, seconds, k) for k, name in enumerate(FAULTS, 1)}
        after = site.pids()
    worse = [f"{name}: {bound}" for name, found in faults.items() for bound in broken(found)]
    return {
        "workers": {"before": before, "after": after},
        "faults": faults,
        "broken": worse + ["a worker that is not the one of the beginning"] * (before != after),
    }


def broken(found: dict[str, Any]) -> list[str]:
    """Each bound of one fault that does not hold, in words."""
    p99 = [found[phase]["p99_ms"] for phase in PHASES]
    bounds = {
        "an answer that is not 200": any(found[phase]["not_200"] for phase in PHASES),
        "a wrong answer": any(found[phase]["wrong"] for phase in PHASES),
        f"p99 above {SLOWER:g} times that before": max(p99) > SLOWER * p99[0],
        f"not used again within {BACK_S:g} s": (found["used_again_after_s"] or np.inf) > BACK_S,
    }
    return [name for name, fails in bounds.items() if fails]


def used_again(server: RedisServer, clients: int) -> Callable[[], bool]:
    """Whether so many others are asking, over connections that have stayed, and entries have come since the first."""
    seen: set[str] = set()
    entries = server.admin.dbsize()

    def look() -> bool:
        nonlocal seen
        asking = [one for one in server.admin.client_list() if one["idle"] == "0" and one["cmd"] != "client|list"]
        before, seen = seen, {one["id"] for one in asking}
        return len(before & seen) >= clients and server.admin.dbsize() > entries

    return look


def _one(site: Site, sent: Mix, name: str, rate: float, seconds: int, number: int) -> dict[str, Any]:
    """One fault, from `seconds` to twice that after the beginning."""
    begin, end = FAULTS[name]
    took: list[float] = []

    def trouble() -> None:
        time.sleep(seconds)
        begin(site.redis)
        time.sleep(seconds)
        end(site.redis)
        since, again = time.monotonic(), used_again(site.redis, WORKERS)
        while not took and time.monotonic() < since + seconds:
            time.sleep(LOOK_S)
            if again():
                took.append(time.monotonic() - since)

    times = driver.arrivals(rate, len(PHASES) * seconds, seed=number)
    thread = threading.Thread(target=trouble)
    found, places = _drive(site, sent, times, number, thread.start)
    thread.join()
    phase = (times // seconds).astype(int)
    figures = {name: _figures(sent, found, places, phase == k) for k, name in enumerate(PHASES)}
    return {**figures, "used_again_after_s": took[0] if took else None}


def _drive(
    site: Site, sent: Mix, times: NDArray[np.float64], lap: int, ready: Callable[[], object] = lambda: None
) -> tuple[Drive, NDArray[np.int64]]:
    """Requests at their times from where the last lap ended, and their places in the mix."""
    places = sent.order[(lap * len(times) + np.arange(len(times))) % len(sent.order)]
    requests = [sent.requests[place] for place in places]
    ready()
    return driver.drive(site.port, requests, times, connections=CONNECTIONS, wait_s=WAIT_S), places


def _figures(sent: Mix, found: Drive, places: NDArray[np.int64], chosen: NDArray[np.bool_]) -> dict[str, Any]:
    """Of one phase."""
    own = np.flatnonzero(chosen & (found.status == 200)).tolist()
    p50, p99 = np.percentile(1e3 * found.latencies[chosen], (50, 99))
    wrong = sum(not sent.right(200, found.bodies[i], int(places[i])) for i in own)
    return {
        "requests": int(chosen.sum()), "not_200": int(chosen.sum()) - len(own), "wrong": wrong,
        "p50_ms": float(p50), "p99_ms": float(p99),
    }  # fmt: skip

"""A million requests, whatever they are: no 5xx, no lost one, no wrong answer, no worker anew, no memory that grows.

wrk drives the mix in legs of some seconds each, and one more client beside it has its answers judged. Each leg is new
connections. Every cache is full well before `settled` requests: half of the mix walks through 30,000 different bodies,
and a worker keeps 10,000 answers, the Redis some 10,000 (it evicts). What memory grows after that is not the cache's.
"""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.endurance import mix
from benchmarks.endurance.mix import Mix
from benchmarks.endurance.site import PATH, Site, resident, serving
from benchmarks.serving import closed
from serving import driver

SCRIPT = Path(__file__).parent / "mixed.lua"
DISTINCT = 30_000
SAMPLE_S = 1.0
SLACK = 8  # refusals: the last answers of a leg come in another order than their requests were sent
GROWTH = 0.02
Samples = list[dict[int, int]]


def run(bundle: Path, folder: Path, *, requests: int, settled: int, clients: int, leg_s: int) -> dict[str, Any]:
    """The figures of the soak, and which bounds are broken; `folder` is for what wrk reads."""
    sent = mix.made(bundle, min(DISTINCT, requests))
    files = sent.write(folder)
    with serving(bundle) as site:
        before, legs, done = site.pids(), [], 0
        while done < requests:
            legs.append(_leg(site, sent, files, done, clients, leg_s))
            done = legs[-1]["requests_in_all"]
        after, complaints = site.pids(), site.complaints()
    found = {"workers": {"before": before, "after": after}, **_totals(legs, settled), "log": complaints, "legs": legs}
    return found | {"broken": broken(found)}


def broken(found: dict[str, Any]) -> list[str]:
    """Each bound that does not hold, in words."""
    bounds = {
        "a status of 5xx": any(int(status) >= 500 for status in found["statuses"]),
        "a lost request": found["lost"],
        "other refusals than the bad bodies": found["refused_unlike_sent"],
        "a wrong answer": found["wrong"],
        "a worker that is not the one of the beginning": found["workers"]["before"] != found["workers"]["after"],
        "a traceback or error in the workers' log": found["log"],
        f"memory that grows by more than {GROWTH:.0%}": any(
            one["growth"] is None or one["growth"] > GROWTH for one in found["resident"].values()
        ),
    }
    return [name for name, fails in bounds.items() if fails]


def _leg(site: Site, sent: Mix, files: tuple[Path, Path], begin: int, clients: int, seconds: int) -> dict[str, Any]:
    places = np.random.default_rng(begin).choice(sent.order, len(closed.probe_times(seconds)))
    probes = [sent.requests[place] for place in places]
    url, pids = f"http://127.0.0.1:{site.port}{PATH}", site.pids()
    with _sampled(pids) as samples:
        figures, judged = closed.measure(url, site.port, clients, seconds, (*files, begin), probes, SCRIPT)
    lost, count = int((judged.status == driver.LOST).sum()), int(figures["requests"])
    return {
        **figures,
        "lost": int(figures["lost"]) + lost,
        "judged": len(places) - lost,
        "wrong": sent.wrong(judged, places.tolist()) - lost,
        "expected_refusals": sent.to_refuse(begin, count),
        "requests_in_all": begin + count,
        "resident_bytes": {str(pid): int(np.median([s[pid] for s in samples if pid in s])) for pid in samples[-1]},
    }


@contextmanager
def _sampled(pids: list[int]) -> Iterator[Samples]:
    """The memory of the workers, once a second and at the end."""
    samples: Samples = []
    over = threading.Event()

    def sample() -> None:
        while not over.wait(SAMPLE_S):
            samples.append(resident(pids))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()
        samples.append(resident(pids))


def _totals(legs: list[dict[str, Any]], settled: int) -> dict[str, Any]:
    """Sums over the legs; each worker's memory in the first leg that ends after `settled` requests, and the most."""
    statuses: Counter[str] = Counter()
    for leg in legs:
        statuses.update(leg["statuses"])
    return {
        "requests": legs[-1]["requests_in_all"],
        "seconds": sum(leg["seconds"] for leg in legs),
        "statuses": dict(sorted(statuses.items())),
        **{name: sum(leg[name] for leg in legs) for name in ("lost", "judged", "wrong", "refused")},
        "refused_unlike_sent": sum(abs(leg["refused"] - leg["expected_refusals"]) > SLACK for leg in legs),
        "resident": {pid: _growth(legs, settled, pid) for pid in legs[0]["resident_bytes"]},
    }


def _growth(legs: list[dict[str, Any]], settled: int, pid: str) -> dict[str, Any]:
    after = [leg["resident_bytes"] for leg in legs if leg["requests_in_all"] >= settled]
    marked = [found[pid] for found in after if pid in found]  # a worker may have ended
    if len(marked) < 2:
        return {"growth": None}
    return {"settled_bytes": marked[0], "most_bytes": max(marked), "growth": max(marked) / marked[0] - 1}

"""Generated bodies that nobody means well with: refused or answered, in time, and nobody else notices.

All of them twice: in this process, through TorchServe's own worker code and the archive's, in batches between good
ones; then over HTTP to a real server, many at once. Body k is that of seed + k (tests/handler/hostile.py).
"""

import os
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks.endurance.site import PATH, serving
from serving import archive as archives
from serving import driver
from tests.handler.hostile import Hostile, hostile
from tests.harness import Reply, Worker, post

LIMIT_S = 1.0  # for an answer
WAIT_S = 60.0  # for all of those that are held at a time
AT_ONCE = 5000
BATCH = 8
RAW = "application/octet-stream"


def run(bundle: Path, *, bodies: int, clients: int, seed: int) -> dict[str, Any]:
    """The figures of both ways, and which bounds are broken."""
    with serving(bundle) as site:
        archive = site.instance.folder / "store" / "student.mar"
        found = {"in_process": _in_process(archive, bodies, seed)}
        before = site.pids()
        found["http"] = _over_http(site.port, bodies, clients, seed)
        found["http"]["workers"] = {"before": before, "after": site.pids()}
        found["http"]["log"] = site.complaints()
    return found | {"broken": broken(found)}


def broken(found: dict[str, Any]) -> list[str]:
    """Each bound that does not hold, in words."""
    inside, http = found["in_process"], found["http"]
    statuses = {int(status) for way in (inside, http) for status in way["statuses"]}
    bounds = {
        "a status that is neither 200 nor 4xx": any(not (s == 200 or 400 <= s < 500) for s in statuses),
        "a good neighbour that got another answer": inside["neighbours_changed"],
        f"an answer after more than {LIMIT_S:g} s": max(inside["slowest_batch_s"], http["slowest_s"]) > LIMIT_S,
        "a worker that is not the one of the beginning": http["workers"]["before"] != http["workers"]["after"],
        "a traceback or error in the workers' log": http["log"],
    }
    return [name for name, fails in bounds.items() if fails]


def _in_process(archive: Path, count: int, seed: int) -> dict[str, Any]:
    statuses: Counter[int] = Counter()
    changed, slowest = 0, 0.0
    with _as_served(), archives.unpacked(archive) as root, Worker(root, batch_size=BATCH) as worker:
        good = post(archives.golden(root).images[0].tobytes(), RAW)
        worker.ask(good)
        [known] = worker.ask(good)
        for bodies in _chunks(count, seed, BATCH - 2):
            began = time.perf_counter()
            first, *replies, last = worker.ask(good, *(post(*body) for body in bodies), good)
            slowest = max(slowest, time.perf_counter() - began)
            statuses.update(reply.status for reply in replies)
            changed += sum(_told(reply) != _told(known) for reply in (first, last))
    return {"bodies": count, "statuses": _named(statuses), "neighbours_changed": changed, "slowest_batch_s": slowest}


@contextmanager
def _as_served() -> Iterator[None]:
    """What config.properties says of bodies; and silence of Pillow, which warns of what it then refuses."""
    with patch.dict(os.environ, TS_DECODE_INPUT_REQUEST="false"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _told(reply: Reply) -> tuple[int, bytes]:
    return reply.status, reply.body


def _over_http(port: int, count: int, clients: int, seed: int) -> dict[str, Any]:
    statuses: Counter[int] = Counter()
    slowest = 0.0
    for bodies in _chunks(count, seed, AT_ONCE):
        requests = [driver.request(PATH, kind, body) for body, kind in bodies]
        found = driver.drive(port, requests, np.zeros(len(requests)), connections=clients, wait_s=WAIT_S)
        statuses.update(found.status.tolist())
        slowest = max(slowest, float(np.nan_to_num(found.done - found.sent, nan=WAIT_S).max()))
    return {"bodies": count, "statuses": _named(statuses), "slowest_s": slowest}


def _chunks(count: int, seed: int, size: int) -> Iterator[list[Hostile]]:
    for begin in range(seed, seed + count, size):
        yield [hostile(number) for number in range(begin, min(begin + size, seed + count))]


def _named(statuses: Counter[int]) -> dict[str, int]:
    return {str(status): statuses[status] for status in sorted(statuses)}

"""One contestant: started, asked until it is ready, verified, warmed up, measured at each point, and ended."""

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving import closed, summary
from benchmarks.serving.contestants import Contestant
from benchmarks.serving.payloads import WIRES
from benchmarks.serving.processes import await_ready
from benchmarks.serving.stage import Stage
from benchmarks.serving.traffic import REPEATS, Traffic
from handler.errors import DistilleryError
from serving import driver
from serving.instance import free_port

VERIFIED = 512  # answers, judged before anything is measured
AT_ONCE = 32  # connections of those
OPEN = 256  # connections of the open loop: so many answers may be outstanding
WAIT_S = 5.0  # for the last answers of an open loop
SLACK_S = 60.0  # for the verified answers


@dataclass(frozen=True)
class Point:
    """What is measured: closed loop with so many `clients`, or open loop at a `rate` in requests a second."""

    form: str
    traffic: str
    clients: int = 0
    rate: float = 0.0

    def asked_of(self, contestant: Contestant) -> bool:
        """Whether the contestant takes such bodies."""
        return self.form in contestant.wires


@dataclass(frozen=True)
class Bench:
    """What all visits share; whole `seconds` a point, for wrk knows no others."""

    traffic: Traffic
    stage: Stage
    seconds: int
    warm_up: int
    _sent: Counter[tuple[str, str]] = field(default_factory=Counter)

    @contextmanager
    def ready(self, contestant: Contestant, points: Sequence[Point], number: int) -> Iterator[int]:
        """The contestant, verified and warm for the points that it can be asked; DistilleryError when it cannot be."""
        asked = [point for point in points if point.asked_of(contestant)]
        with self.serving(contestant) as port:
            for form in dict.fromkeys(point.form for point in asked):
                self._verify(port, contestant, form, number)
            for form, traffic in dict.fromkeys((point.form, point.traffic) for point in asked if self.warm_up):
                known = "hits" if traffic in REPEATS else traffic
                self._closed(port, contestant, Point(form, known, AT_ONCE), number, self.warm_up)
            yield port

    @contextmanager
    def serving(self, contestant: Contestant) -> Iterator[int]:
        """The contestant, ready, in a folder and on ports of its own; its first port."""
        with tempfile.TemporaryDirectory(prefix="bench", ignore_cleanup_errors=True) as folder:
            stage = replace(self.stage, port=free_port(), folder=Path(folder))
            with contestant.start(stage) as alive:
                [first] = self.traffic.requests(contestant.path, next(iter(contestant.wires.values())), [0])
                await_ready(stage.port, first, alive, stage.log)
                yield stage.port

    def measure(self, port: int, contestant: Contestant, point: Point, number: int) -> dict[str, Any]:
        """The record of one point: requests a second, latencies, refusals, and how many of how many were wrong."""
        measure = self._closed if point.clients else self._open
        return asdict(point) | measure(port, contestant, point, number, self.seconds)

    def _verify(self, port: int, contestant: Contestant, form: str, number: int) -> None:
        """Many at once, each answer judged; it warms the contestant up, too."""
        places = self.traffic.places("unique", number * VERIFIED, VERIFIED)
        requests = self.traffic.requests(contestant.path, contestant.wires[form], places)
        found = driver.drive(port, requests, np.zeros(VERIFIED), connections=AT_ONCE, wait_s=SLACK_S)
        verdict = self.traffic.judge(found, places, contestant.ceiling)
        if verdict["wrong"] or verdict["refused"] or verdict["lost"]:
            raise DistilleryError(f"of {VERIFIED} {form} images {verdict}")

    def _closed(self, port: int, contestant: Contestant, point: Point, number: int, seconds: int) -> dict[str, Any]:
        wire, begin = contestant.wires[point.form], self._sent[contestant.title, point.traffic]
        files = self.traffic.bodies_file(wire), self.traffic.order_file(point.traffic)
        random = np.random.default_rng([number, point.clients])
        places = random.integers(len(self.traffic.pool.images), size=len(closed.probe_times(seconds)))
        probes = self.traffic.requests(contestant.path, wire, places)
        url, arguments = f"http://127.0.0.1:{port}{contestant.path}", (WIRES[wire][0], *files, begin)
        figures, judged = closed.measure(url, port, point.clients, seconds, arguments, probes)
        self._sent[contestant.title, point.traffic] += int(figures["requests"])
        verdict = self.traffic.judge(judged, places, contestant.ceiling)
        return {**verdict, **figures, **{name: verdict[name] + figures[name] for name in ("refused", "lost")}}

    def _open(self, port: int, contestant: Contestant, point: Point, number: int, seconds: int) -> dict[str, Any]:
        times = driver.arrivals(point.rate, seconds, self.traffic.seed + number)
        places = self.traffic.places(point.traffic, self._sent[contestant.title, point.traffic], len(times))
        self._sent[contestant.title, point.traffic] += len(times)
        requests = self.traffic.requests(contestant.path, contestant.wires[point.form], places)
        found = driver.drive(port, requests, times, connections=OPEN, wait_s=WAIT_S)
        return summary.open_loop(found) | self.traffic.judge(found, places, contestant.ceiling)

"""What goes to a contestant, and what comes back is worth: requests by their places in the pool, answers judged."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.serving import payloads
from benchmarks.serving.payloads import WIRES, Pool
from serving import driver
from serving.driver import Drive

Places = NDArray[np.int64]
REPEATS = {"half": 0.5, "seventy": 0.7, "hits": 1.0}  # of so many requests the answer is known
TRACE = 50_000  # requests, after which the repeats begin again


@dataclass(frozen=True)
class Traffic:
    """The pool in every form; `folder` keeps what wrk reads. Zipf's repeats are of its first lap."""

    pool: Pool
    folder: Path
    exponent: float
    seed: int

    @cached_property
    def orders(self) -> Mapping[str, Places]:
        """Places in the pool, by the kind of traffic."""
        return {
            "unique": np.arange(len(self.pool.images)),
            "zipf": payloads.zipf(len(self.pool.images) // payloads.LAPS, TRACE, self.exponent, self.seed),
            **{name: payloads.repeats(len(self.pool.images), share, self.seed) for name, share in REPEATS.items()},
        }

    def places(self, kind: str, begin: int, count: int) -> Places:
        """The next `count` places from `begin` on."""
        order = self.orders[kind]
        return order[(begin + np.arange(count)) % len(order)]

    def requests(self, path: str, wire: str, places: Iterable[int]) -> list[bytes]:
        """The bytes of each request."""
        content_type, encode = WIRES[wire]
        return [driver.request(path, content_type, encode(self.pool.images[place])) for place in places]

    def bodies_file(self, wire: str) -> Path:
        """The whole pool for wrk, written once."""
        path = self.folder / f"{wire}.bodies"
        if not path.exists():
            payloads.write([WIRES[wire][1](image) for image in self.pool.images], path)
        return path

    def order_file(self, kind: str) -> Path:
        """The order for wrk, a place a line."""
        path = self.folder / f"{kind}.order"
        if not path.exists():
            path.write_text("".join(f"{place}\n" for place in self.orders[kind]))
        return path

    def judge(self, found: Drive, places: Places, ceiling: bool) -> dict[str, int]:
        """How many answers came, how many of them were refusals, how many were judged, and how many of those wrong."""
        answered = found.status != driver.LOST
        verdict = {"refused": int((answered & (found.status != 200)).sum()), "lost": int((~answered).sum())}
        right = self.pool.classes[places]
        judged = [] if ceiling else np.flatnonzero((found.status == 200) & (right != payloads.LEVEL)).tolist()
        wrong = sum(_class(found.bodies[i]) != right[i] for i in judged)
        return {**verdict, "judged": len(judged), "wrong": int(wrong)}


def _class(body: bytes) -> Any:
    """The class in an answer, which is of one form for all; None where there is none."""
    try:
        return json.loads(body)["class_id"][0]
    except (ValueError, LookupError, TypeError):
        return None

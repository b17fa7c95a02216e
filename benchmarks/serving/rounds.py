"""The rounds: in each one every contestant once, in an order that is drawn anew; by turns, or all up at once."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.serving import summary
from benchmarks.serving.bench import Bench, Point
from benchmarks.serving.contestants import CONTESTANTS
from handler.errors import DistilleryError

BEARABLE = 0.9  # of its own capacity: above it a queue grows for as long as one measures


@dataclass
class Outcome:
    """Every record, and who was left out for what reason."""

    records: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def leave_out(self, name: str, reason: str) -> None:
        """Note, and say at once, that a contestant cannot be measured."""
        self.left_out[name] = reason
        print(f"{name} is left out: {reason}", file=sys.stderr)

    def add(self, name: str, number: int, record: Mapping[str, Any]) -> None:
        """Keep the record of one point."""
        self.records.append({"contestant": name, "round": number, **record})


def by_turns(
    bench: Bench, names: Sequence[str], points: Sequence[Point], rounds: int, shares: Sequence[float]
) -> Outcome:
    """Each started anew in every round, and alone. From the second on, open loops as well, at `shares` of the first
    one's best capacity.
    """
    random, outcome = np.random.default_rng(bench.traffic.seed), Outcome()
    opened: dict[str, list[Point]] = {}
    for number in range(rounds):
        if number == 1:
            opened = open_points(summary.capacities(outcome.records), points, shares)
        for name in map(str, random.permutation(names)):
            if name in outcome.left_out:
                continue
            contestant, asked = CONTESTANTS[name], [*points, *opened.get(name, [])]
            try:
                with bench.ready(contestant, asked, number) as port:
                    found = [bench.measure(port, contestant, p, number) for p in asked if p.asked_of(contestant)]
            except (DistilleryError, OSError) as error:
                outcome.leave_out(name, f"round {number + 1}: {error}")
                continue
            for record in found:
                outcome.add(name, number, record)
            best = max((record["requests_per_s"] for record in found), default=0.0)
            print(f"round {number + 1}/{rounds}  {name:26} {best:9,.0f} requests/s at best", file=sys.stderr)
    return outcome


def together(bench: Bench, names: Sequence[str], points: Sequence[Point], rounds: int) -> Outcome:
    """All started once and kept; in every round each point of all, one right after the other.

    For a ratio near 1: a machine whose speed changes within a minute has not changed between two bursts.
    """
    random, outcome = np.random.default_rng(bench.traffic.seed), Outcome()
    with ExitStack() as stack:
        ports = {}
        for name in names:
            try:
                ports[name] = stack.enter_context(bench.ready(CONTESTANTS[name], points, 0))
            except (DistilleryError, OSError) as error:
                outcome.leave_out(name, str(error))
        for number in range(rounds):
            for point in points:
                for name in map(str, random.permutation(names)):
                    if name in outcome.left_out or not point.asked_of(CONTESTANTS[name]):
                        continue
                    try:
                        outcome.add(name, number, bench.measure(ports[name], CONTESTANTS[name], point, number))
                    except (DistilleryError, OSError) as error:
                        outcome.leave_out(name, f"round {number + 1}: {error}")
            print(f"round {number + 1}/{rounds}", file=sys.stderr)
    return outcome


def open_points(
    capacities: Mapping[str, float], points: Sequence[Point], shares: Sequence[float]
) -> dict[str, list[Point]]:
    """For each contestant the rates that it can bear, the same for all; a ceiling's capacity is nobody's."""
    best = max((speed for name, speed in capacities.items() if not CONTESTANTS[name].ceiling), default=0.0)
    rates = [float(f"{share * best:.2g}") for share in shares]
    kinds = dict.fromkeys((point.form, point.traffic) for point in points)
    return {
        name: [Point(*kind, rate=rate) for kind in kinds for rate in rates if 0 < rate <= BEARABLE * own]
        for name, own in capacities.items()
    }

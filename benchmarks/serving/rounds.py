"""The rounds: in each one every contestant once, in an order that is drawn anew."""

import sys
from collections.abc import Mapping, Sequence
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


def run(bench: Bench, names: Sequence[str], points: Sequence[Point], rounds: int, shares: Sequence[float]) -> Outcome:
    """All rounds. From the second on, open loops as well, at `shares` of the first one's best capacity."""
    random, outcome = np.random.default_rng(bench.traffic.seed), Outcome()
    opened: dict[str, list[Point]] = {}
    for number in range(rounds):
        if number == 1:
            opened = open_points(summary.capacities(outcome.records), points, shares)
        for name in map(str, random.permutation(names)):
            if name in outcome.left_out:
                continue
            try:
                found = bench.visit(CONTESTANTS[name], [*points, *opened.get(name, [])], number)
            except (DistilleryError, OSError) as error:
                outcome.left_out[name] = f"round {number + 1}: {error}"
                print(f"{name} is left out: {error}", file=sys.stderr)
                continue
            outcome.records += [{"contestant": name, "round": number, **record} for record in found]
            best = max((record["requests_per_s"] for record in found), default=0.0)
            print(f"round {number + 1}/{rounds}  {name:26} {best:9,.0f} requests/s at best", file=sys.stderr)
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

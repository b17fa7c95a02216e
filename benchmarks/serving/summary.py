"""From records to figures: percentiles, medians over the rounds, ratios within a round and their spread."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from serving.driver import Drive

OK = 200
PERCENTILES = (50, 90, 99)
POINT = ("form", "traffic", "clients", "rate")
FIGURES = ("requests_per_s", "p50_ms", "p90_ms", "p99_ms", "client_cpu")
COUNTS = ("requests", "refused", "lost", "judged", "wrong")
Record = Mapping[str, Any]


def open_loop(found: Drive) -> dict[str, Any]:
    """Answers a second, without refusals; latencies from the scheduled time; how late the requests left."""
    answered = int((found.status == OK).sum())
    late = np.where(np.isnan(found.sent), found.ended, found.sent) - found.times
    return {
        "requests": len(found.times),
        "requests_per_s": answered / max(found.ended, float(found.times[-1])),
        **{f"p{p}_ms": 1000 * float(np.percentile(found.latencies, p)) for p in PERCENTILES},
        "client_cpu": found.cpu_s / found.ended,
        "late_ms_p99": 1000 * float(np.percentile(late, 99)),
    }


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Median, least and greatest."""
    figures = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(figure, digits) for name, figure in figures.items()}


def points(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Each contestant at each point: its figures over the rounds, and the sums of its counts."""
    return [
        {**dict(zip(("contestant", *POINT), key, strict=True)), "rounds": len(found)}
        | {name: spread([record[name] for record in found]) for name in FIGURES}
        | {name: int(sum(record[name] for record in found)) for name in COUNTS}
        for key, found in _grouped(records, ("contestant", *POINT)).items()
    ]


def ratios(records: Sequence[Record], reference: str) -> list[dict[str, Any]]:
    """At each point of the closed loop, `reference`'s requests a second over each contestant's, in the same round."""
    speeds = {(r["contestant"], r["round"], *_point(r)): r["requests_per_s"] for r in records if r["clients"]}
    found: dict[tuple[Any, ...], list[float]] = {}
    for (name, number, *point), speed in speeds.items():
        own = speeds.get((reference, number, *point))
        if own is not None and speed > 0 and name != reference:
            found.setdefault((name, *point), []).append(own / speed)
    return [
        {**dict(zip(("contestant", *POINT), key, strict=True)), "reference": reference, "ratio": spread(values)}
        for key, values in found.items()
    ]


def capacities(records: Iterable[Record]) -> dict[str, float]:
    """The most requests a second of each contestant, over its numbers of clients: the median of the rounds' best."""
    best = {
        key: max(record["requests_per_s"] for record in found)
        for key, found in _grouped((r for r in records if r["clients"]), ("contestant", "round")).items()
    }
    names = dict.fromkeys(name for name, _ in best)
    return {name: statistics.median(speed for (other, _), speed in best.items() if other == name) for name in names}


def _point(record: Record) -> tuple[Any, ...]:
    return tuple(record[key] for key in POINT)


def _grouped(records: Iterable[Record], keys: Sequence[str]) -> dict[tuple[Any, ...], list[Record]]:
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record[key] for key in keys), []).append(record)
    return groups

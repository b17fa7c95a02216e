"""The search for the settings that serve an archive best: one dimension after the other, each in turns."""

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from handler.errors import DistilleryError
from serving.archive import ServeSettings
from serving.bench import Figures

log = logging.getLogger(__name__)
OBJECTIVES: Mapping[str, Callable[[Figures], float]] = {
    "throughput": lambda figures: figures.requests_per_s,
    "latency": lambda figures: -figures.p50_ms,
}
"""More is better."""


@dataclass(frozen=True)
class Candidate:
    """Settings to try; `threads` 0 means cores / workers."""

    batch_size: int
    workers: int
    threads: int
    engine: str

    def __str__(self) -> str:
        first = f"batchSize {self.batch_size}, workers {self.workers}"
        return f"{first}, threads {self.threads}, engine {self.engine}"

    @classmethod
    def of(cls, settings: ServeSettings) -> "Candidate":
        """What an archive asks for."""
        return cls(settings.batch_size, settings.min_workers, settings.handler.threads, settings.handler.engine)

    def changes(self, packed: ServeSettings) -> dict[str, Any]:
        """What has to change in an archive that was `packed` with other settings."""
        return {
            "batch_size": self.batch_size,
            "min_workers": self.workers,
            "max_workers": max(self.workers, packed.max_workers),
            "handler": {"threads": self.threads, "engine": self.engine},
        }


@dataclass
class Row:
    """What was tried along one dimension, and what came of it: a measurement a round, or the `problem`."""

    dimension: str
    candidate: Candidate
    rounds: list[Figures] = field(default_factory=list)
    problem: str | None = None

    def median(self, name: str) -> float:
        """Of one of the figures, over the rounds."""
        return float(statistics.median(getattr(figures, name) for figures in self.rounds))


Measure = Callable[[Candidate], Figures]
Values = Callable[[Candidate], Sequence[Any]]


def search(
    packed: Candidate, dimensions: Mapping[str, Values], measure: Measure, rounds: int, objective: str
) -> tuple[Candidate, list[Row]]:
    """The best candidate, and all that were tried: greedy, one dimension of the candidates after the other.

    Along each, its values and the best so far are measured in turns, once a round. Another takes the place of the best
    only where its median is better by more than either's rounds differ; so noise changes nothing. What the dimensions
    do only together is not found: that would take all combinations.
    """
    best, rows = packed, list[Row]()
    for name, values in dimensions.items():
        others = dict.fromkeys(replace(best, **{name: value}) for value in values(best))
        tried = list(dict.fromkeys([best, *others]))
        if len(tried) > 1:
            found = in_turns(name, tried, measure, rounds)
            rows += found
            best = _better(found, objective)
    return best, rows


def in_turns(dimension: str, candidates: Sequence[Candidate], measure: Measure, rounds: int) -> list[Row]:
    """Each candidate measured once a round; one that cannot be measured is not tried again."""
    rows = [Row(dimension, candidate) for candidate in candidates]
    for number in range(rounds):
        for row in rows:
            if row.problem is None:
                _measure(row, measure, f"round {number + 1} of {rounds}, {row.candidate}")
    if all(row.problem for row in rows):
        raise DistilleryError(str(rows[0].problem))
    return rows


def _measure(row: Row, measure: Measure, what: str) -> None:
    try:
        found = measure(row.candidate)
    except DistilleryError as error:
        row.problem = " ".join(str(error).split())
        log.info("%s: %s", what, row.problem)
    else:
        row.rounds.append(found)
        log.info("%s: %.0f requests/s, p50 %.2f ms", what, found.requests_per_s, found.p50_ms)


def _better(rows: Sequence[Row], objective: str) -> Candidate:
    """Of rows, the first of which is the best so far."""
    scores = {
        row.candidate: [OBJECTIVES[objective](figures) for figures in row.rounds] for row in rows if not row.problem
    }
    best, found = rows[0].candidate, max(scores, key=lambda candidate: statistics.median(scores[candidate]))
    if best not in scores:
        return found
    spread = max(max(scores[one]) - min(scores[one]) for one in (best, found))
    return found if statistics.median(scores[found]) - statistics.median(scores[best]) > spread else best

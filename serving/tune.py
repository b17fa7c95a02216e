"""`serving bench`: an archive measured as it is packed, or tuned to this machine and a stated load."""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from handler.bundle import FILES, atomic
from handler.errors import BundleError, DistilleryError
from handler.settings import HandlerSettings
from handler.settings import load as typed
from serving import archive as archives
from serving.archive import Archive
from serving.bench import Figures, Load, visit
from serving.profiles import with_settings
from serving.search import Candidate, Row, Values, in_turns, search

WIDTH = 120  # of the table, also where there is no terminal
TITLES = ("batchSize", "workers", "threads", "engine", "requests/s", "p50 ms", "p99 ms", "client CPU")


@dataclass(frozen=True)
class Report:
    """What was measured of the archive `digest`, under which load; `written` is the tuned archive's digest."""

    archive: str
    digest: str
    cores: int
    load: Load
    packed: Candidate
    rows: list[Row]
    objective: str | None = None
    best: Candidate | None = None
    written: str | None = None

    def text(self) -> str:
        """The table of what was tried, why some of it was not measured, and what was made of it."""
        problems = (f"{row.candidate}: {row.problem}" for row in self.rows if row.problem)
        lines = [_table(self.rows), *problems]
        if self.best == self.packed:
            lines.append("kept as it is packed: nothing tried is better by more than the rounds differ")
        elif self.best:
            done = f"written, digest {self.written[:12]}" if self.written else "not written"
            lines.append(f"best: {self.best}; {self.archive}: {done}")
        return "\n".join(lines)


def measure(path: Path, load: Load, config: Path, rounds: int) -> Report:
    """The archive as it is packed."""
    archive = archives.read(path)
    packed = Candidate.of(archive.settings)
    rows = in_turns("", [packed], lambda _: visit(archive, load, config), rounds)
    return Report(str(path), archive.digest, _cores(), load, packed, rows)


def tune(
    path: Path, load: Load, config: Path, *, wanted: Mapping[str, list[Any]], rounds: int, objective: str, write: bool
) -> Report:
    """Search the values `wanted` of each dimension; write the best into the archive and the report beside it.

    A dimension that is not in `wanted` gets the values that suit this machine and this archive.
    """
    for engine in wanted.get("engine", ()):
        typed(HandlerSettings, {"engine": engine})
    archive = archives.read(path)
    packed = Candidate.of(archive.settings)

    def tried(candidate: Candidate) -> Figures:
        with tempfile.TemporaryDirectory(prefix="bench") as folder:
            made = with_settings(path, candidate.changes(archive.settings), Path(folder) / path.name)
            return visit(made, load, config)

    best, rows = search(packed, _dimensions(archive, wanted), tried, rounds, objective)
    found = Report(str(path), archive.digest, _cores(), load, packed, rows, objective, best)
    return _written(found, archive) if write else found


def _dimensions(archive: Archive, wanted: Mapping[str, list[Any]]) -> dict[str, Values]:
    """Which values to try, in the light of the best so far: those wanted, or what suits machine and archive."""
    cores, engines = _cores(), wanted.get("engine") or _engines(archive)
    workers = sorted({*(2**i for i in range(cores.bit_length())), cores})

    def threads(best: Candidate) -> list[int]:
        now = best.threads or (1 if best.batch_size == 1 else max(1, cores // best.workers))
        return sorted({1, max(1, cores // best.workers)} - {now})

    return {
        "batch_size": lambda _: wanted.get("batch_size", [1, 8, 16, 32, 64]),
        "workers": lambda _: wanted.get("workers", workers),
        "threads": lambda best: wanted.get("threads") or threads(best),
        "engine": lambda _: engines,
    }


def _engines(archive: Archive) -> list[str]:
    """Those in the archive whose accuracy suffices, as for a worker that chooses among them."""
    with archives.unpacked(archive.path) as root:
        try:
            report = json.loads((root / FILES.report).read_text())
            found = report["engines"][report["served"]]
            least = found["eager"]["accuracy"] - archive.settings.handler.accuracy_loss
            return [name for name, figures in found.items() if figures["accuracy"] >= least]
        except (ValueError, LookupError, TypeError):
            raise BundleError(f"{archive.path}: no engines in its {FILES.report}: name some with --engines") from None


def _written(found: Report, archive: Archive) -> Report:
    """The report, which lies beside the archive after that got the best settings."""
    if found.best and found.best != found.packed:
        made = with_settings(archive.path, found.best.changes(archive.settings), archive.path)
        found = replace(found, written=made.digest)
    path = archive.path.with_suffix(".tune.json")
    try:
        with atomic(path) as temporary:
            temporary.write_text(json.dumps(asdict(found), indent=2) + "\n")
    except OSError as error:
        raise DistilleryError(f"{path}: cannot be written: {error.strerror or error}") from error
    return found


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _table(rows: Sequence[Row]) -> str:
    """Medians over the rounds; of the requests a second also the least and the greatest."""
    table = Table("tried", box=box.MARKDOWN)
    for title in TITLES:
        table.add_column(title, justify="left" if title == "engine" else "right")
    for row in rows:
        table.add_row(row.dimension or "as packed", *map(str, asdict(row.candidate).values()), *_cells(row))
    console = Console(width=WIDTH, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return captured.get().strip()


def _cells(row: Row) -> list[str]:
    if row.problem:
        return ["failed"]
    speeds = [figures.requests_per_s for figures in row.rounds]
    speed = f"{row.median('requests_per_s'):,.0f} ({min(speeds):,.0f}–{max(speeds):,.0f})"
    return [speed, *(f"{row.median(name):.2f}" for name in ("p50_ms", "p99_ms", "client_cpu"))]

"""The report's pictures, as PNG files: drawn without a display."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from handler.bundle import atomic

COLOURS = {"teacher": "#444444", "student": "#0b6fa4", "baseline": "#d1702a"}


@contextmanager
def _figure(path: Path, columns: int = 1) -> Iterator[list[Axes]]:
    """Axes to draw on; the file appears whole when the block ends."""
    figure = Figure(figsize=(5.5 * columns, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    yield [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def curves(folder: Path, roles: Sequence[str], path: Path) -> None:
    """Loss and validation accuracy by epoch, from the runs' histories."""
    with _figure(path, columns=2) as (left, right):
        for role in roles:
            history = folder / f"{role}.history.jsonl"
            if not history.exists():  # a teacher that came with its weights
                continue
            lines = [json.loads(line) for line in history.read_text().splitlines()]
            epochs = [line["epoch"] for line in lines]
            left.plot(epochs, [line["hard"] for line in lines], label=role, color=COLOURS[role])
            right.plot(epochs, [100 * line["validation_accuracy"] for line in lines], label=role, color=COLOURS[role])
        left.set(xlabel="epoch", ylabel="cross-entropy, nats", title="training (views as trained on)")
        right.set(xlabel="epoch", ylabel="accuracy, %", title="validation")
        for axes in (left, right):
            axes.grid(alpha=0.3)
            axes.legend()


def confusion(counts: Sequence[Sequence[int]], labels: Sequence[str], path: Path) -> None:
    """Images by label (row) and the student's prediction (column)."""
    with _figure(path) as (axes,):
        axes.imshow([[count**0.5 for count in row] for row in counts], cmap="Blues")
        largest = max(map(max, counts))
        for i, row in enumerate(counts):
            for j, count in enumerate(row):
                axes.text(j, i, str(count), ha="center", va="center", fontsize=6, color=_ink(count, largest))
        axes.set_xticks(range(len(labels)), labels, rotation=60, ha="right", fontsize=7)
        axes.set_yticks(range(len(labels)), labels, fontsize=7)
        axes.set(xlabel="predicted by the student", ylabel="label", title="confusion on the test images")


def reliability(bins: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """Accuracy against confidence in 15 bins; below the diagonal a network is too sure of itself."""
    with _figure(path) as (axes,):
        axes.plot([0, 1], [0, 1], color="#999999", linestyle=":", label="perfectly calibrated")
        for role, figures in bins.items():
            rows = zip(figures["share"], figures["confidence"], figures["accuracy"], strict=True)
            filled = [(sure, right, 20 + 400 * share) for share, sure, right in rows if share > 0]
            sure, right, size = zip(*filled, strict=True)
            axes.plot(sure, right, color=COLOURS[role], alpha=0.5)
            axes.scatter(sure, right, size, color=COLOURS[role], alpha=0.6, label=role)
        axes.set(xlabel="confidence", ylabel="accuracy", title="reliability (area = share of images)", xlim=(0, 1))
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left")


def trade_off(engines: Mapping[str, Mapping[str, Mapping[str, Any]]], path: Path) -> None:
    """Accuracy against latency and against bytes, of every network in every engine; dotted, what nothing beats."""
    points = [(role, name, f) for role, found in engines.items() for name, f in found.items() if "accuracy" in f]
    markers = dict(zip(dict.fromkeys(name for _, name, _ in points), "os^Dv*P", strict=False))
    colours = {role: COLOURS.get(role, f"C{place}") for place, role in enumerate(engines)}
    with _figure(path, columns=2) as (left, right):
        milliseconds = [figures["latency_ms"]["cpu"]["1"]["p50"] for _, _, figures in points]
        for axes, costs in ((left, milliseconds), (right, [figures["size_bytes"] for _, _, figures in points])):
            percents = [100 * figures["accuracy"] for _, _, figures in points]
            for (role, name, _), cost, percent in zip(points, costs, percents, strict=True):
                axes.scatter(cost, percent, marker=markers[name], color=colours[role], alpha=0.8)
            axes.step(*frontier(costs, percents), where="post", color="#999999", linestyle=":", zorder=0)
            axes.grid(alpha=0.3)
        left.set(xscale="log", xlabel="latency, ms, one image, one thread", ylabel="accuracy, %")
        right.set(xscale="log", xlabel="file, bytes")
        networks = [Line2D([], [], color=colour, marker="s", linestyle="") for colour in colours.values()]
        kinds = [Line2D([], [], color="#777777", marker=marker, linestyle="") for marker in markers.values()]
        left.legend(networks, list(colours), fontsize=8, loc="lower right")
        right.legend(kinds, list(markers), fontsize=8, loc="lower right")


def frontier(costs: Sequence[float], percents: Sequence[float]) -> tuple[list[float], list[float]]:
    """The points than which no other is both cheaper and more accurate, from the cheapest on (Pareto's)."""
    best: list[tuple[float, float]] = []
    for cost, percent in sorted(zip(costs, percents, strict=True), key=lambda point: (point[0], -point[1])):
        if not best or percent > best[-1][1]:
            best.append((cost, percent))
    return [cost for cost, _ in best], [percent for _, percent in best]


def differences(found: Mapping[str, Mapping[str, Any]], baseline: str, path: Path) -> None:
    """Mean differences of accuracy to the baseline, by name, and their 95 % intervals where there are any."""
    with _figure(path) as (axes,):
        axes.axvline(0, color=COLOURS["baseline"], linestyle=":", label=baseline)
        for place, difference in enumerate(found.values()):
            mean = difference["mean"]
            low, high = difference["interval_95"] or (mean, mean)
            axes.plot([100 * low, 100 * high], [place, place], color=COLOURS["student"], linewidth=2)
            axes.plot(100 * mean, place, "o", color=COLOURS["student"])
        axes.set_yticks(range(len(found)), list(found))
        axes.set_ylim(max(len(found), 1) - 0.5, -0.5)  # from top to bottom
        axes.set(xlabel="difference of accuracy, points (95 % interval)", title="on the same seeds")
        axes.grid(axis="x", alpha=0.3)
        axes.legend()


def _ink(count: int, largest: int) -> str:
    return "white" if count > largest / 3 else "black"

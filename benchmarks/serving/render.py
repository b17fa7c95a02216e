"""From the JSON to Markdown and charts.

example: python -m benchmarks.serving.render benchmarks/results/serving/same_runtime.json
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from handler.bundle import atomic

TABLES = {"same-runtime": "the same ONNX file for all", "as-documented": "PyTorch, as each peer's documentation has it"}
TRAFFIC = {
    "unique": "no image twice", "zipf": "repeats by Zipf's law", "half": "50 % known", "seventy": "70 % known",
    "hits": "all known",
}  # fmt: skip
OURS, CEILING = "#0b6fa4", "#999999"
PEERS = ("#d1702a", "#4c9a52", "#8d5aa5", "#b8a03a", "#c44e6a", "#5b6abf", "#7a6a5a", "#3aa6a0", "#444444", "#a0522d")
Point = Mapping[str, Any]


def markdown(result: Mapping[str, Any]) -> str:
    """Every table of one run."""
    settings, machine = result["settings"], result["machine"]
    lines = [
        f"# Serving side by side: {TABLES[settings['table']]}",
        "",
        f"`{result['command']}`",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, which client and server share; load of others before it "
        f"{machine['load_before']}. Student {result['student']['network']}, digest {result['student']['digest'][:12]}. "
        f"{settings['rounds']} rounds of {settings['seconds']} s a point, in an order drawn anew for each"
        f"{', all up at once' if settings.get('together') else ''}; median (least to greatest) over the rounds.",
    ]
    for form, kind in _kinds(result["points"]):
        lines += _section(result, form, kind)
    return "\n".join([*lines, *_answers(result), *_generator(result["generator"]), ""])


def write(result: Mapping[str, Any], out: Path) -> None:
    """The tables and charts of `out`, a JSON file, beside it."""
    with atomic(out.with_suffix(".md")) as path:
        path.write_text(markdown(result))
    for form, kind in _kinds(result["points"]):
        _chart(result, form, kind, out.with_name(f"{out.stem}.{form}.{kind}.png"))


def _section(result: Mapping[str, Any], form: str, kind: str) -> list[str]:
    closed, opened = _split(result["points"], form, kind)
    ratios = [row for row in result["ratios"] if (row["form"], row["traffic"]) == (form, kind)]
    title, name = f"{form} bodies, {TRAFFIC[kind]}", result["settings"]["reference"]
    reference = result["contestants"].get(name, name)
    parts = [
        (f"Requests a second, {title}, by clients", "clients", closed, _speed),
        (f"{reference} over each, in the same round", "clients", ratios, lambda p: _range(p["ratio"], 2)),
        ("Latency p50 / p99, ms, by clients", "clients", closed, _latency),
        ("The same in an open loop, from the scheduled send, by requests a second", "rate", opened, _latency),
    ]
    return [line for part in parts if part[2] for line in _table(result["contestants"], *part)]


def _table(titles: Mapping[str, str], title: str, across: str, points: Sequence[Point], cell: Any) -> list[str]:
    columns = sorted({point[across] for point in points})
    cells = {(point["contestant"], point[across]): cell(point) for point in points}
    rows = [name for name in titles if any((name, column) in cells for column in columns)]
    head = ["", f"## {title}" if title.startswith("Requests") else f"### {title}", ""]
    head += ["| | " + " | ".join(f"{column:g}" for column in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    body = [f"| {titles[name]} | " + " | ".join(cells.get((name, c), "–") for c in columns) + " |" for name in rows]
    return head + body


def _answers(result: Mapping[str, Any]) -> list[str]:
    """What became of all that was sent."""
    lines = ["", "## Answers", "", "A star above: some were refused or lost; they do not count as answered.", ""]
    lines += ["| | sent | refused | lost | judged | wrong |", "|---|---|---|---|---|---|"]
    for name, title in result["contestants"].items():
        found = [point for point in result["points"] if point["contestant"] == name]
        counts = [sum(p[key] for p in found) for key in ("requests", "refused", "lost", "judged", "wrong")]
        if found:
            lines.append(f"| {title} | " + " | ".join(f"{count:,}" for count in counts) + " |")
    lines += [f"\n{result['contestants'][name]} is left out: {reason}" for name, reason in result["left_out"].items()]
    return lines


def _generator(found: Mapping[str, Any]) -> list[str]:
    """The client measured on its own."""
    lines = ["", "## The load generators, against a server that does nothing", ""]
    lines += ["| | requests/s | p50, ms | p99, ms | sent late, p99, ms | cores |", "|---|---|---|---|---|---|"]
    for label, rows in (("wrk, {} clients", found["closed"]), ("open loop at {}/s", found["open"])):
        for key, row in rows.items():
            late = f"{row['late_ms_p99']:.2f}" if "late_ms_p99" in row else "–"
            figures = f"{row['requests_per_s']:,.0f} | {row['p50_ms']:.2f} | {row['p99_ms']:.2f} | {late}"
            lines.append(f"| {label.format(key)} | {figures} | {row['client_cpu']:.2f} |")
    stalls = found["stalls"]
    lines += ["", f"The same server, standing still for {stalls['stall_ms']} ms in every {stalls['every_ms']} ms:", ""]
    lines += ["| ms | p50 | p90 | p99 |", "|---|---|---|---|"]
    for label, key in (("due, by arithmetic", "due"), ("open loop", "open"), ("wrk, 32 clients", "closed")):
        lines.append(f"| {label} | " + " | ".join(f"{stalls[key][f'p{p}_ms']:.1f}" for p in (50, 90, 99)) + " |")
    return lines


def _chart(result: Mapping[str, Any], form: str, kind: str, path: Path) -> None:
    """Requests a second by clients; latency by rate, or by clients where no open loop was measured."""
    closed, opened = _split(result["points"], form, kind)
    figure = Figure(figsize=(14, 5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = (figure.add_subplot(1, 2, i + 1) for i in range(2))
    for axes, points, across, key in (
        (left, closed, "clients", "requests_per_s"),
        (right, opened or closed, "rate" if opened else "clients", "p99_ms"),
    ):
        _lines(axes, result["contestants"], points, across, key)
        axes.set(xscale="log", yscale="log")
        axes.set_xticks(sorted({point[across] for point in points}))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:,g}")
            axis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
    left.set(xlabel="clients", ylabel="requests a second", title=f"closed loop, {form}, {TRAFFIC[kind]}")
    scheduled = "open loop: p99 from the scheduled send" if opened else "closed loop: p99"
    right.set(xlabel="requests a second" if opened else "clients", ylabel="p99, ms", title=scheduled)
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def _lines(axes: Axes, titles: Mapping[str, str], points: Sequence[Point], across: str, key: str) -> None:
    """One line a contestant, with the spread over the rounds as bars."""
    families = list(dict.fromkeys(name.partition("-")[0] for name in titles if name.partition("-")[0] != "distillery"))
    for name, title in titles.items():
        family, ceiling = name.partition("-")[0], "empty" in name or name == "nothing"
        own = OURS if family == "distillery" else PEERS[families.index(family) % len(PEERS)]
        colour = CEILING if ceiling else own
        style = ":" if ceiling else "--" if name.endswith("-latency") else "-"
        found = sorted((p for p in points if p["contestant"] == name), key=lambda p: float(p[across]))
        if found:
            low, middle, high = ([p[key][name] for p in found] for name in ("min", "median", "max"))
            axes.plot([p[across] for p in found], middle, label=title, color=colour, linestyle=style, marker="o")
            axes.vlines([p[across] for p in found], low, high, color=colour, alpha=0.5)


def _kinds(points: Iterable[Point]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((point["form"], point["traffic"]) for point in points))


def _split(points: Iterable[Point], form: str, kind: str) -> tuple[list[Point], list[Point]]:
    """Those of the closed and of the open loop."""
    found = [point for point in points if (point["form"], point["traffic"]) == (form, kind)]
    return [point for point in found if point["clients"]], [point for point in found if not point["clients"]]


def _range(found: Mapping[str, float], digits: int) -> str:
    low, middle, high = (f"{found[name]:,.{digits}f}" for name in ("min", "median", "max"))
    return f"{middle} ({low}–{high})"


def _speed(point: Point) -> str:
    return _range(point["requests_per_s"], 0) + _mark(point)


def _latency(point: Point) -> str:
    return f"{point['p50_ms']['median']:.2f} / {point['p99_ms']['median']:.1f}{_mark(point)}"


def _mark(point: Point) -> str:
    """A star where somebody got no answer: what was refused is not counted as speed, yet it was quick."""
    return " *" if point["refused"] or point["lost"] else ""


if __name__ == "__main__":
    file = Path(sys.argv[1])
    write(json.loads(file.read_text()), file)

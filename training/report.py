"""report.json: teacher, student and baseline side by side, on the test images that nothing else has seen.

Its form is fixed by `report.schema.json` beside this file; units stand in the names.
"""

import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from handler.bundle import FILES
from handler.contract import Contract
from handler.engines import ENGINES, Forward, Setup, on_torch
from handler.networks import NETWORKS
from training import evaluate, measure
from training.artifact import save_json, versions
from training.config import Experiment
from training.data import Dataset, Split
from training.export import product
from training.progress import bar
from training.tables import markdown

VERSION = 2
PLOTS = CURVES, CONFUSION, RELIABILITY, TRADE_OFF = "curves.png", "confusion.png", "reliability.png", "trade_off.png"
BATCHES = (1, 32, 128)  # of those that are measured, the ones that tables show
Row = Callable[[dict[str, Any], dict[str, Any]], str]
"""A cell of a table, from a network's figures and its engines'."""
ROWS: tuple[tuple[str, Row], ...] = (
    ("accuracy, % (95 % interval)", lambda m, _: "{:.2f} ({:.2f}–{:.2f})".format(*_percents(m))),
    ("agreement with the teacher, %", lambda m, _: f"{100 * m['agreement']:.2f}"),
    ("calibration error (ECE), %", lambda m, _: f"{100 * m['ece']:.2f}"),
    ("negative log-likelihood", lambda m, _: f"{m['nll']:.4f}"),
    ("parameters", lambda m, _: f"{m['parameters']:,}"),
    ("state dict, bytes", lambda m, _: f"{m['size_bytes']:,}"),
    ("multiply-accumulates", lambda m, _: f"{m['macs']:,}"),
    ("latency, ms, 1 image, PyTorch", lambda _, e: _latency(e, "eager", 1)),
    ("latency, ms, 32 images, PyTorch", lambda _, e: _latency(e, "eager", 32)),
    ("latency, ms, 1 image, ONNX Runtime", lambda _, e: _latency(e, "onnx", 1)),
    ("latency, ms, 32 images, ONNX Runtime", lambda _, e: _latency(e, "onnx", 32)),
)
TITLES = {"baseline": "same student, labels only"}


def write(
    folder: Path,
    experiment: Experiment,
    dataset: Dataset,
    trained: dict[str, nn.Module],
    files: dict[str, list[Path]],
    contract: Contract,
    device: torch.device,
    command: str,
) -> None:
    """Evaluate the trained networks of a run, by role, and write its report and plots into `folder`.

    `files` hold the networks, by role; an ensemble has several. `command` is what makes all this again.
    """
    from training import plots  # here, for importing matplotlib would cost every training a second

    test, logits = dataset.test, {}
    with bar("evaluate", len(trained)) as advance:
        for role, network in trained.items():
            logits[role] = _logits(network, test.images, device)
            advance()
    models = {
        role: {
            "network": _network(experiment, role),
            **evaluate.quality(logits[role], test.labels, dataset.labels, logits["teacher"]),
            "parameters": sum(p.numel() for p in network.parameters()),
            "size_bytes": sum(path.stat().st_size for path in files[role]),
            "macs": evaluate.macs(network, dataset.shape),
        }
        for role, network in trained.items()
    }
    report = {
        **_circumstances(experiment, dataset, command),
        "models": models,
        "engines": _engines(folder, experiment, test, trained, files, logits, contract),
    }
    first = {role: model for role, model in models.items() if role in plots.COLOURS}
    plots.curves(folder, list(first), folder / CURVES)
    plots.confusion(models["student"]["confusion"], dataset.labels, folder / CONFUSION)
    plots.reliability({role: model["reliability"] for role, model in first.items()}, folder / RELIABILITY)
    plots.trade_off(report["engines"], folder / TRADE_OFF)
    save_json(report, folder / FILES.report)


def _network(experiment: Experiment, role: str) -> str:
    """The name of the role's network; `teacher1` and so on are those of an ensemble, each alone."""
    if not role.startswith("teacher"):
        return experiment.student.network
    teachers = list(experiment.teachers().values())
    return teachers[int(role.removeprefix("teacher") or 1) - 1].network


def _engines(
    folder: Path,
    experiment: Experiment,
    test: Split,
    trained: dict[str, nn.Module],
    files: dict[str, list[Path]],
    logits: dict[str, Tensor],
    contract: Contract,
) -> dict[str, dict[str, Any]]:
    """By role and engine: how well it answers, and what it costs; the eager networks stand beside the products."""
    teacher, student = logits["teacher"], logits["student"]
    found: dict[str, dict[str, Any]] = {}
    forwards: dict[tuple[str, str], Forward] = {}
    for role, network in trained.items():
        eager = measure.parity(logits[role], logits[role], student, teacher, test.labels)
        found[role] = {"eager": {**eager, **measure.sizes(*files[role])}}
        forwards[role, "eager"] = on_torch(network.eval(), "cpu")
    in_workers: dict[tuple[str, str], Path] = {}
    for role in experiment.compress.exported():
        if contract.network in NETWORKS:
            in_workers[role, "eager"] = files[role][0]
        for name in map(str, experiment.compress.formats):
            path = folder / product(role, name)
            found[role][name] = measure.sizes(path)
            if name in ENGINES:
                in_workers[role, name] = path
                forwards[role, name] = ENGINES[name].load(path, Setup(contract))
                answers = measure.answers(forwards[role, name], test.images)
                found[role][name] |= measure.parity(answers, logits[role], student, teacher, test.labels)
    for (role, name), resident in measure.resident_bytes(in_workers, contract).items():
        found[role][name]["rss_bytes"] = resident
    for (role, name), figures in measure.latencies(forwards, test.images).items():
        found[role][name]["latency_ms"] = {"cpu": figures}
    return found


def _circumstances(experiment: Experiment, dataset: Dataset, command: str) -> dict[str, Any]:
    """Under what the figures came to be: experiment, data, machine."""
    return {
        "version": VERSION,
        "command": command,
        "experiment": experiment.name,
        "seed": experiment.seed,
        "data": {
            "name": dataset.name,
            "digest": dataset.digest,
            "train_images": len(dataset.train),
            "validation_images": len(dataset.validation),
            "test_images": len(dataset.test),
        },
        "machine": {"processor": processor(), "cores": os.cpu_count(), "latency_threads": 1, "versions": versions()},
    }


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table that is also readable in a terminal."""
    models = report["models"]
    cells = [["", *(TITLES.get(role, role) for role in models)]]
    cells += [[name, *(cell(model, report["engines"][role]) for role, model in models.items())] for name, cell in ROWS]
    data = report["data"]
    note = (
        f"{data['test_images']:,} test images of {data['name']}, last epoch, seed {report['seed']}; "
        f"latency: median on one thread of {report['machine']['processor']}."
    )
    return f"{markdown(cells)}\n\n{note}"


def _percents(model: dict[str, Any]) -> list[float]:
    return [100 * share for share in (model["accuracy"], *model["accuracy_interval_95"])]


def products_table(report: dict[str, Any]) -> str:
    """Every product beside the others, as a Markdown table."""
    shares = ("accuracy, %", "as eager, %", "as student, %", "ECE, %")
    lines = [["", *shares, "bytes", "packed", "RSS, MB", *(f"ms, {n}" for n in BATCHES)]]
    for role, engines in report["engines"].items():
        for name, found in engines.items():
            share = [
                f"{100 * found[key]:.2f}" if key in found else "–"
                for key in ("accuracy", "agreement_with_eager", "agreement_with_student", "ece")
            ]
            size = [f"{found[key]:,}" for key in ("size_bytes", "packed_bytes")]
            memory = f"{found['rss_bytes'] / 1e6:.0f}" if "rss_bytes" in found else "–"
            lines.append([f"{role} {name}", *share, *size, memory, *(_latency(engines, name, n) for n in BATCHES)])
    return markdown(lines)


def _latency(engines: dict[str, Any], name: str, batch: int) -> str:
    found = engines.get(name, {}).get("latency_ms")
    return f"{found['cpu'][str(batch)]['p50']:.3f}" if found else "–"


def _logits(network: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    logits = evaluate.logits_of(network.to(device), images.to(device))
    network.cpu()
    return logits


def processor() -> str:
    """The processor's name; where the system has none to give, its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def read(folder: Path) -> dict[str, Any]:
    """The report of a run."""
    report: dict[str, Any] = json.loads((folder / FILES.report).read_text())
    return report

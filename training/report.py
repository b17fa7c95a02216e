"""report.json: teacher, student and baseline side by side, on the test images that nothing else has seen.

Its form is fixed by `report.schema.json` beside this file; units stand in the names.
"""

import functools
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handler.bundle import FILES
from training import evaluate, plots
from training.artifact import save_json, versions
from training.config import Experiment
from training.data import Dataset, Split
from training.export import onnx_logits, onnx_session
from training.progress import bar
from training.tables import markdown

VERSION = 1
PLOTS = CURVES, CONFUSION, RELIABILITY = "curves.png", "confusion.png", "reliability.png"
BATCHES = (1, 32)
ROWS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("accuracy, % (95 % interval)", lambda m: "{:.2f} ({:.2f}–{:.2f})".format(*_percents(m))),
    ("agreement with the teacher, %", lambda m: f"{100 * m['agreement']:.2f}"),
    ("calibration error (ECE), %", lambda m: f"{100 * m['ece']:.2f}"),
    ("negative log-likelihood", lambda m: f"{m['nll']:.4f}"),
    ("parameters", lambda m: f"{m['parameters']:,}"),
    ("state dict, bytes", lambda m: f"{m['size_bytes']:,}"),
    ("multiply-accumulates", lambda m: f"{m['macs']:,}"),
    ("latency, ms, 1 image, PyTorch", lambda m: _latency(m, "eager", 1)),
    ("latency, ms, 32 images, PyTorch", lambda m: _latency(m, "eager", 32)),
    ("latency, ms, 1 image, ONNX Runtime", lambda m: _latency(m, "onnx", 1)),
    ("latency, ms, 32 images, ONNX Runtime", lambda m: _latency(m, "onnx", 32)),
)


def write(
    folder: Path,
    experiment: Experiment,
    dataset: Dataset,
    trained: dict[str, nn.Module],
    sizes: dict[str, int],
    device: torch.device,
) -> None:
    """Evaluate the trained networks of a run, by role, and write its report and plots into `folder`.

    `sizes` are those of the networks' files, in bytes.
    """
    test, session = dataset.test, onnx_session(folder / FILES.onnx)
    logits = {}
    with bar("evaluate", len(trained) + 1) as advance:
        for role, network in trained.items():
            logits[role] = _logits(network, test.images, device)
            advance()
        exported = onnx_logits(session, test.images)
        advance()
    # Without a bar, which would take its share of the processor.
    latencies = _latencies(trained, session, test.images)
    models = {
        role: {
            "network": (experiment.teacher if role == "teacher" else experiment.student).network,
            **evaluate.quality(logits[role], test.labels, dataset.labels, logits["teacher"]),
            **_cost(network, sizes[role], dataset.shape),
            "latency": {key.split("/")[1]: value for key, value in latencies.items() if key.startswith(role + "/")},
        }
        for role, network in trained.items()
    }
    report = {
        **_circumstances(experiment, dataset),
        "models": models,
        "engines": _engines(exported, logits["student"], test, (folder / FILES.onnx).stat().st_size),
    }
    plots.curves(folder, list(trained), folder / CURVES)
    plots.confusion(models["student"]["confusion"], dataset.labels, folder / CONFUSION)
    plots.reliability({role: model["reliability"] for role, model in models.items()}, folder / RELIABILITY)
    save_json(report, folder / FILES.report)


def _engines(exported: Tensor, eager: Tensor, test: Split, size: int) -> dict[str, Any]:
    """How the exported student, of `size` bytes, answers beside the eager one."""
    return {
        "eager": {"accuracy": evaluate.accuracy(eager, test.labels)},
        "onnx": {
            "accuracy": evaluate.accuracy(exported, test.labels),
            "agreement_with_eager": evaluate.agreement(exported, eager),
            "probability_difference_max": _distance(exported, eager),
            "size_bytes": size,
        },
    }


def _circumstances(experiment: Experiment, dataset: Dataset) -> dict[str, Any]:
    """Under what the figures came to be: experiment, data, machine."""
    return {
        "version": VERSION,
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
    titles = {"teacher": "teacher", "student": "student", "baseline": "same student, labels only"}
    cells = [["", *(titles[role] for role in models)]]
    cells += [[name, *(cell(model) for model in models.values())] for name, cell in ROWS]
    data = report["data"]
    note = (
        f"{data['test_images']:,} test images of {data['name']}, last epoch, seed {report['seed']}; "
        f"latency: median on one thread of {report['machine']['processor']}."
    )
    return f"{markdown(cells)}\n\n{note}"


def _percents(model: dict[str, Any]) -> list[float]:
    return [100 * share for share in (model["accuracy"], *model["accuracy_interval_95"])]


def _latency(model: dict[str, Any], engine: str, batch: int) -> str:
    figures = model["latency"].get(engine)
    return f"{figures[f'batch_{batch}_ms_p50']:.3f}" if figures else "–"


def _logits(network: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    logits = evaluate.logits_of(network.to(device), images.to(device))
    network.cpu()
    return logits


def _cost(network: nn.Module, size: int, shape: tuple[int, int, int]) -> dict[str, int]:
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "size_bytes": size,
        "macs": evaluate.macs(network, shape),
    }


def _latencies(trained: dict[str, nn.Module], session: Any, images: Tensor) -> dict[str, dict[str, float]]:
    """Per `role/engine`: p50 and p99 at each batch size on one thread, all measured in turns."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found: dict[str, dict[str, float]] = {}
    try:
        for batch in BATCHES:
            part = images[:batch]
            runs: dict[str, Callable[[], object]] = {
                f"{role}/eager": functools.partial(evaluate.logits_of, network, part)
                for role, network in trained.items()
            }
            runs["student/onnx"] = functools.partial(onnx_logits, session, part)
            for name, figures in evaluate.latency_ms(runs).items():
                found.setdefault(name, {}).update({f"batch_{batch}_ms_{q}": ms for q, ms in figures.items()})
    finally:
        torch.set_num_threads(threads)
    return found


def _distance(logits: Tensor, other: Tensor) -> float:
    """The largest difference between two networks' probabilities."""
    return (F.softmax(logits, dim=1) - F.softmax(other, dim=1)).abs().max().item()


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

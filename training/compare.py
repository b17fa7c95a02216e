"""Experiments side by side: the same seeds, the same budget, and how sure the differences are.

    python -m training compare training/experiments/compare/baseline.yaml training/experiments/compare/*.yaml --seeds 5

Every experiment trains its student once per seed; the teacher is shared by all whose settings for it are the same.
The first experiment is the baseline: the others' differences to it are paired by seed. The test images are looked
at once, after all training; choose by the validation accuracy, which stands in the result too.
"""

import logging
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from torch import Tensor, nn

from handler.bundle import atomic, text_digest
from handler.errors import DistilleryError
from training import evaluate, plots
from training.artifact import save_json, versions
from training.contenders import Contender, contenders
from training.data import Dataset
from training.replicas import CORES, STUDENT, Replicas, cost, earlier_run, link, prepare, validation_accuracy
from training.report import processor
from training.statistics import paired, summary
from training.tables import markdown

log = logging.getLogger(__name__)
VERSION = 1
QUALITY = ("accuracy", "agreement", "ece", "nll")
FIGURES = (*QUALITY, "validation_accuracy")


def run(
    files: Sequence[Path], seeds: int, flags: Sequence[str], runs: Path, jobs: int, output: Path | None
) -> dict[str, Any]:
    """Train every experiment of `files` with the seeds 0 to `seeds` − 1, `jobs` at a time; returns the result.

    It is written to `output` (JSON; default: RUNS/compare-NAMES.json), with a table (.md) and a plot (.png) beside
    it. What an earlier start has trained is not trained again. Raises SettingsError when the experiments cannot be
    compared, DistilleryError at the end when a training failed.
    """
    found = contenders(files, seeds, flags, runs)
    failures = _train(found, runs, jobs)
    if failures:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
        raise DistilleryError(f"failed: {reasons}; the same command carries on with what is missing")
    command = shlex.join(
        ["python", "-m", "training", "compare", *map(str, dict.fromkeys(files)), "--seeds", str(seeds), *flags]
    )
    result = {**_circumstances(found, command, jobs), "experiments": _evaluate(found)}
    _write(result, output or runs / f"compare-{'-'.join(c.experiment.name for c in found)}.json")
    return result


def _train(found: Sequence[Contender], runs: Path, jobs: int) -> dict[str, str]:
    """Train all that is not done; returns why, by name, what failed did."""
    failures: dict[str, str] = {}
    with Replicas(jobs) as replicas:
        ready = list(_prepared(found, runs, failures))
        # Seed by seed, so that what can be compared is there early.
        waiting = [replica for group in zip(*(c.replicas for c in ready), strict=True) for replica in group]
        for count, (replica, error) in enumerate(replicas.finished(STUDENT, waiting), 1):
            if error:
                failures[replica.name] = error
            log.info("%s: %s (%d of %d)", replica.name, error or "trained", count, len(waiting))
    return failures


def _prepared(found: Sequence[Contender], runs: Path, failures: dict[str, str]) -> Iterator[Contender]:
    """Those whose teacher (and whatever else comes before the student) is there, in the folders of all seeds."""
    folders: dict[str, Path] = {}
    for contender in found:
        first, *others = contender.replicas
        stages = contender.pipeline(first).stages()
        like = folders.get(contender.teacher)
        if like is None and not first.folder.exists():
            like = earlier_run(runs / contender.experiment.name, contender.experiment.to_dict())
        error = prepare(first, stages, like)
        if error:
            failures[contender.experiment.name] = error
            log.info("%s: %s", contender.experiment.name, error)
            continue
        folders.setdefault(contender.teacher, first.folder)
        for other in others:
            link(stages, first.folder, other.folder)
        yield contender


def _circumstances(found: Sequence[Contender], command: str, jobs: int) -> dict[str, Any]:
    """Under what the figures came to be; all contenders have the same data and budget, which has been checked."""
    dataset = found[0].dataset
    return {
        "version": VERSION,
        "command": command,
        "machine": {"processor": processor(), "cores": CORES, "jobs": jobs, "versions": versions()},
        "data": {
            "name": dataset.name,
            "digest": dataset.digest,
            "train_images": len(dataset.train),
            "validation_images": len(dataset.validation),
            "test_images": len(dataset.test),
        },
        "equal_budget": True,
        "budget": found[0].budget,
        "baseline": found[0].experiment.name,
    }


def _evaluate(found: Sequence[Contender]) -> list[dict[str, Any]]:
    """All students and teachers on the test images; each teacher is asked once."""
    logits: dict[str, Tensor] = {}
    rows = []
    for contender in found:
        first = contender.replicas[0]
        if contender.teacher not in logits:
            teacher = contender.pipeline(first).load("teacher")
            logits[contender.teacher] = evaluate.logits_of(teacher, contender.dataset.test.images)
        rows.append(_row(contender, logits[contender.teacher]))
    return [{**row, "difference": _differences(row, rows[0]) if row is not rows[0] else None} for row in rows]


def _row(contender: Contender, teacher: Tensor) -> dict[str, Any]:
    tree = contender.experiment.to_dict()
    images = contender.budget["images_per_epoch"]
    seeds, parameters = [], 0
    for seed, replica in enumerate(contender.replicas):
        student = contender.pipeline(replica).load(STUDENT)
        parameters = sum(p.numel() for p in student.parameters())
        quality = _quality(student, contender.dataset, teacher)
        validation = {"validation_accuracy": validation_accuracy(replica.folder)}
        seeds.append({"seed": seed, **quality, **validation, **cost(replica.folder, images)})
    labels, names = contender.dataset.test.labels, contender.dataset.labels
    own = evaluate.quality(teacher, labels, names, teacher)
    return {
        "name": contender.experiment.name,
        "digest": text_digest(tree),
        "experiment": tree,
        "teacher": {key: own[key] for key in QUALITY},
        "parameters": parameters,
        "epochs": contender.budget["epochs"],
        "seeds": seeds,
        "summary": {key: summary([line[key] for line in seeds]) for key in FIGURES},
        "seconds": round(fmean(line["seconds"] for line in seeds), 1),
        "wall_seconds": round(fmean(line["wall_seconds"] for line in seeds), 1),
        "images_per_s": median(line["images_per_s"] for line in seeds),
    }


def _quality(student: nn.Module, dataset: Dataset, teacher: Tensor) -> dict[str, float]:
    logits = evaluate.logits_of(student, dataset.test.images)
    found = evaluate.quality(logits, dataset.test.labels, dataset.labels, teacher)
    return {key: found[key] for key in QUALITY}


def _differences(row: dict[str, Any], baseline: dict[str, Any]) -> dict[str, Any]:
    """Row less baseline, of each figure, seed by seed."""
    return {
        key: paired([line[key] for line in row["seeds"]], [line[key] for line in baseline["seeds"]]) for key in FIGURES
    }


def _write(result: dict[str, Any], path: Path) -> None:
    save_json(result, path)
    with atomic(path.with_suffix(".md")) as temporary:
        temporary.write_text(table(result) + "\n")
    differences = {row["name"]: row["difference"]["accuracy"] for row in result["experiments"] if row["difference"]}
    plots.differences(differences, result["baseline"], path.with_suffix(".png"))


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table that is also readable in a terminal."""
    head = [
        *("", "accuracy, %", f"difference to {result['baseline']}, points (95 % interval)", "agreement, %"),
        *("ECE, %", "NLL", "seconds", "images/s"),
    ]
    seeds, budget, data = len(result["experiments"][0]["seeds"]), result["budget"], result["data"]
    machine = result["machine"]
    teachers = sorted({f"{100 * row['teacher']['accuracy']:.2f} %" for row in result["experiments"]})
    note = (
        f"{seeds} seed{'s' if seeds > 1 else ''}, {budget['epochs']} epochs of {budget['images_per_epoch']:,} images; "
        f"{data['test_images']:,} test images of {data['name']}, last epoch; ± standard deviation over seeds; "
        f"interval: t, paired by seed; teacher: {', '.join(teachers)}; seconds and images/s of one training, "
        f"{machine['jobs']} at a time on {machine['cores']} cores of {machine['processor']}."
    )
    return "\n".join([markdown([head, *map(_cells, result["experiments"])]), "", note])


def _cells(row: dict[str, Any]) -> list[str]:
    accuracy, means = row["summary"]["accuracy"], {key: row["summary"][key]["mean"] for key in FIGURES}
    spread = "" if accuracy["sd"] is None else f" ± {100 * accuracy['sd']:.2f}"
    return [
        row["name"],
        f"{100 * accuracy['mean']:.2f}{spread}",
        _points(row["difference"]),
        f"{100 * means['agreement']:.2f}",
        f"{100 * means['ece']:.2f}",
        f"{means['nll']:.4f}",
        f"{row['seconds']:.0f}",
        f"{row['images_per_s']:,.0f}",
    ]


def _points(difference: dict[str, Any] | None) -> str:
    if difference is None:
        return "–"
    found = difference["accuracy"]
    mean, interval = f"{100 * found['mean']:+.2f}", found["interval_95"]
    return mean if interval is None else f"{mean} ({100 * interval[0]:+.2f} to {100 * interval[1]:+.2f})"

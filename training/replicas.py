"""Replicas: trainings of one experiment in folders of their own, as processes, several at a time.

What comes before the student is made once and linked into every folder, where the stages' digests find it done.
One thread each is the best use of few cores: a small student keeps no more busy.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from shutil import copyfile
from statistics import median
from types import TracebackType
from typing import Any

import yaml

from handler.bundle import atomic, text_digest
from handler.errors import SettingsError
from training.artifact import save_json
from training.pipeline import PREPARE
from training.stages import Stage

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
STUDENT = "student"


@dataclass(frozen=True)
class Replica:
    """One training: an experiment file, the flags over it, and the folder `runs/name` that it happens in."""

    file: Path
    flags: tuple[str, ...]
    runs: Path
    name: str

    @property
    def folder(self) -> Path:
        """Where its files lie."""
        return self.runs / self.name

    def command(self, stage: str) -> list[str]:
        """The command line of one of its stages; started again, it carries on."""
        module = [sys.executable, "-m", "training", stage, str(self.file)]
        return [*module, *self.flags, f"name={self.name}", "--runs", str(self.runs), "--resume"]


class Replicas:
    """A context in which replicas run, `jobs` at a time, the cores shared among them.

    When it is left, by an error, SIGINT or SIGTERM too, those still at work are told to save and end, and waited for.
    Raises SettingsError for less than one job.
    """

    def __init__(self, jobs: int) -> None:
        if jobs < 1:
            raise SettingsError(f"jobs: expected at least 1, got {jobs}")
        self.jobs = jobs
        threads = str(max(1, CORES // jobs))
        # Unbuffered, so that the last line of a log is the last that was written.
        self.environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}
        self.alive: set[subprocess.Popen[bytes]] = set()
        self.lock, self.closed = threading.Lock(), False

    def __enter__(self) -> "Replicas":
        self.previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
        self.executor = ThreadPoolExecutor(self.jobs)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.lock:
            self.closed = True
            for process in self.alive:
                process.terminate()
        self.executor.shutdown(cancel_futures=True)
        signal.signal(signal.SIGTERM, self.previous)

    def finished(self, stage: str, replicas: Iterable[Replica]) -> Iterator[tuple[Replica, str | None]]:
        """Run `stage` of each; yields each as it ends, with None or, in one line, why it failed.

        `replicas` is asked for the next one only when there is room for it.
        """
        source, running = iter(replicas), dict[Future[str | None], Replica]()
        while True:
            for replica in islice(source, self.jobs - len(running)):
                running[self.executor.submit(self._run, stage, replica)] = replica
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()

    def _run(self, stage: str, replica: Replica) -> str | None:
        path = replica.folder / f"{stage}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            with self.lock:
                if self.closed:
                    return "not started"
                # In a session of its own: ctrl-C must reach it once, through us; twice means "without saving".
                process = subprocess.Popen(
                    replica.command(stage),
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    env=self.environment,
                    start_new_session=True,
                )
                self.alive.add(process)
            status = process.wait()
            with self.lock:
                self.alive.remove(process)
        return _reason(status, path) if status else None


def _reason(status: int, log: Path) -> str:
    """Why a process failed: the signal that ended it, or the last line it wrote."""
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    lines = log.read_text(errors="replace").split("\n")
    return next((line.removeprefix("error: ") for line in reversed(lines) if line.strip()), f"exit status {status}")


def prepare(replica: Replica, stages: Iterable[Stage], like: Path | None) -> str | None:
    """Make all that comes before the student; returns None or, in one line, why that failed.

    What of `stages` is done in the folder `like` is linked first.
    """
    if like is not None:
        link(stages, like, replica.folder)
    with Replicas(1) as alone:
        return next(error for _, error in alone.finished(PREPARE, [replica]))


def link(stages: Iterable[Stage], source: Path, target: Path) -> None:
    """Give the folder `target` the outputs of those `stages` before the student that `source` has done.

    Hard links, copies where the file system has none; safe, because every file is replaced and never written into.
    """
    done, record = _record(source), _record(target)
    for stage in stages:
        if stage.name == STUDENT:
            break
        if stage.name in done and all((source / name).is_file() for name in stage.outputs):
            for name in stage.outputs:
                _link_file(source / name, target / name)
            record[stage.name] = done[stage.name]
    if record:
        save_json(record, target / "stages.json")


def _link_file(source: Path, target: Path) -> None:
    with atomic(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            copyfile(source, temporary)


def _record(folder: Path) -> dict[str, Any]:
    path = folder / "stages.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return record


def teacher_digest(tree: Mapping[str, Any]) -> str:
    """What decides the teacher, of an experiment's tree: where it is equal, so is the teacher."""
    data = {key: value for key, value in tree["data"].items() if key != "labelled"}
    return text_digest([data, *(tree[key] for key in ("views", "teacher", "ensemble", "seed"))])


def earlier_run(folder: Path, tree: Mapping[str, Any]) -> Path | None:
    """`folder`, if an experiment with the same teacher as the one of `tree` has been run in it."""
    try:
        found = yaml.safe_load((folder / "experiment.yaml").read_text())
        return folder if teacher_digest(found) == teacher_digest(tree) else None
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return None


def validation_accuracy(folder: Path) -> float:
    """The student's after its last epoch, 0..1."""
    accuracy: float = _lines(folder / f"{STUDENT}.history.jsonl")[-1]["validation_accuracy"]
    return accuracy


def cost(folder: Path, images: int) -> dict[str, float]:
    """What the student took, with `images` an epoch: seconds, wall_seconds, and images_per_s (the epochs' median).

    `seconds` are those of the training steps, `wall_seconds` those of the stage with all else since its last start.
    """
    rates = [line["images_per_s"] for line in _lines(folder / f"{STUDENT}.history.jsonl")]
    stages = [line["seconds"] for line in _lines(folder / "history.jsonl") if line["stage"] == STUDENT]
    return {
        "seconds": sum(images / rate for rate in rates),
        "wall_seconds": stages[-1],
        "images_per_s": median(rates),
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]

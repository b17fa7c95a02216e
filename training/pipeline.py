"""DistillationPipeline: the stages in order; one whose inputs and outputs are unchanged is not run again.

A stage is a function of files: its key is the digest of its settings, the data and its input files. What was
done is kept in `stages.json`, and each stage that ran adds a line to `history.jsonl`.
"""

import contextlib
import fcntl
import functools
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from handler.bundle import FILES, atomic, file_digest, text_digest
from handler.contract import Contract
from handler.errors import DistilleryError
from training import data, networks, report
from training.artifact import save_json, save_weights, write_bundle
from training.config import Experiment, TrainSettings
from training.export import to_onnx
from training.loop import Batch, Job, Objective, Trainer
from training.objectives import classification, distillation
from training.teacher import LiveTeacher
from training.views import Views

log = logging.getLogger(__name__)
PLOTS = ("curves.png", "confusion.png", "reliability.png")


@dataclass(frozen=True)
class Stage:
    """One step: the settings and files it is a function of, the files it writes, and how (given its key)."""

    name: str
    settings: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    run: Callable[[str], None]


def hard(logits: Tensor, batch: Batch) -> dict[str, Tensor]:
    """The objective of a teacher and of a baseline."""
    return classification(logits, batch.labels)


class DistillationPipeline:
    """From an experiment to its bundle, under `root/NAME`."""

    def __init__(self, experiment: Experiment, root: Path, resume: bool = False) -> None:
        self.experiment, self.resume = experiment, resume
        self.folder = root / experiment.name
        self.views = Views(**asdict(experiment.views))

    @functools.cached_property
    def dataset(self) -> data.Dataset:
        """The experiment's data, loaded once."""
        return data.load(self.experiment.data)

    @functools.cached_property
    def device(self) -> torch.device:
        """Where training happens."""
        wanted = self.experiment.device
        if wanted == "cuda" and not torch.cuda.is_available():
            raise DistilleryError("device=cuda: no CUDA device is available here; use device=cpu or auto")
        return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")

    def stages(self) -> list[Stage]:
        """All stages of this experiment, in order."""
        e = self.experiment
        common = {"seed": e.seed, "views": asdict(e.views)}
        student = {**common, "student": asdict(e.student)}
        soft = {**student, "objective": asdict(e.objective), "precision": e.teacher.precision}
        baseline = ("baseline.pt",) if e.baseline else ()
        trained = ("teacher.pt", FILES.weights, *baseline, FILES.onnx)
        bundled = tuple(f"bundle/{name}" for name in asdict(FILES).values())
        stages = [
            Stage("teacher", {**common, "teacher": asdict(e.teacher)}, (), ("teacher.pt",), self._run_teacher),
            Stage("student", soft, ("teacher.pt",), (FILES.weights,), self._run_student),
            Stage("baseline", student, (), baseline, self._run_baseline),
            Stage("export", e.student.network, (FILES.weights,), (FILES.onnx,), self._run_export),
            Stage("evaluate", e.to_dict(), trained, (FILES.report, *PLOTS), self._run_evaluate),
            Stage("bundle", e.to_dict(), (FILES.weights, FILES.onnx, FILES.report), bundled, self._run_bundle),
        ]
        return [stage for stage in stages if stage.outputs]

    def run(self, only: str | None = None) -> None:
        """Run every stage that is not done, or the one named (whose inputs must be there)."""
        stages = {stage.name: stage for stage in self.stages()}
        if only is not None and only not in stages:
            raise DistilleryError(f"{only}: not a stage of this experiment: it has {', '.join(stages)}")
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._alone():
            with atomic(self.folder / "experiment.yaml") as path:
                path.write_text(yaml.safe_dump(self.experiment.to_dict(), sort_keys=False, allow_unicode=True))
            for stage in stages.values() if only is None else [stages[only]]:
                self._run_stage(stage)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the run's lock: a killed script may have left its pipeline at work, and two would undo each other."""
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("%s: another process is at work on it; waiting until it ends", self.folder)
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _run_stage(self, stage: Stage) -> None:
        for name in stage.inputs:
            if not (self.folder / name).is_file():
                raise DistilleryError(f"{stage.name}: {self.folder / name} is missing; run the stages before it first")
        inputs = {name: file_digest(self.folder / name) for name in stage.inputs}
        key = text_digest([stage.name, stage.settings, self.dataset.digest, inputs])
        if self._is_done(stage, key):
            log.info("%-8s done before", stage.name)
            return
        start = time.perf_counter()
        stage.run(key)
        line = {"key": key, "outputs": {name: file_digest(self.folder / name) for name in stage.outputs}}
        save_json({**self._record(), stage.name: line}, self.folder / "stages.json")
        seconds = round(time.perf_counter() - start, 1)
        with (self.folder / "history.jsonl").open("a") as stream:
            stream.write(json.dumps({"stage": stage.name, "seconds": seconds, "time": time.time(), **line}) + "\n")
        (self.folder / f"{stage.name}.checkpoint.pt").unlink(missing_ok=True)
        log.info("%-8s done in %s s", stage.name, seconds)

    def _is_done(self, stage: Stage, key: str) -> bool:
        line = self._record().get(stage.name, {})
        paths = {name: self.folder / name for name in stage.outputs}
        present = {name: file_digest(path) for name, path in paths.items() if path.is_file()}
        return bool(line.get("key") == key and line.get("outputs") == present)

    def _record(self) -> dict[str, Any]:
        try:
            record: dict[str, Any] = json.loads((self.folder / "stages.json").read_text())
        except (OSError, ValueError):
            return {}
        return record

    def _run_teacher(self, key: str) -> None:
        self._train("teacher", key, self.experiment.teacher, hard)

    def _run_student(self, key: str) -> None:
        objective = self.experiment.objective
        teacher = LiveTeacher(
            self.load("teacher").to(self.device, memory_format=torch.channels_last),  # type: ignore[call-overload]
            getattr(torch, self.experiment.teacher.precision),
        )

        def distil(logits: Tensor, batch: Batch) -> dict[str, Tensor]:
            z_t = teacher(batch.images, batch.index, batch.view)
            return distillation(logits, z_t, batch.labels, objective.temperature, objective.alpha)

        self._train("student", key, self.experiment.student, distil)

    def _run_baseline(self, key: str) -> None:
        self._train("baseline", key, self.experiment.student, hard)

    def _train(self, role: str, key: str, settings: TrainSettings, objective: Objective) -> None:
        torch.manual_seed(self.experiment.seed)
        job = Job(
            role=role,
            key=key,
            settings=settings,
            seed=self.experiment.seed,
            objective=objective,
            views=self.views,
            folder=self.folder,
        )
        network = self._new(settings.network)
        Trainer(network, self.dataset, job, self.device).run(self.resume)
        save_weights(network, self.folder / f"{role}.pt")

    def _new(self, name: str) -> nn.Module:
        channels, *size = self.dataset.shape
        mean, std = self.dataset.statistics()
        return networks.build(
            name, channels=channels, size=(size[0], size[1]), classes=len(self.dataset.labels), mean=mean, std=std
        )

    def load(self, role: str) -> nn.Module:
        """The trained network of `role` (teacher, student, baseline), on the CPU."""
        experiment = self.experiment
        network = self._new((experiment.teacher if role == "teacher" else experiment.student).network)
        path = self.folder / f"{role}.pt"
        try:
            network.load_state_dict(torch.load(path, weights_only=True))
        except (OSError, RuntimeError) as error:
            raise DistilleryError(f"{path}: not the {role} of this experiment; run its stage first") from error
        return network.eval()

    @property
    def contract(self) -> Contract:
        """What the student will be served by."""
        channels, height, width = self.dataset.shape
        name = self.experiment.student.network
        return Contract(network=name, channels=channels, height=height, width=width, labels=self.dataset.labels)

    def _run_export(self, key: str) -> None:
        to_onnx(self.load("student"), self.contract, self.folder / FILES.onnx)

    def _run_evaluate(self, key: str) -> None:
        roles = ["teacher", "student", *(["baseline"] if self.experiment.baseline else [])]
        trained = {role: self.load(role) for role in roles}
        report.write(self.folder, self.experiment, self.dataset, trained, self.device)

    def _run_bundle(self, key: str) -> None:
        found = report.read(self.folder)
        figures = ("accuracy", "agreement", "ece", "nll", "parameters", "size_bytes")
        write_bundle(
            self.folder / "bundle",
            student=self.load("student"),
            onnx=self.folder / FILES.onnx,
            contract=self.contract,
            golden=self.dataset.test,
            report=found,
            evidence={
                "experiment": self.experiment.to_dict(),
                "data_digest": self.dataset.digest,
                "metrics": {name: found["models"]["student"][name] for name in figures},
            },
        )

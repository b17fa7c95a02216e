"""DistillationPipeline: an experiment as stages, from its teachers to the bundle of its student."""

import functools
import os
import shutil
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from handler.bundle import FILES, atomic, file_digest
from handler.contract import Contract
from handler.engines import ENGINES, INT8
from handler.errors import SettingsError
from training import compress, data, report
from training.artifact import save_json, save_weights, write_bundle
from training.batches import Batches
from training.config import Experiment, TrainSettings
from training.export import FORMATS, Source, product
from training.loop import Job, Trainer
from training.processes import Processes, arithmetic
from training.roles import SHARES, SYNTHETIC, Roles
from training.stages import Runner, Stage
from training.synthesize import synthesize

PREPARE, COMPRESS = "prepare", "compress"
BUNDLED = (FILES.weights, FILES.contract, FILES.report, FILES.golden, FILES.passport)


class DistillationPipeline:
    """From an experiment to its bundle, under `root/NAME`; `command` is the one that the report says made it."""

    def __init__(
        self,
        experiment: Experiment,
        root: Path,
        resume: bool = False,
        processes: Processes | None = None,
        device: torch.device | None = None,
        command: str = "",
    ) -> None:
        self.experiment, self.resume, self.command = experiment, resume, command
        self.folder = root / experiment.name
        self.processes = processes or Processes()
        self.device = device or torch.device("cpu")

    @functools.cached_property
    def dataset(self) -> data.Dataset:
        """The experiment's data, loaded once."""
        return data.load(self.experiment.data)

    @functools.cached_property
    def roles(self) -> Roles:
        """The experiment's networks, by role."""
        return Roles(self.experiment, self.dataset, self.folder, self.device, self.processes)

    def load(self, role: str) -> nn.Module:
        """The trained network of `role` (teacher, student, baseline …), on the CPU."""
        return self.roles.load(role)

    def stages(self) -> list[Stage]:
        """All stages of this experiment, in order."""
        e = self.experiment
        teachers = [self._training_stage(role) for role in e.teachers()]
        assistants = [self._training_stage(role) for role in e.roles() if role.startswith("assistant")]
        files = self._teacher_files()
        made_by = [asdict(e.synthesis), asdict(e.views), e.teacher.precision, e.seed]
        products = [*e.compress.products()]
        trained = tuple(f"{role}.pt" for role in ("student", *(["baseline"] if e.baseline else []), *products))
        exported = tuple(product(role, name) for role in e.compress.exported() for name in e.compress.formats)
        bundled = tuple(f"bundle/{name}" for name in (*BUNDLED, *(ENGINES[name].file for name in self._engines())))
        measured = (FILES.report, *report.PLOTS)
        stages = [
            *teachers,
            Stage("ensemble", asdict(e.ensemble), files[:-1], (SHARES,), self._run_ensemble),
            *assistants,
            Stage("synthesize", made_by, files, (SYNTHETIC,), self._run_synthesize),
            self._training_stage("student"),
            self._training_stage("baseline"),
            *(self._training_stage(role) for role in products),
            Stage("export", [e.student.network, asdict(e.compress)], trained, exported, self._run_export),
            Stage("evaluate", e.to_dict(), (*files, *trained, *exported), measured, self._run_evaluate),
            Stage("bundle", e.to_dict(), (*trained, *exported, FILES.report), bundled, self._run_bundle),
        ]
        left_out = {
            "ensemble": not e.ensemble.members,
            "synthesize": not e.synthesis.images,
            "baseline": not e.baseline,
        }
        return [stage for stage in stages if not left_out.get(stage.name)]

    def run(self, only: str | None = None) -> None:
        """Run every stage that is not done; or the one named, whose inputs must be there; or several.

        `prepare` is all before the student, `compress` all that is made of it.
        """
        stages = {stage.name: stage for stage in self.stages()}
        if only not in (None, PREPARE, COMPRESS, *stages):
            raise SettingsError(f"{only}: not a stage of this experiment: it has {', '.join(stages)}")
        names = list(stages)
        products = [*self.experiment.compress.products(), "export", "evaluate", "bundle"]
        chosen = {None: names, PREPARE: names[: names.index("student")], COMPRESS: products}.get(only, [only])
        self._check_formats()
        self.folder.mkdir(parents=True, exist_ok=True)
        runner = Runner(self.folder, self.dataset.digest, self.processes)
        with runner.alone():
            if self.processes.first:
                with atomic(self.folder / "experiment.yaml") as path:
                    path.write_text(yaml.safe_dump(self.experiment.to_dict(), sort_keys=False, allow_unicode=True))
            for name in chosen:
                runner.run(stages[str(name)])
            if only == PREPARE:
                self.roles.teacher("student", self.roles.split("student"))  # which builds the bank, if there is one

    def _check_formats(self) -> None:
        """Refuse what could only fail when all has been trained."""
        formats = self.experiment.compress.formats
        if "executorch" in formats and not find_spec("executorch"):
            raise SettingsError("compress.formats: executorch is not installed; install it, or leave it out")
        if "compiled" in formats and not shutil.which(os.environ.get("CXX", "g++")):
            raise SettingsError("compress.formats: compiled needs a C++ compiler (g++, or CXX), and there is none here")
        wanted, there = self.experiment.compress.calibration, len(self.dataset.train)
        if INT8 in formats and wanted > there:
            raise SettingsError(f"compress.calibration: expected at most the {there:,} training images, got {wanted:,}")

    def _teacher_files(self) -> tuple[str, ...]:
        """The files that say what the teacher is."""
        files = tuple(self.roles.file(role) for role in self.experiment.teachers())
        return (*files, SHARES) if len(files) > 1 else files

    def _training_stage(self, role: str) -> Stage:
        """A stage that trains one network. Its key holds what the result depends on, and nothing else."""
        e, settings = self.experiment, self.roles.settings(role)
        taught = self.roles.teachers_of(role)
        decides: dict[str, Any] = {"settings": asdict(settings), "views": asdict(e.views), "given": _given(settings)}
        if taught:
            decides |= {"objective": e.to_dict()["objective"], "bank": e.bank}
            decides |= {"precision": self.roles.settings(taught[0]).precision}
        if role not in e.teachers():
            decides |= {"labelled": e.data.labelled}
        inputs = tuple(self.roles.file(name) for name in taught)
        if origin := self.roles.origin(role):
            decides |= {"compress": asdict(e.compress.products()[role])}
            inputs += (self.roles.file(origin),)
        inputs += (SHARES,) if len(taught) > 1 else ()
        inputs += (SYNTHETIC,) if self.roles.learns_from_made(role) else ()
        return Stage(
            role, decides, inputs, (self.roles.file(role),), functools.partial(self._run_training, role), shared=True
        )

    def _run_training(self, role: str, key: str) -> None:
        roles, settings = self.roles, self.roles.settings(role)
        path = self.folder / roles.file(role)
        network = roles.start(role)
        if path.suffix == ".pt2":
            with atomic(path) as temporary:
                shutil.copyfile(settings.network, temporary)
            return
        if not (settings.weights and role in self.experiment.teachers()):
            network = self._train(role, key, network)
        if roles.origin(role):
            compress.settle(network)
        if self.processes.first:
            save_weights(network, path)

    def _train(self, role: str, key: str, network: nn.Module) -> nn.Module:
        roles, settings, device = self.roles, self.roles.settings(role), self.device
        split = roles.split(role)
        classes, images = len(self.dataset.labels), roles.epoch_images(role)
        # Adapters are drawn after the network: the student starts the same with and without them.
        criterion, teacher = roles.criterion(role, network, split), roles.teacher(role, split)
        job = Job(
            role=role,
            key=key,
            settings=settings,
            batches=Batches(split.to(device), roles.views, settings, settings.seed or 0, classes, images),
            validation=self.dataset.validation.to(device),
            folder=self.folder,
            criterion=criterion,
            teacher=teacher,
            device=device,
            processes=self.processes,
        )
        return Trainer(network, job).run(self.resume)

    def _run_ensemble(self, key: str) -> None:
        names = list(self.experiment.teachers())
        save_json({"teachers": names, "shares": self.roles.find_shares()}, self.folder / SHARES)

    def _run_synthesize(self, key: str) -> None:
        roles, settings = self.roles, self.experiment.synthesis
        made = synthesize(
            self.load("teacher"),
            self.dataset.shape,
            len(self.dataset.labels),
            settings,
            self.experiment.seed,
            self.device,
            views=roles.views,
            precision=arithmetic(roles.settings("teacher").precision, self.device),
        )
        with atomic(self.folder / SYNTHETIC) as path, path.open("wb") as stream:
            torch.save({"images": made.images.cpu(), "labels": made.labels.cpu()}, stream)

    @property
    def contract(self) -> Contract:
        """What the student will be served by."""
        channels, height, width = self.dataset.shape
        name = self.experiment.student.network
        return Contract(network=name, channels=channels, height=height, width=width, labels=self.dataset.labels)

    def _run_export(self, key: str) -> None:
        images = self.dataset.train.images
        images = images[data.thinned(len(images), self.experiment.compress.calibration)]
        for role in self.experiment.compress.exported():
            source = Source(self.load(role), self.contract, images)
            for name in self.experiment.compress.formats:
                FORMATS[name].write(source, self.folder / product(role, name))

    def _engines(self) -> dict[str, Path]:
        """The exported files of the network that is served, by engine."""
        e = self.experiment.compress
        return {name: self.folder / product(e.serve, name) for name in e.formats if name in ENGINES}

    def _run_evaluate(self, key: str) -> None:
        e = self.experiment
        alone = [f"teacher{i}" for i in range(1, len(e.teachers()) + 1)] if e.ensemble.members else []
        names = ["teacher", *alone, "student", *(["baseline"] if e.baseline else []), *e.compress.exported()[1:]]
        trained = {role: self.load(role) for role in names}
        files = {role: [self.folder / self.roles.file(part) for part in self.roles.parts(role)] for role in names}
        report.write(self.folder, e, self.dataset, trained, files, self.contract, self.device, self.command)

    def _run_bundle(self, key: str) -> None:
        found, served = report.read(self.folder), self.experiment.compress.serve
        figures = ("accuracy", "agreement", "ece", "nll", "parameters", "size_bytes")
        write_bundle(
            self.folder / "bundle",
            student=self.load(served),
            engines=self._engines(),
            contract=self.contract,
            golden=self.dataset.test,
            report={**found, "served": served},
            evidence={
                "experiment": self.experiment.to_dict(),
                "data_digest": self.dataset.digest,
                "metrics": {name: found["models"][served][name] for name in figures},
            },
        )


def _given(settings: TrainSettings) -> dict[str, str]:
    """Digests of the user's own files that the settings name."""
    names = (settings.weights, settings.network.partition(":")[0])
    return {name: file_digest(Path(name)) for name in names if name and Path(name).is_file()}

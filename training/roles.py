"""The networks of an experiment by role, on disk and at work: who is trained on what, and who teaches whom."""

import functools
import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from handler.bundle import file_digest, text_digest
from handler.errors import DistilleryError, line
from handler.widths import fit
from training import bank, compress, data, networks
from training.adapters import adapters
from training.bank import Bank
from training.config import Experiment, ObjectiveSettings, TermSettings, TrainSettings
from training.criterion import Criterion
from training.data import Dataset, Split
from training.evaluate import logits_of, macs
from training.features import forward
from training.objectives import find
from training.processes import Processes, arithmetic
from training.teacher import LiveTeacher, Mixture, PerSample, Teacher, learned_shares
from training.views import Views

SYNTHETIC = "synthetic.pt"
SHARES = "ensemble.json"


class Roles:
    """What the roles of `experiment` are made of; files lie in `folder`, banks beside it."""

    def __init__(
        self, experiment: Experiment, dataset: Dataset, folder: Path, device: torch.device, processes: Processes
    ) -> None:
        self.experiment, self.dataset, self.folder = experiment, dataset, folder
        self.device, self.processes = device, processes
        self.views = Views(**asdict(experiment.views))

    def settings(self, role: str) -> TrainSettings:
        """The role's settings, with its seed; the baseline has the student's."""
        return self.experiment.roles()["student" if role == "baseline" else role]

    def file(self, role: str) -> str:
        """The name of the role's file: a state dict, or a given exported program."""
        return f"{role}.pt2" if self.settings(role).network.endswith(".pt2") else f"{role}.pt"

    def teachers_of(self, role: str) -> list[str]:
        """Who teaches the role: one, or an ensemble; nobody where there are no terms to learn by."""
        names = list(self.experiment.roles())
        teachers = list(self.experiment.teachers())
        if role in teachers or role == "baseline" or not self.terms(role):
            return []
        before = names[names.index("student" if self.origin(role) else role) - 1]
        return teachers if before in teachers else [before]

    def origin(self, role: str) -> str | None:
        """Of what a product of compression is made: the role before it in its chain."""
        products = self.experiment.compress.products()
        if role not in products:
            return None
        chain = ["student", *(name for name in products if name != "sparse")]
        return "student" if role == "sparse" else chain[chain.index(role) - 1]

    def terms(self, role: str) -> tuple[TermSettings, ...]:
        """The terms of the role's objective; an assistant has those that read logits alone."""
        terms = self.experiment.objective.terms
        return terms if role == "student" else tuple(t for t in terms if not find(t.objective).reads_features)

    def new(self, role: str, name: str | None = None) -> nn.Module:
        """A new network for the role (or the one called `name`), with the settings' or the data's normalisation."""
        settings = self.settings(role)
        mean, std = (settings.mean, settings.std) if settings.mean and settings.std else self._statistics
        channels, *size = self.dataset.shape
        return networks.build(
            name or settings.network,
            channels=channels,
            size=(size[0], size[1]),
            classes=len(self.dataset.labels),
            mean=settings.mean or mean,
            std=settings.std or std,
        )

    def start(self, role: str) -> nn.Module:
        """The role's network before its training: new from its seed, or with the weights that were given.

        A product of compression starts as its origin, with what was to be taken away taken.
        """
        settings, origin = self.settings(role), self.origin(role)
        torch.manual_seed(settings.seed or 0)
        if origin:
            return self._compressed(role, self._load_one(origin))
        network = self.new(role)
        if settings.weights:
            networks.load_weights(network, Path(settings.weights))
        return network

    def _compressed(self, role: str, network: nn.Module) -> nn.Module:
        """`network`, made smaller in the way of the role."""
        how = self.experiment.compress
        if role == "sparse":
            compress.sparsify(network, how.sparsify.zeros)
        elif role == "quantized":
            compress.put_on_grid(network, how.quantize.bits)
        else:
            rounds = how.prune.roles()
            share = how.prune.macs ** ((rounds.index(role) + 1) / len(rounds))
            whole = macs(self._load_one("student"), self.dataset.shape)
            compress.prune(network, self.dataset.shape, int(share * whole))
            try:
                fit(self.new(role), network.state_dict())
            except RuntimeError as error:
                raise DistilleryError(f"{role}: some layers of this network cannot be pruned: {line(error)}") from error
        return network

    def parts(self, role: str) -> list[str]:
        """What the role is made of: `teacher` of a whole ensemble, where there is one; `teacher1` of its first."""
        return list(self.experiment.teachers()) if role == "teacher" else ["teacher" if role == "teacher1" else role]

    def load(self, role: str) -> nn.Module:
        """The finished network of the role, all its parts, on the CPU."""
        networks = [self._load_one(part) for part in self.parts(role)]
        found = Mixture(networks, self.shares()) if len(networks) > 1 else networks[0]
        return found.eval()

    def _load_one(self, role: str) -> nn.Module:
        path = self.folder / self.file(role)
        if path.suffix == ".pt2":
            return self.new(role, str(path))
        network = self.new(role)
        try:
            fit(network, torch.load(path, weights_only=True))
        except Exception as error:  # torch raises whatever the unpickler met
            raise DistilleryError(f"{path}: not the {role} of this experiment; run its stage first") from error
        return network

    def shares(self) -> list[float]:
        """How the ensemble is mixed; equally where that differs from sample to sample."""
        try:
            shares: list[float] = json.loads((self.folder / SHARES).read_text())["shares"]
        except (OSError, ValueError, KeyError) as error:
            raise DistilleryError(f"{self.folder / SHARES}: not there; run the stage ensemble first") from error
        return shares

    def find_shares(self) -> list[float]:
        """The weights of the teachers in the ensemble, as the experiment wants them."""
        ensemble, names = self.experiment.ensemble, list(self.experiment.teachers())
        if ensemble.weights == "learned":
            images = self.dataset.validation.images
            logits = torch.stack([logits_of(self._load_one(name), images) for name in names])
            return learned_shares(logits, self.dataset.validation.labels)
        shares = ensemble.shares or (1.0,) * len(names)
        return [share / sum(shares) for share in shares]

    def split(self, role: str) -> Split:
        """The images that the role is trained on; −1 is the label of one that it may not know."""
        train, labelled = self.dataset.train, self.experiment.data.labelled
        if self.learns_from_made(role):
            return Split(**torch.load(self.folder / SYNTHETIC, weights_only=True))
        if labelled is None or role in self.experiment.teachers():
            return train
        known = data.partially_labelled(train, labelled, len(self.dataset.labels))
        return known if self.teachers_of(role) else _labelled_part(known)

    def epoch_images(self, role: str) -> int:
        """How many images make an epoch of the role: as many as there are to train on, with a label or without.

        Who learns from labels alone sees those that have one the more often, so that budgets stay equal.
        """
        made = role == "baseline" or self.learns_from_made(role)
        return (made and self.experiment.synthesis.images) or len(self.dataset.train)

    def learns_from_made(self, role: str) -> bool:
        """Whether the role sees images that were made from the teacher, and no others."""
        return self.experiment.synthesis.images > 0 and (role == "student" or self.origin(role) is not None)

    def teacher(self, role: str, split: Split) -> Teacher | None:
        """Who teaches the role over the images of `split`, ready to be asked."""
        names = self.teachers_of(role)
        if len(names) > 1 and self.experiment.ensemble.weights == "per_sample":
            return PerSample([self._asked([name], role, split) for name in names], split.labels.to(self.device))
        return self._asked(names, role, split) if names else None

    def criterion(self, role: str, network: nn.Module, split: Split) -> Criterion:
        """The role's objective, its adapters fitted to what a probe batch looks like inside both networks."""
        names = self.teachers_of(role)
        if not names:
            return Criterion(ObjectiveSettings(alpha=0.0, terms=()))
        terms = self.terms(role)
        student_layers, teacher_layers = _layers(terms)
        objective = replace(self.experiment.objective, terms=terms)
        if not student_layers:
            return Criterion(objective)
        probe = split.images[:2]
        with torch.no_grad():
            student = forward(network.eval(), probe, student_layers).features
            teacher = forward(self._load_one(names[0]).eval(), probe, teacher_layers).features
        return Criterion(objective, adapters(terms, student, teacher))

    @functools.cached_property
    def _statistics(self) -> tuple[list[float], list[float]]:
        return self.dataset.statistics()

    def _live(self, names: list[str], layers: Iterable[str] = ()) -> LiveTeacher:
        network = self.load("teacher") if len(names) > 1 else self._load_one(names[0])
        network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return LiveTeacher(network, arithmetic(self.settings(names[0]).precision, self.device), layers)

    def _asked(self, names: list[str], role: str, split: Split) -> Teacher:
        """The network of `names` (several: their mixture), or its bank over the images of `split`."""
        live = self._live(names, _layers(self.terms(role))[1])
        if not self.experiment.bank:
            return live
        source = self._source(names, split)
        path = self.folder.parent / "banks" / f"{bank.digest(source)}.npy"
        if self.processes.first:
            bank.build(path, source, live, split.to(self.device).images, self.views, self.device)
        self.processes.wait()
        return Bank(path, source)

    def _source(self, names: list[str], split: Split) -> dict[str, Any]:
        """What a bank is made from."""
        files = [file_digest(self.folder / self.file(name)) for name in names]
        synthetic = split.images is not self.dataset.train.images and self.experiment.synthesis.images
        return {
            "data": file_digest(self.folder / SYNTHETIC) if synthetic else self.dataset.digest,
            "teacher": text_digest([files, self.shares() if len(names) > 1 else None]),
            "precision": self.settings(names[0]).precision,
            "views": asdict(self.experiment.views),
        }


def _layers(terms: tuple[TermSettings, ...]) -> tuple[set[str], set[str]]:
    """The paths of all layers that the terms compare: the student's, the teacher's."""
    pairs = [pair for term in terms for pair in term.layers.items()]
    return {path for path, _ in pairs}, {path for _, path in pairs}


def _labelled_part(split: Split) -> Split:
    return split.take((split.labels >= 0).nonzero().squeeze(1))

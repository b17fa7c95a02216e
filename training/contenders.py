"""The contenders of a comparison: experiments that differ in what they try, not in data or budget."""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from handler.errors import SettingsError
from training import data
from training.config import Experiment
from training.data import Dataset
from training.pipeline import DistillationPipeline
from training.reading import read_experiment
from training.replicas import STUDENT, Replica, teacher_digest


@dataclass(frozen=True)
class Contender:
    """An experiment of the comparison, its data and its replicas, one a seed."""

    experiment: Experiment
    dataset: Dataset
    replicas: tuple[Replica, ...]

    def pipeline(self, replica: Replica) -> DistillationPipeline:
        """The replica's own, over the data that is there already."""
        pipeline = DistillationPipeline(replace(self.experiment, name=replica.name), replica.runs)
        pipeline.dataset = self.dataset
        return pipeline

    @functools.cached_property
    def budget(self) -> dict[str, int]:
        """What its student may spend."""
        student = self.experiment.student
        steps = self.pipeline(self.replicas[0]).roles.epoch_images(STUDENT) // student.batch_size
        return {
            "epochs": student.epochs,
            "batch_size": student.batch_size,
            "images_per_epoch": steps * student.batch_size,
        }

    @functools.cached_property
    def teacher(self) -> str:
        """The digest of all that decides its teacher."""
        return teacher_digest(self.experiment.to_dict())


def contenders(files: Sequence[Path], seeds: int, flags: Sequence[str], runs: Path) -> list[Contender]:
    """The experiments of `files` with the seeds 0 to `seeds` − 1; a file that is named twice counts once.

    So `baseline.yaml *.yaml` puts the baseline first. Raises SettingsError when they cannot be compared.
    """
    if not files:
        raise SettingsError("compare: expected experiment files, the baseline's first, got none")
    if seeds < 1:
        raise SettingsError(f"seeds: expected at least 1, got {seeds}")
    load = functools.cache(data.load)
    found = []
    for file in dict.fromkeys(files):
        experiment = read_experiment(file, flags, os.environ)
        replicas = [
            Replica(file, (*flags, f"student.seed={seed}"), runs, f"{experiment.name}-seed{seed}")
            for seed in range(seeds)
        ]
        found.append(Contender(experiment, load(replace(experiment.data, labelled=None)), tuple(replicas)))
    _check(found)
    return found


def _check(found: Sequence[Contender]) -> None:
    """Refuse what cannot be compared: names that come twice, other data, another budget."""
    first, *others = found
    names = [c.experiment.name for c in found]
    for name in names:
        if names.count(name) > 1:
            raise SettingsError(f"name: expected another one for each experiment, got {name} twice")
    for other in others:
        pair = f"{first.experiment.name} and {other.experiment.name}"
        if other.dataset.digest != first.dataset.digest:
            raise SettingsError(f"{pair}: expected the same data, got {first.dataset.name} and {other.dataset.name}")
        for key, value in first.budget.items():
            if other.budget[key] != value:
                raise SettingsError(f"{pair}: expected equal budgets, got {key} {value} and {other.budget[key]}")

"""The gate: with 6,000 labels, distillation is worth a point at least. Three seeds each, a minute or two on two cores.

The teacher is that of the full experiment; what it says of these images lies in tests/training/reference.
"""

import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from training import data
from training.bank import Bank
from training.batches import Batches
from training.config import Experiment, ObjectiveSettings
from training.criterion import Criterion
from training.evaluate import accuracy, logits_of
from training.loop import Job, Trainer
from training.networks import build
from training.processes import Processes
from training.reading import read_experiment
from training.views import Views

REFERENCE = Path(__file__).parent / "reference"
ALONE = ObjectiveSettings(alpha=0.0, terms=())


def read() -> tuple[Experiment, data.Dataset, Bank]:
    experiment = read_experiment(REFERENCE / "gate.yaml", [], {})
    dataset = data.load(experiment.data)
    source = json.loads((REFERENCE / "bank.json").read_text())["source"]
    assert source["data"] == dataset.digest, "the bank is of other images than these"
    assert source["views"] == experiment.to_dict()["views"]
    return experiment, dataset, Bank(REFERENCE / "bank.npy", source)


def train(seed: int, distilled: bool) -> float:
    """Test accuracy in percent of the student of that seed, after its last epoch."""
    torch.set_num_threads(1)
    experiment, dataset, bank = read()
    settings, views = experiment.student, Views(**experiment.to_dict()["views"])
    mean, std = dataset.statistics()
    torch.manual_seed(seed)
    student = build(settings.network, channels=1, size=(28, 28), classes=10, mean=mean, std=std)
    with TemporaryDirectory() as folder:
        job = Job(
            role="student",
            key="gate",
            settings=settings,
            batches=Batches(dataset.train, views, settings, seed, 10),
            validation=dataset.validation.take(torch.arange(64)),  # nothing is chosen by it
            folder=Path(folder),
            criterion=Criterion(experiment.objective if distilled else ALONE),
            teacher=bank if distilled else None,
            device=torch.device("cpu"),
            processes=Processes(),
        )
        trained = Trainer(student, job).run(False)
    return 100 * accuracy(logits_of(trained, dataset.test.images), dataset.test.labels)


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_distillation_is_worth_a_point_with_six_thousand_labels() -> None:
    seeds = range(3)
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        kd = [pool.submit(train, seed, True) for seed in seeds]
        alone = [pool.submit(train, seed, False) for seed in seeds]
        gains = [a.result() - b.result() for a, b in zip(kd, alone, strict=True)]
    assert sum(gains) / len(gains) >= 1.0, gains

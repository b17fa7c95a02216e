"""A data set that a small network learns in a second: the class is the quadrant that is bright."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from training import data
from training.config import Experiment
from training.data import Dataset, Split
from training.pipeline import DistillationPipeline
from training.reading import read_experiment

LABELS = ("top left", "top right", "bottom left", "bottom right")


def quadrants(count: int, seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    images = torch.randint(0, 120, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = 4 * (label // 2), 4 * (label % 2)
        image[0, row : row + 4, column : column + 4] += 100
    return Split(images, labels)


@pytest.fixture(scope="session")
def dataset() -> Dataset:
    return Dataset(
        name="quadrants",
        labels=LABELS,
        train=quadrants(256, 0),
        validation=quadrants(64, 1),
        test=quadrants(100, 2),
        digest="d" * 64,
    )


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: Dataset) -> Experiment:
    """An experiment over that data set with networks small enough for tests."""
    monkeypatch.setattr(data, "load", lambda settings: dataset)
    settings = {"batch_size": 32, "epochs": 3, "network": "seed_student", "learning_rate": 0.05}
    file = tmp_path / "toy.yaml"
    tree = {"teacher": settings, "student": settings, "views": {"shift": 0, "flip": False}, "device": "cpu"}
    file.write_text(yaml.safe_dump(tree))
    return read_experiment(file, [], {})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the one run that a file's tests copy is kept."""
    return tmp_path_factory.mktemp("finished")


def stages_run(pipeline: DistillationPipeline) -> list[str]:
    """The stages that were run, not skipped, in their order."""
    path = pipeline.folder / "history.jsonl"
    return [json.loads(line)["stage"] for line in path.read_text().splitlines()] if path.exists() else []

"""The training loop: it learns, it stops and resumes exactly, it leaves the teacher alone."""

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from handler.errors import DistilleryError
from training.config import TrainSettings
from training.data import Dataset
from training.evaluate import accuracy, logits_of
from training.loop import Batch, Interrupted, Job, Trainer
from training.networks import build
from training.objectives import classification, distillation
from training.teacher import LiveTeacher
from training.views import Views

CPU = torch.device("cpu")
SETTINGS = TrainSettings(network="seed_student", epochs=3, batch_size=32, learning_rate=0.05)


def hard(logits: Tensor, batch: Batch) -> dict[str, Tensor]:
    return classification(logits, batch.labels)


def new(dataset: Dataset, name: str = "seed_student") -> nn.Module:
    torch.manual_seed(0)
    mean, std = dataset.statistics()
    return build(name, channels=1, size=(8, 8), classes=4, mean=mean, std=std)


def job(folder: Path, **changes: Any) -> Job:
    plain = Job(
        role="student",
        key="k",
        settings=SETTINGS,
        seed=0,
        objective=hard,
        views=Views(shift=1, flip=False),
        folder=folder,
    )
    return dataclasses.replace(plain, **changes)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_it_learns(dataset: Dataset, tmp_path: Path) -> None:
    network = new(dataset)
    Trainer(network, dataset, job(tmp_path, settings=dataclasses.replace(SETTINGS, epochs=8)), CPU).run(False)
    assert accuracy(logits_of(network, dataset.test.images), dataset.test.labels) > 0.9


def test_the_same_seed_gives_the_same_bits_and_another_does_not(dataset: Dataset, tmp_path: Path) -> None:
    networks = [new(dataset) for _ in range(3)]
    for i, (network, seed) in enumerate(zip(networks, (0, 0, 1), strict=True)):
        torch.manual_seed(0)
        Trainer(network, dataset, job(tmp_path / str(i), seed=seed), CPU).run(False)
    assert same(networks[0], networks[1])
    assert not same(networks[0], networks[2])


@pytest.mark.parametrize("stop_at", [1, 8, 13])
def test_stopped_by_sigint_and_resumed_it_ends_bit_equal(dataset: Dataset, tmp_path: Path, stop_at: int) -> None:
    """The network has dropout, so the state of the random generator counts too."""
    torch.manual_seed(7)
    whole = new(dataset)
    Trainer(whole, dataset, job(tmp_path / "whole"), CPU).run(False)

    steps = 0

    def stopping(logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        nonlocal steps
        steps += 1
        if steps == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return hard(logits, batch)

    parts = job(tmp_path / "parts", objective=stopping)
    torch.manual_seed(7)
    with pytest.raises(Interrupted, match=r"student: stopped and saved at epoch \d, step \d"):
        Trainer(new(dataset), dataset, parts, CPU).run(False)
    resumed = new(dataset)
    torch.manual_seed(99)
    Trainer(resumed, dataset, parts, CPU).run(True)
    assert same(whole, resumed)
    histories = [(tmp_path / name / "student.history.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    assert len(histories[0]) == len(histories[1]) == 3


def test_signals_are_given_back(dataset: Dataset, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    Trainer(new(dataset), dataset, job(tmp_path), CPU).run(False)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_checkpoint_of_other_settings_is_not_used(dataset: Dataset, tmp_path: Path) -> None:
    fresh, other = new(dataset), new(dataset)
    for network in (fresh, other):
        torch.manual_seed(0)
        key, resume = ("first", False) if network is fresh else ("second", True)
        Trainer(network, dataset, job(tmp_path, key=key), CPU).run(resume)
    assert same(fresh, other)


def test_a_damaged_checkpoint_is_one_line(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "student.checkpoint.pt").write_bytes(b"half a file")
    with pytest.raises(DistilleryError, match="not a readable checkpoint"):
        Trainer(new(dataset), dataset, job(tmp_path), CPU).run(True)


def test_a_loss_that_is_not_finite_is_an_error(dataset: Dataset, tmp_path: Path) -> None:
    def broken(logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {"loss": logits.sum() * float("nan")}

    with pytest.raises(DistilleryError, match="not finite in epoch 1"):
        Trainer(new(dataset), dataset, job(tmp_path, objective=broken), CPU).run(False)


def test_a_batch_larger_than_the_data_is_an_error(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(DistilleryError, match="batch_size=1000"):
        Trainer(new(dataset), dataset, job(tmp_path, settings=dataclasses.replace(SETTINGS, batch_size=1000)), CPU)


def test_the_student_is_in_train_mode_at_every_step_of_every_epoch(dataset: Dataset, tmp_path: Path) -> None:
    network = new(dataset)
    modes = []

    def watching(logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        modes.append(network.training)
        return hard(logits, batch)

    Trainer(network, dataset, job(tmp_path, objective=watching), CPU).run(False)
    assert modes == [True] * 24


def test_the_teacher_is_frozen_and_sees_the_students_view(dataset: Dataset, tmp_path: Path) -> None:
    network = new(dataset, "residual")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    teacher = LiveTeacher(network, torch.float32)
    views = Views(shift=1, flip=False)

    def distil(logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        z_t = teacher(batch.images, batch.index, batch.view)
        assert not z_t.requires_grad
        assert torch.equal(batch.images, views.apply(dataset.train.images[batch.index], batch.view))
        assert torch.equal(batch.labels, dataset.train.labels[batch.index])
        return distillation(logits, z_t, batch.labels, 4.0, 0.9)

    Trainer(new(dataset), dataset, job(tmp_path, objective=distil), CPU).run(False)
    assert not network.training
    assert all(not p.requires_grad and p.grad is None for p in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_every_epoch_sees_every_image_once(dataset: Dataset, tmp_path: Path) -> None:
    seen: list[int] = []

    def watching(logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        seen.extend(batch.index.tolist())
        return hard(logits, batch)

    Trainer(new(dataset), dataset, job(tmp_path, objective=watching), CPU).run(False)
    epochs = [seen[i : i + 256] for i in range(0, 768, 256)]
    assert all(sorted(epoch) == list(range(256)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_bfloat16_trains_too(dataset: Dataset, tmp_path: Path) -> None:
    network = new(dataset)
    settings = dataclasses.replace(SETTINGS, epochs=8, precision="bfloat16")
    Trainer(network, dataset, job(tmp_path, settings=settings), CPU).run(False)
    assert accuracy(logits_of(network, dataset.test.images), dataset.test.labels) > 0.9
    assert all(p.dtype == torch.float32 for p in network.parameters())


def test_history_reaches_tensorboard(dataset: Dataset, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Trainer(new(dataset), dataset, job(tmp_path), CPU).run(False)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "student"))
    events.Reload()
    assert [event.step for event in events.Scalars("validation_accuracy")] == [1, 2, 3]

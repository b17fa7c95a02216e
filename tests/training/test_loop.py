"""The training loop: it learns, it stops and resumes exactly, it leaves the teacher alone."""

import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from handler.errors import DistilleryError
from handler.networks import Normalize
from training.adapters import adapters
from training.batches import Batch, Batches
from training.config import ObjectiveSettings, TermSettings, TrainSettings
from training.criterion import Criterion
from training.data import Dataset
from training.evaluate import accuracy, logits_of
from training.features import Output, forward
from training.loop import Interrupted, Job, Trainer
from training.networks import build
from training.processes import Processes
from training.teacher import LiveTeacher
from training.views import Views

SETTINGS = TrainSettings(network="seed_student", epochs=3, batch_size=32, learning_rate=0.05)
VIEWS = Views(shift=1, flip=False)
ALONE = ObjectiveSettings(alpha=0.0, terms=())


class Watching(Criterion):
    """A criterion that calls `watch` at every step, with the terms that it returns."""

    def __init__(self, watch: Callable[[Batch, dict[str, Tensor]], None]) -> None:
        super().__init__(ALONE)
        self.watch = watch

    def forward(self, student: Output, teacher: Output | None, batch: Batch, progress: float) -> dict[str, Tensor]:
        terms = super().forward(student, teacher, batch, progress)
        self.watch(batch, terms)
        return terms


def new(dataset: Dataset, name: str = "seed_student") -> nn.Module:
    torch.manual_seed(0)
    mean, std = dataset.statistics()
    return build(name, channels=1, size=(8, 8), classes=4, mean=mean, std=std)


def job(dataset: Dataset, folder: Path, seed: int = 0, **changes: Any) -> Job:
    settings = changes.pop("settings", SETTINGS)
    plain = Job(
        role="student",
        key="k",
        settings=settings,
        batches=Batches(dataset.train, VIEWS, settings, seed, 4),
        validation=dataset.validation,
        folder=folder,
        criterion=Criterion(ALONE),
        teacher=None,
        device=torch.device("cpu"),
        processes=Processes(),
    )
    return dataclasses.replace(plain, **changes)


def train(dataset: Dataset, folder: Path, **changes: Any) -> nn.Module:
    return Trainer(new(dataset), job(dataset, folder, **changes)).run(False)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def quality(network: nn.Module, dataset: Dataset) -> float:
    return accuracy(logits_of(network, dataset.test.images), dataset.test.labels)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "bfloat16"},
        {"accumulate": 4},
        {"clip": 1.0},
        {"ema": 0.8},
        {"optimizer": "adamw", "learning_rate": 0.01},
        {"label_smoothing": 0.1, "warmup": 0.0},
        {"mixup": 0.2},
        {"cutmix": 0.2, "erasing": 0.1},
    ],
    ids=str,
)
def test_it_learns(dataset: Dataset, tmp_path: Path, changes: dict[str, Any]) -> None:
    network = train(dataset, tmp_path, settings=dataclasses.replace(SETTINGS, epochs=10, **changes))
    assert quality(network, dataset) > 0.9
    assert all(p.dtype == torch.float32 for p in network.parameters())


def test_the_same_seed_gives_the_same_bits_and_another_does_not(dataset: Dataset, tmp_path: Path) -> None:
    networks = [train(dataset, tmp_path / str(i), seed=seed) for i, seed in enumerate((0, 0, 1))]
    assert same(networks[0], networks[1])
    assert not same(networks[0], networks[2])


EVERYTHING = dataclasses.replace(SETTINGS, ema=0.9, mixup=0.3, cutmix=0.3, erasing=0.3, accumulate=2, optimizer="adamw")


@pytest.mark.parametrize("stop_at", [1, 8, 13])
@pytest.mark.parametrize("settings", [SETTINGS, EVERYTHING], ids=["plain", "everything"])
def test_stopped_by_sigint_and_resumed_it_ends_bit_equal(
    dataset: Dataset, tmp_path: Path, stop_at: int, settings: TrainSettings
) -> None:
    """The network has dropout, so the state of the random generator counts too."""
    whole = train(dataset, tmp_path / "whole", settings=settings)
    steps = 0

    def stopping(batch: Batch, terms: dict[str, Tensor]) -> None:
        nonlocal steps
        steps += 1
        if steps == stop_at:
            os.kill(os.getpid(), signal.SIGINT)

    parts = job(dataset, tmp_path / "parts", settings=settings, criterion=Watching(stopping))
    with pytest.raises(Interrupted, match=r"student: stopped and saved at epoch \d, step \d"):
        Trainer(new(dataset), parts).run(False)
    fresh = new(dataset)
    torch.manual_seed(99)
    resumed = Trainer(fresh, parts).run(True)
    assert same(whole, resumed)
    histories = [(tmp_path / name / "student.history.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    assert len(histories[0]) == len(histories[1]) == 3


def test_signals_are_given_back(dataset: Dataset, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    train(dataset, tmp_path)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_checkpoint_of_other_settings_is_not_used(dataset: Dataset, tmp_path: Path) -> None:
    fresh = train(dataset, tmp_path, key="first")
    other = Trainer(new(dataset), job(dataset, tmp_path, key="second")).run(True)
    assert same(fresh, other)


def test_a_damaged_checkpoint_is_one_line(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "student.checkpoint.pt").write_bytes(b"half a file")
    with pytest.raises(DistilleryError, match="not a readable checkpoint"):
        Trainer(new(dataset), job(dataset, tmp_path)).run(True)


def test_a_loss_that_is_not_finite_is_an_error(dataset: Dataset, tmp_path: Path) -> None:
    def breaking(batch: Batch, terms: dict[str, Tensor]) -> None:
        terms["loss"] = terms["loss"] * float("nan")

    with pytest.raises(DistilleryError, match="not finite in epoch 1"):
        train(dataset, tmp_path, criterion=Watching(breaking))


def test_the_student_is_in_train_mode_at_every_step_of_every_epoch(dataset: Dataset, tmp_path: Path) -> None:
    network = new(dataset)
    modes = []
    watching = Watching(lambda batch, terms: modes.append(network.training))
    Trainer(network, job(dataset, tmp_path, criterion=watching)).run(False)
    assert modes == [True] * 24


@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.5}, {"cutmix": 0.5}, {"erasing": 0.5}], ids=str)
def test_the_teacher_is_frozen_and_sees_what_the_student_sees(
    dataset: Dataset, tmp_path: Path, mixing: dict[str, Any]
) -> None:
    network, student = new(dataset, "residual"), new(dataset)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    seen: dict[str, list[Tensor]] = {"teacher": [], "student": []}
    for name, module in (("teacher", network), ("student", student)):
        module.get_submodule("normalize").register_forward_pre_hook(
            lambda _, inputs, name=name: seen[name].append(inputs[0].clone())
        )
    criterion = Criterion(ObjectiveSettings())
    teacher = LiveTeacher(network, torch.float32)
    settings = dataclasses.replace(SETTINGS, **mixing)
    Trainer(student, job(dataset, tmp_path, criterion=criterion, teacher=teacher, settings=settings)).run(False)
    batches = seen["student"]
    trained = [images for images in batches if len(images) == 32]  # the others are of the validation
    assert len(trained) == len(seen["teacher"]) == 24
    assert all(torch.equal(a, b) for a, b in zip(trained, seen["teacher"], strict=True))
    assert torch.is_grad_enabled()
    assert not network.training
    assert all(not p.requires_grad and p.grad is None for p in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_adapters_learn_and_stay_out_of_the_student_and_hooks_are_gone(dataset: Dataset, tmp_path: Path) -> None:
    student, network = new(dataset), new(dataset, "seed_teacher")
    terms = (
        TermSettings(objective="hint", weight=1.0, layers={"stage1": "stage2"}),
        TermSettings(objective="hint", weight=0.1, layers={"hidden": "hidden"}, adapter="orthogonal"),
    )
    probe = dataset.train.images[:2]
    with torch.no_grad():
        inside = [
            forward(student.eval(), probe, ["stage1", "hidden"]),
            forward(network.eval(), probe, ["stage2", "hidden"]),
        ]
    fitted = adapters(terms, inside[0].features, inside[1].features)
    before = [p.clone() for p in fitted.parameters()]
    work = job(
        dataset,
        tmp_path,
        criterion=Criterion(ObjectiveSettings(terms=terms), fitted),
        teacher=LiveTeacher(network, torch.float32, ["stage2", "hidden"]),
    )
    trainer = Trainer(student, work)
    inside_optimizer = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert all(id(p) in inside_optimizer for p in [*fitted.parameters(), *student.parameters()])
    result = trainer.run(False)
    assert all(not torch.equal(a, b) for a, b in zip(before, fitted.parameters(), strict=True))
    assert list(result.state_dict()) == list(new(dataset).state_dict())
    assert not any(module._forward_hooks for root in (student, network) for module in root.modules())


def test_the_average_is_what_is_kept(dataset: Dataset, tmp_path: Path) -> None:
    """After one step, an average with decay d has moved by 1 − d of the step."""
    settings = dataclasses.replace(SETTINGS, epochs=1, ema=0.75, batch_size=256)
    network = new(dataset)
    trainer = Trainer(network, job(dataset, tmp_path, settings=settings))
    kept = trainer.run(False)
    start = new(dataset)
    # torch's average takes the first value as it is.
    assert kept is not network
    assert same(kept, network)
    assert not same(kept, start)


def test_parts_of_a_batch_add_up_to_it(dataset: Dataset, tmp_path: Path) -> None:
    """Without batch statistics and dropout, four passes of eight are one of 32."""
    networks = []
    for passes in (1, 4):
        torch.manual_seed(0)
        plain = nn.Sequential(Normalize([0.5], [0.5]), nn.Flatten(), nn.Linear(64, 4))
        settings = dataclasses.replace(SETTINGS, accumulate=passes)
        networks.append(Trainer(plain, job(dataset, tmp_path / str(passes), settings=settings)).run(False))
    for a, b in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_history_reaches_tensorboard(dataset: Dataset, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(dataset, tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "student"))
    events.Reload()
    assert [event.step for event in events.Scalars("validation_accuracy")] == [1, 2, 3]

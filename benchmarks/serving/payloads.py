"""What is sent: a pool of images that are all different, the right answer to each, and the order they go in.

The pool is the test images, several times over, with a number in the last four pixels of each (values below 16, in the
corner, where nothing is to be seen). Sent in turn, no image comes again before a cache of 10,000 answers has lost it.
"""

import base64
import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from handler.bundle import FILES
from handler.contract import Contract
from handler.engines import ENGINES, Setup
from training import data
from training.config import DataSettings
from training.measure import answers

Pixels = NDArray[np.uint8]
LAPS = 3  # of the test images in the pool
STAMP = 4  # pixels, a hexadecimal digit in each
SURE = 1e-3  # logits nearer than this to each other are level: PyTorch may see the other one in front
LEVEL = -1
HOT = 500  # images that come again and again, in front of all others


def png(image: Pixels) -> bytes:
    """An image `[H, W, C]` as PNG bytes."""
    stream = BytesIO()
    Image.fromarray(image.squeeze()).save(stream, "PNG")
    return stream.getvalue()


def features(image: Pixels) -> bytes:
    """The JSON of the project's first service."""
    return json.dumps({"features": image.reshape(-1).tolist()}).encode()


def encoded(body: bytes) -> bytes:
    """A body in JSON, for servers that take nothing else."""
    return json.dumps({"image": base64.b64encode(body).decode()}).encode()


WIRES: dict[str, tuple[str, Callable[[Pixels], bytes]]] = {
    "raw": ("application/octet-stream", lambda image: image.tobytes()),
    "png": ("image/png", png),
    "features": ("application/json", features),
    "raw-base64": ("application/json", lambda image: encoded(image.tobytes())),
    "png-base64": ("application/json", lambda image: encoded(png(image))),
}


@dataclass(frozen=True)
class Pool:
    """Images `[N, H, W, C]` and the class that the ONNX file gives each; LEVEL where two are."""

    images: Pixels
    classes: NDArray[np.int64]


def stamped(images: Pixels) -> Pixels:
    """`images` `[N, H, W, C]` LAPS times over, each copy with its number in the last pixels of its first channel."""
    return numbered(np.tile(images, (LAPS, 1, 1, 1)))


def numbered(images: Pixels) -> Pixels:
    """`images` `[N, H, W, C]`, in place, each with its number in the last pixels of its first channel."""
    numbers = np.arange(len(images))
    for place in range(STAMP):
        images[:, -1, -1 - place, 0] = numbers >> 4 * place & 15
    return images


def load(bundle: Path, limit: int = 0) -> Pool:
    """The pool of the first `limit` (0: all) test images of Fashion-MNIST, in the size that the student takes."""
    contract = Contract.read(bundle / FILES.contract)
    found = data.load(DataSettings(test_limit=limit)).test.images
    if found.shape[1:] != contract.shape:
        found = F.interpolate(found, contract.shape[1:]).expand(-1, contract.channels, -1, -1)
    images = stamped(np.ascontiguousarray(found.numpy().transpose(0, 2, 3, 1)))
    forward = ENGINES["onnx"].load(bundle / FILES.onnx, Setup(contract, threads=os.cpu_count() or 1))
    logits = answers(forward, torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))))
    first, second = logits.topk(2).values.T
    return Pool(images, torch.where(first - second > SURE, logits.argmax(1), LEVEL).numpy())


def zipf(images: int, length: int, exponent: float, seed: int) -> NDArray[np.int64]:
    """Places in the pool: of `images`, the k-th most wanted comes as 1 / k^exponent; which is the k-th is drawn."""
    random = np.random.default_rng(seed)
    shares = 1 / np.arange(1, images + 1) ** exponent
    ranks = random.choice(images, size=length, p=shares / shares.sum())
    return random.permutation(images)[ranks]


def repeats(images: int, share: float, seed: int) -> NDArray[np.int64]:
    """Places in the pool: the images in turn, and among them, so that it is `share` of all, one of HOT drawn anew."""
    random = np.random.default_rng(seed)
    fresh = np.arange(HOT, images)
    fresh = np.roll(fresh, -int(share * len(fresh)))  # where no other traffic has just been
    count = round(len(fresh) / (1 - share)) if share < 1 else images
    places = random.integers(HOT, size=count)
    if share < 1:
        places[np.sort(random.choice(count, size=len(fresh), replace=False))] = fresh
    return places


def write(bodies: list[bytes], path: Path) -> None:
    """A file that drive.lua reads: each body behind its length in four bytes."""
    path.write_bytes(b"".join(struct.pack("<I", len(body)) + body for body in bodies))

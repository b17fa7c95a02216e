"""Bundles and archives to break: a random student, and an archive with some files changed."""

import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handler import networks
from handler.bundle import seal
from handler.contract import Contract
from serving.archive import unpacked
from training.artifact import write_bundle
from training.data import Split
from training.export import FORMATS, Source, product

EXPORTED = ("onnx", "onnx-int8", "exported", "torchscript")  # compiling takes a compiler and half a minute
LABELS = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
SERVED = Contract(network="separable", channels=1, height=28, width=28, labels=LABELS)


def blocks(count: int, channels: int = 1, side: int | tuple[int, int] = 28) -> Tensor:
    """Images of blocks, which differ in their answers as noise does not: uint8 `[count, channels, side, side]`.

    A `side` of two is height and width.
    """
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(0, 256, (count, channels, 4, 4), generator=generator, dtype=torch.uint8)
    return F.interpolate(small.float(), size=side).to(torch.uint8)


def settled(network: nn.Module, images: Tensor) -> nn.Module:
    """With BatchNorms that have seen these images, as after training."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network.train()(images)
    return network.eval()


def random_source(seed: int = 0, size: tuple[int, int] = (28, 28)) -> Source:
    """A student that has learned nothing, but gives different images different answers."""
    torch.manual_seed(seed)
    network = networks.build("separable", channels=1, size=size, classes=10)
    for parameter in network[-1].parameters():
        parameter.data.mul_(4)
    images = blocks(64, side=size)
    return Source(settled(network, images), replace(SERVED, height=size[0], width=size[1]), images)


def random_bundle(folder: Path, source: Source | None = None, engines: tuple[str, ...] = EXPORTED) -> Path:
    """A bundle as training writes it, of a student that has learned nothing, with 64 images of blocks."""
    source = source or random_source()
    for name in engines:
        FORMATS[name].write(source, folder / product("student", name))
    milliseconds = {"eager": 1.5, "onnx": 0.08, "onnx-int8": 0.09, "exported": 1.2, "torchscript": 0.7}
    measured = {name: {"accuracy": 0.9, "latency_ms": {"cpu": {"1": {"p50": ms}}}} for name, ms in milliseconds.items()}
    write_bundle(
        folder / "bundle",
        student=source.network,
        engines={name: folder / product("student", name) for name in engines},
        contract=source.contract,
        golden=Split(source.calibration, torch.arange(64) % 10),
        report={"served": "student", "engines": {"student": measured}},
        evidence={},
    )
    return folder / "bundle"


def remade(archive: Path, path: Path, change: Callable[[Path], None], *, sealed: bool) -> Path:
    """A copy of an archive whose unpacked files `change` was let loose on; sealed anew, or left touched."""
    with unpacked(archive) as root:
        change(root)
        if sealed:
            seal(root, {})
        with zipfile.ZipFile(path, "w") as made:
            for file in sorted(file for file in root.rglob("*") if file.is_file()):
                made.write(file, file.relative_to(root))
    return path

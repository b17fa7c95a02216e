"""Bundles and archives to break: a random student, and an archive with some files changed."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from handler import networks
from handler.bundle import seal
from handler.contract import Contract
from serving.archive import unpacked
from training.artifact import write_bundle
from training.data import Split
from training.export import to_onnx

LABELS = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def random_bundle(folder: Path, seed: int = 0) -> Path:
    """A bundle as training writes it, of a student that has learned nothing, with 64 images of blocks."""
    contract = Contract(network="separable", channels=1, height=28, width=28, labels=LABELS)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    network = networks.build("separable", channels=1, size=(28, 28), classes=10)
    blocks = torch.randint(0, 256, (64, 1, 4, 4), generator=generator, dtype=torch.uint8)
    images = blocks.repeat_interleave(7, 2).repeat_interleave(7, 3)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        network(images)  # in training mode: BatchNorm learns the scale, so that images differ in their answers
        for parameter in network[-1].parameters():
            parameter.mul_(4)
    to_onnx(network.eval(), contract, folder / "student.onnx")
    write_bundle(
        folder / "bundle",
        student=network,
        onnx=folder / "student.onnx",
        contract=contract,
        golden=Split(images, torch.arange(64) % 10),
        report={},
        evidence={"seed": seed},
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

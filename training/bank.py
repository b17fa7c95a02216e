"""The bank: a teacher's logits for every view of every training image, stored once and read by index.

Exactly right under augmentation, because the views are a finite set: `bank[view, index]` is what the teacher
says of that very picture. Two files: NAME.npy, float16 `[views, images, classes]`, memory-mapped; and NAME.json,
which tells what it was made from and how much of it is there.
"""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from handler.bundle import atomic, file_digest, text_digest
from handler.errors import DistilleryError
from training.features import Output
from training.processes import turn
from training.progress import bar
from training.teacher import Teacher
from training.views import Views

log = logging.getLogger(__name__)
BATCH = 500


class BankError(DistilleryError):
    """A bank that is not of this teacher, these images and these views, or was damaged."""


class Bank:
    """A finished bank, as a teacher. Raises BankError unless it is whole and was made from `source`."""

    def __init__(self, path: Path, source: dict[str, Any]) -> None:
        header = _header(path)
        if header is None or header.get("source") != source:
            changed = sorted(key for key in source if (header or {}).get("source", {}).get(key) != source[key])
            raise BankError(
                f"{path}: refused: made from another {', '.join(changed)}; remove it, or let it be built anew"
            )
        if header.get("sha256") is None:
            raise BankError(f"{path}: refused: only {header['done']} views are in it; build it to the end")
        if not path.is_file() or file_digest(path) != header["sha256"]:
            raise BankError(f"{path}: refused: missing or damaged: its SHA-256 is not its header's; remove it")
        self.logits: NDArray[np.float16] = np.load(path, mmap_mode="r")

    def __call__(self, images: Tensor, index: Tensor, view: Tensor) -> Output:
        """The stored logits, float32 `[B, K]`; `images` are not looked at."""
        found = torch.from_numpy(self.logits[view.cpu().numpy(), index.cpu().numpy()])
        return Output(found.to(index.device).float())


def build(
    path: Path, source: dict[str, Any], teacher: Teacher, images: Tensor, views: Views, device: torch.device
) -> None:
    """Ask `teacher`, on `device`, for every view of `images`, uint8 `[N, C, H, W]`; a killed build is carried on.

    `source` names what it is made from: digests of data, teacher and views. Raises BankError when a logit is not
    finite in float16.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with turn(path.with_suffix(".lock")):  # experiments with one teacher share its bank
        header = _header(path)
        if header is None or header.get("source") != source or not path.is_file():
            header = {"source": source, "done": 0, "sha256": None}
            _allocate(path, _ask(teacher, images[:1], views, 0, device).shape[1], len(images), len(views))
        logits = np.load(path, mmap_mode="r+")
        with bar("bank", len(views), header["done"]) as advance:
            for view in range(header["done"], len(views)):
                logits[view] = _ask(teacher, images, views, view, device)
                logits.flush()
                header["done"] = view + 1
                _write_header(path, header)
                advance()
        del logits
        if header["sha256"] is None:
            _write_header(path, {**header, "sha256": file_digest(path)})


def digest(source: dict[str, Any]) -> str:
    """The name under which a bank of `source` is kept."""
    return text_digest(source)[:16]


def _allocate(path: Path, classes: int, images: int, views: int) -> None:
    path.with_suffix(".json").unlink(missing_ok=True)  # before its bank is another
    np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(views, images, classes))


def _ask(teacher: Teacher, images: Tensor, views: Views, view: int, device: torch.device) -> NDArray[np.float16]:
    parts = []
    for index in torch.split(torch.arange(len(images), device=device), BATCH):
        chosen = torch.full_like(index, view)
        pictures = views.apply(images[index.to(images.device)].to(device), chosen)
        parts.append(teacher(pictures, index, chosen).logits.cpu())
    logits = torch.cat(parts).half()
    if not logits.isfinite().all():
        raise BankError("bank: the teacher's logits are not finite in float16; use bank=false")
    return logits.numpy()


def _header(path: Path) -> dict[str, Any] | None:
    try:
        header: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
    except (OSError, ValueError):
        return None
    return header


def _write_header(path: Path, header: dict[str, Any]) -> None:
    with atomic(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(header, indent=2) + "\n")

"""ModelInterface: uint8 pixels in, logits out; which engine computes them, and the proof that it may.

B images, C channels, H and W pixels, K classes; images are uint8 `[B, C, H, W]`, logits float32 `[B, K]`.
"""

import io
import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Protocol
from zipfile import BadZipFile

import numpy as np
import torch

from handler.choice import Choice, choose, device_of, read_evidence
from handler.contract import Contract, Logits, Pixels, probabilities
from handler.engines import ENGINES, SHORT, Setup
from handler.errors import BundleError, line
from handler.settings import HandlerSettings

log = logging.getLogger(__name__)
WORTH = 4  # images: fewer are computed before another thread has woken up
NO_MEMORY = ("out of memory", "not enough memory", "allocate memory", "bad_alloc", "alloc_failed")


class ModelInterface(Protocol):
    """A loaded student; `engine` names what runs it, `device` where."""

    engine: str
    device: str
    contract: Contract

    def warm_up(self, sizes: Iterable[int]) -> None:
        """Let the engine see each batch size before the first request does."""
        ...

    def predict(self, images: Pixels) -> Logits:
        """Logits float32 `[B, K]` of uint8 `[B, C, H, W]`; NaN for an image that does not fit into memory."""
        ...


class Student:
    """The student of `root` in one of the engines; BundleError when that cannot be loaded here.

    Its threads work inside the engine where batches are of one image; elsewhere each computes micro-batches of its
    own, for in a small network threads that share one mostly wait for each other. `tolerance` is by how much a
    probability may differ from what the engine said where it was exported.
    """

    def __init__(self, root: Path, contract: Contract, choice: Choice, threads: int, batch: int) -> None:
        engine, device = choice.engine, choice.device
        self.engine, self.device, self.micro_batch, self.contract = engine, device, choice.micro_batch, contract
        path = root / ENGINES[engine].file
        if not path.is_file():
            there = ", ".join(name for name, other in ENGINES.items() if (root / other.file).is_file())
            raise BundleError(f"engine {engine}: {path} is not there; the engines in it are {there or 'none'}")
        inside = threads if batch == 1 else 1
        torch.set_num_threads(inside)
        self.at_once = threads // inside if device == "cpu" else 1
        self.pool = ThreadPoolExecutor(self.at_once)
        self.forward = ENGINES[engine].load(path, Setup(contract, device, inside, choice.precision))
        self.tolerance = SHORT[choice.precision][1] if choice.precision in SHORT else ENGINES[engine].tolerance

    def warm_up(self, sizes: Iterable[int]) -> None:
        """Let the engine see each batch size before the first request does."""
        for size in sizes:
            self.predict(np.zeros((size, *self.contract.shape), np.uint8))

    def predict(self, images: Pixels) -> Logits:
        """Logits float32 `[B, K]` of uint8 `[B, C, H, W]`; NaN for an image that does not fit into memory.

        What does not fit is tried again in halves, and a size that did fit is kept for the batches to come.
        """
        size = min(self.micro_batch, max(WORTH, -(-len(images) // self.at_once)))
        if len(images) <= size:
            return self._fitting(images)
        return np.concatenate(list(self.pool.map(self._fitting, _parts(images, size))))

    def _fitting(self, images: Pixels) -> Logits:
        try:
            return self.forward(images)
        except Exception as error:
            if not _no_memory(error):
                raise
            log.warning("no memory for %d images at a time on %s: %s", len(images), self.device, line(error))
        torch.cuda.empty_cache()  # outside of the handler, whose traceback holds on to the tensors
        if len(images) == 1:
            return np.full((1, len(self.contract.labels)), np.nan, np.float32)
        half = (len(images) + 1) // 2
        logits = np.concatenate([self._fitting(part) for part in _parts(images, half)])
        if np.isfinite(logits).all():
            self.micro_batch = min(self.micro_batch, half)
        return logits


def _parts(images: Pixels, size: int) -> list[Pixels]:
    return [images[i : i + size] for i in range(0, len(images), size)]


def _no_memory(error: Exception) -> bool:
    """Whether an engine lacked memory; only PyTorch on a GPU has a class for it, the others say so in their text."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or any(words in str(error).lower() for words in NO_MEMORY)


def load_model(
    root: Path, contract: Contract, settings: HandlerSettings, threads: int, gpu_id: int | None, batch: int
) -> tuple[Student, str]:
    """The student in `root` in the engine that `choose` says, with `threads` threads, and why that one.

    Raises BundleError when it cannot be loaded here; with `settings.fallback` eager takes its place, and a log line
    says so.
    """
    torch.backends.cudnn.allow_tf32 = False  # or float32 would be TF32 on a GPU, and the golden images differ
    device = device_of(gpu_id, torch.cuda.device_count() if torch.cuda.is_available() else 0)
    if device != "cpu":
        torch.cuda.set_device(device)  # pragma: no cover: only a GPU can run it
    evidence = read_evidence(root)
    choice = choose(settings, evidence, contract.network, device, batch)
    try:
        return Student(root, contract, choice, threads, batch), choice.why
    except BundleError as error:
        if not settings.fallback or choice.engine == "eager":
            raise
        log.error("%s; falling back to eager, as the settings allow", error)
        eager = choose(replace(settings, engine="eager"), evidence, contract.network, device, batch)
        return Student(root, contract, eager, threads, batch), f"{choice.engine} cannot be loaded"


def replay(model: Student, golden: Path, sizes: Iterable[int]) -> float:
    """Predict golden images in a batch of each size, and all at once; the largest difference in probability.

    An engine whose own logits were stored is compared with them, any other with eager's. Raises BundleError when the
    difference is above the model's tolerance or the engine cannot answer: such a worker must not serve.
    """
    try:
        with np.load(io.BytesIO(golden.read_bytes()), allow_pickle=False) as file:
            own = f"logits_{model.engine}"
            images = file["images"].transpose(0, 3, 1, 2)
            expected = probabilities(file[own if own in file else "logits"])
    except (OSError, ValueError, EOFError, LookupError, BadZipFile) as error:
        raise BundleError(f"{golden}: no golden images in it: {line(error)}") from error
    largest = 0.0
    for size in (*sizes, len(images)):
        batch = np.arange(size) % len(images)
        try:
            found = probabilities(model.predict(np.ascontiguousarray(images[batch])))
            difference = float(np.abs(found - expected[batch]).max())
        except Exception as error:
            raise BundleError(f"engine {model.engine}: fails on {size} golden images: {line(error)}") from error
        if not difference <= model.tolerance:  # also when it is NaN
            text = f"differ by {difference:.2g} from what training saw; at most {model.tolerance:g} is allowed"
            raise BundleError(f"engine {model.engine}: probabilities of the golden images {text}")
        largest = max(largest, difference)
    return largest

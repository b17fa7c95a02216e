"""ModelInterface: uint8 pixels in, logits out; which engine computes them, and the proof that it may.

B images, C channels, H and W pixels, K classes; images are uint8 `[B, C, H, W]`, logits float32 `[B, K]`.
"""

import io
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import numpy as np
import torch

from handler.bundle import FILES
from handler.contract import Contract, probabilities
from handler.engines import ENGINES, Logits, Pixels, Setup, line
from handler.errors import BundleError
from handler.networks import NETWORKS
from handler.settings import HandlerSettings

log = logging.getLogger(__name__)


class ModelInterface(Protocol):
    """A loaded student; `engine` names what runs it, `device` where."""

    engine: str
    device: str
    contract: Contract

    def warm_up(self, sizes: Iterable[int]) -> None:
        """Let the engine see each batch size before the first request does."""
        ...

    def predict(self, images: Pixels) -> Logits:
        """Logits float32 `[B, K]` of uint8 `[B, C, H, W]`."""
        ...


class Student:
    """The student of `root` in one of the engines; BundleError when that cannot be loaded here."""

    def __init__(self, root: Path, contract: Contract, choice: "Choice", threads: int) -> None:
        engine, device = choice.engine, choice.device
        self.engine, self.device, self.micro_batch, self.contract = engine, device, choice.micro_batch, contract
        path = root / ENGINES[engine].file
        if not path.is_file():
            there = ", ".join(name for name, other in ENGINES.items() if (root / other.file).is_file())
            raise BundleError(f"engine {engine}: {path} is not there; the engines in it are {there or 'none'}")
        self.forward = ENGINES[engine].load(path, Setup(contract, device, threads))

    def warm_up(self, sizes: Iterable[int]) -> None:
        """Let the engine see each batch size before the first request does."""
        for size in sizes:
            self.predict(np.zeros((size, *self.contract.shape), np.uint8))

    def predict(self, images: Pixels) -> Logits:
        """Logits float32 `[B, K]` of uint8 `[B, C, H, W]`."""
        size = self.micro_batch
        if len(images) <= size:
            return self.forward(images)
        return np.concatenate([self.forward(images[i : i + size]) for i in range(0, len(images), size)])


@dataclass(frozen=True)
class Choice:
    """Which engine, where, how many images it is given at a time, and why."""

    engine: str
    device: str
    micro_batch: int
    why: str


def choose(
    settings: HandlerSettings, evidence: Mapping[str, Any], network: str, gpu_id: int | None, batch: int
) -> Choice:
    """The engine for the settings, and its micro-batch: the size up to `batch` at which an image took it least.

    Auto is the engine that was measured fastest on this kind of device, per image at its best such size, of those
    whose accuracy is at most `settings.accuracy_loss` below eager's; the first where nothing was measured.
    `evidence` is the report's part on engines. A `network` that is none of ours cannot run in eager.
    """
    kind = "cpu" if gpu_id is None or not torch.cuda.is_available() else "cuda"

    def on(name: str) -> str:
        return f"cuda:{gpu_id}" if kind == "cuda" and kind in ENGINES[name].devices else "cpu"

    def choice(name: str, why: str) -> Choice:
        size = speeds[name][1] if name in speeds else batch
        return Choice(name, on(name), settings.micro_batch or size, why)

    latencies = {name: found.get("latency_ms", {}).get(kind, {}) for name, found in evidence.items()}
    speeds = {name: best for name, found in latencies.items() if (best := _ms_an_image(found, batch))}
    if settings.engine != "auto":
        return choice(settings.engine, "the settings name it")
    least = evidence.get("eager", {}).get("accuracy", 0) - settings.accuracy_loss
    able = [name for name, found in evidence.items() if name in ENGINES and found["accuracy"] >= least]
    able = [name for name in able if name != "eager" or network in NETWORKS]
    measured = [name for name in able if name in speeds]
    if not measured:
        return choice(next(iter(able), "eager"), f"auto: no engine was measured on {kind}")
    text = ", ".join(f"{name} {speeds[name][0]:.3f}" for name in measured)
    return choice(min(measured, key=speeds.__getitem__), f"auto: the fastest of {text} ms an image")


def _ms_an_image(latencies: Mapping[str, Mapping[str, float]], batch: int) -> tuple[float, int] | None:
    """Milliseconds an image at the measured batch size, of those up to `batch`, where it is least, and that size."""
    return min(((found["p50"] / int(n), int(n)) for n, found in latencies.items() if int(n) <= batch), default=None)


def load_model(
    root: Path, contract: Contract, settings: HandlerSettings, threads: int, gpu_id: int | None, batch: int
) -> tuple[Student, str]:
    """The student in `root` in the engine that `choose` says, with `threads` threads, and why that one.

    Raises BundleError when it cannot be loaded here; with `settings.fallback` eager takes its place, and a log line
    says so.
    """
    torch.set_num_threads(threads)
    choice = choose(settings, _evidence(root), contract.network, gpu_id, batch)
    try:
        return Student(root, contract, choice, threads), choice.why
    except BundleError as error:
        if not settings.fallback or choice.engine == "eager":
            raise
        log.error("%s; falling back to eager, as the settings allow", error)
        return Student(root, contract, replace(choice, engine="eager"), threads), f"{choice.engine} cannot be loaded"


def replay(model: ModelInterface, golden: Path, sizes: Iterable[int]) -> float:
    """Predict golden images in a batch of each size, and all at once; the largest difference in probability.

    An engine whose own logits were stored is compared with them, any other with eager's. Raises BundleError when the
    difference is above the engine's tolerance or the engine cannot answer: such a worker must not serve.
    """
    tolerance = ENGINES[model.engine].tolerance
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
        if not difference <= tolerance:  # also when it is NaN
            text = f"differ by {difference:.2g} from what training saw; at most {tolerance:g} is allowed"
            raise BundleError(f"engine {model.engine}: probabilities of the golden images {text}")
        largest = max(largest, difference)
    return largest


def _evidence(root: Path) -> dict[str, Any]:
    """What was measured of the served network's engines, by their names."""
    try:
        report = json.loads((root / FILES.report).read_text())
        found: dict[str, Any] = report["engines"][report["served"]]
    except (OSError, ValueError, LookupError) as error:
        raise BundleError(f"{root / FILES.report}: no report of the engines in it: {line(error)}") from error
    return found

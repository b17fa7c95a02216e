"""ModelInterface: uint8 pixels in, logits out; which engine computes them, and the proof that it may.

B images, C channels, H and W pixels, K classes; images are uint8 `[B, C, H, W]`, logits float32 `[B, K]`.
"""

import io
import json
import logging
from collections.abc import Iterable, Mapping
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

    def __init__(self, root: Path, contract: Contract, engine: str, device: str, threads: int) -> None:
        self.engine, self.device, self.contract = engine, device, contract
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
        return self.forward(images)


def choose(
    settings: HandlerSettings, evidence: Mapping[str, Any], network: str, gpu_id: int | None, batch: int
) -> tuple[str, str, str]:
    """Engine, device, and why.

    Auto is the engine that was measured fastest on this kind of device, per image in batches of up to `batch`, of
    those whose accuracy is at most `settings.accuracy_loss` below eager's; the first where nothing was measured.
    `evidence` is the report's part on engines. A `network` that is none of ours cannot run in eager.
    """
    kind = "cpu" if gpu_id is None or not torch.cuda.is_available() else "cuda"

    def on(name: str) -> str:
        return f"cuda:{gpu_id}" if kind == "cuda" and kind in ENGINES[name].devices else "cpu"

    if settings.engine != "auto":
        return settings.engine, on(settings.engine), "the settings name it"
    least = evidence.get("eager", {}).get("accuracy", 0) - settings.accuracy_loss
    able = {name: found for name, found in evidence.items() if name in ENGINES and found["accuracy"] >= least}
    if network not in NETWORKS:
        able.pop("eager", None)
    speeds = {name: _ms_an_image(found["latency_ms"].get(kind, {}), batch) for name, found in able.items()}
    measured = {name: ms for name, ms in speeds.items() if ms is not None}
    if not measured:
        name = next(iter(able), "eager")
        return name, on(name), f"auto: no engine was measured on {kind}"
    name = min(measured, key=measured.__getitem__)
    text = ", ".join(f"{name} {ms:.3f}" for name, ms in measured.items())
    return name, on(name), f"auto: the fastest of {text} ms an image"


def _ms_an_image(latencies: Mapping[str, Mapping[str, float]], batch: int) -> float | None:
    """Milliseconds an image at the largest measured batch size that is at most `batch`."""
    sizes = [int(size) for size in latencies if int(size) <= batch]
    return latencies[str(max(sizes))]["p50"] / max(sizes) if sizes else None


def load_model(
    root: Path, contract: Contract, settings: HandlerSettings, threads: int, gpu_id: int | None, batch: int
) -> tuple[ModelInterface, str]:
    """The student in `root` in the engine that `choose` says, with `threads` threads, and why that one.

    Raises BundleError when it cannot be loaded here; with `settings.fallback` eager takes its place, and a log line
    says so.
    """
    torch.set_num_threads(threads)
    evidence = _evidence(root) if settings.engine == "auto" else {}
    engine, device, why = choose(settings, evidence, contract.network, gpu_id, batch)
    try:
        return Student(root, contract, engine, device, threads), why
    except BundleError as error:
        if not settings.fallback or engine == "eager":
            raise
        log.error("%s; falling back to eager, as the settings allow", error)
        return Student(root, contract, "eager", device, threads), f"{engine} cannot be loaded here"


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

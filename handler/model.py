"""ModelInterface and its engines: uint8 pixels in, logits out, whatever runs them.

B images, C channels, H and W pixels, K classes; images are uint8 `[B, C, H, W]`, logits float32 `[B, K]`.
"""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray

from handler.bundle import FILES
from handler.contract import Contract, probabilities
from handler.errors import BundleError, SettingsError
from handler.networks import build
from handler.settings import HandlerSettings

Pixels = NDArray[np.uint8]
Logits = NDArray[np.float32]
TOLERANCE = 1e-3  # by how much a probability may differ between engines


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


class Eager:
    """The state dict in its PyTorch network: the reference that every other engine must agree with."""

    engine = "eager"

    def __init__(self, weights: Path, contract: Contract, device: str) -> None:
        self.contract, self.device = contract, device
        size = contract.height, contract.width
        try:
            network = build(contract.network, channels=contract.channels, size=size, classes=len(contract.labels))
        except SettingsError as error:
            raise BundleError(f"engine eager: {error}; only engine onnx can serve other networks") from None
        try:
            network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        except Exception as error:  # torch raises whatever the unpickler met
            raise BundleError(f"{weights}: not the weights of '{contract.network}': {_line(error)}") from error
        self.network = network.eval().requires_grad_(False).to(device)

    def warm_up(self, sizes: Iterable[int]) -> None:
        """Let the engine see each batch size before the first request does."""
        _warm_up(self, sizes)

    def predict(self, images: Pixels) -> Logits:
        """Logits float32 `[B, K]` of uint8 `[B, C, H, W]`."""
        with torch.inference_mode():
            logits: Logits = self.network(torch.from_numpy(images).to(self.device)).float().cpu().numpy()
        return logits


class Onnx:
    """The exported student in ONNX Runtime, on the CPU: several times faster than eager for small networks."""

    engine = "onnx"
    device = "cpu"

    def __init__(self, path: Path, contract: Contract, threads: int) -> None:
        try:
            import onnxruntime  # a worker that runs eager need not have it
        except ImportError:
            raise BundleError("engine onnx: onnxruntime is not installed; install it, or set engine: eager") from None
        self.contract = contract
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        # Threads that wait by spinning take the cores from the other workers and from the server.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime has no common class of its errors
            raise BundleError(f"{path}: ONNX Runtime cannot load it: {_line(error)}") from error
        self.input = self.session.get_inputs()[0].name

    def warm_up(self, sizes: Iterable[int]) -> None:
        """Let the engine see each batch size before the first request does."""
        _warm_up(self, sizes)

    def predict(self, images: Pixels) -> Logits:
        """Logits float32 `[B, K]` of uint8 `[B, C, H, W]`."""
        logits: Logits = self.session.run(None, {self.input: images})[0]
        return logits


def choose(settings: HandlerSettings, gpu_id: int | None) -> tuple[str, str, str]:
    """Engine, device, and why: auto is ONNX on a CPU, eager on a GPU; the exported student runs on the CPU only."""
    device = "cpu" if gpu_id is None or not torch.cuda.is_available() else f"cuda:{gpu_id}"
    if settings.engine == "eager":
        return "eager", device, "the settings name it"
    if settings.engine == "onnx":
        return "onnx", "cpu", "the settings name it"
    if device == "cpu":
        return "onnx", device, "auto, no GPU"
    return "eager", device, "auto, a GPU"


def load_model(
    model_dir: Path, contract: Contract, settings: HandlerSettings, threads: int, gpu_id: int | None
) -> ModelInterface:
    """The student in `model_dir`, in the engine that `choose` says, with `threads` threads; raises BundleError."""
    torch.set_num_threads(threads)
    engine, device, _ = choose(settings, gpu_id)
    if engine == "onnx":
        return Onnx(model_dir / FILES.onnx, contract, threads)
    return Eager(model_dir / FILES.weights, contract, device)


def replay(model: ModelInterface, golden: Path, sizes: Iterable[int]) -> float:
    """Predict golden images in a batch of each size, and all at once; the largest difference in probability.

    Raises BundleError when that is above TOLERANCE or the engine cannot answer: such a worker must not serve.
    """
    try:
        with np.load(io.BytesIO(golden.read_bytes()), allow_pickle=False) as file:
            images, expected = file["images"].transpose(0, 3, 1, 2), probabilities(file["logits"])
    except (OSError, ValueError, EOFError, LookupError, BadZipFile) as error:
        raise BundleError(f"{golden}: no golden images in it: {_line(error)}") from error
    largest = 0.0
    for size in (*sizes, len(images)):
        batch = np.arange(size) % len(images)
        try:
            found = probabilities(model.predict(np.ascontiguousarray(images[batch])))
            difference = float(np.abs(found - expected[batch]).max())
        except Exception as error:
            raise BundleError(f"engine {model.engine}: fails on {size} golden images: {_line(error)}") from error
        if not difference <= TOLERANCE:  # also when it is NaN
            text = f"differ by {difference:.2g} from what training saw; at most {TOLERANCE:g} is allowed"
            raise BundleError(f"engine {model.engine}: probabilities of the golden images {text}")
        largest = max(largest, difference)
    return largest


def _warm_up(model: ModelInterface, sizes: Iterable[int]) -> None:
    for size in sizes:
        model.predict(np.zeros((size, *model.contract.shape), np.uint8))


def _line(error: Exception) -> str:
    """The error's text in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]

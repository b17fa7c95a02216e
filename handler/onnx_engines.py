"""ONNX Runtime's engines: a graph in a file, run by one of its providers.

B images, C channels, H and W pixels, K classes; images are uint8 `[B, C, H, W]`, logits float32 `[B, K]`.
"""

import lzma
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from handler.contract import Logits, Pixels
from handler.errors import BundleError, line

FEW = 8  # images, for which it shows what ONNX Runtime does around its graph


class Bound:
    """A graph with memory for batches of one `shape`: `run` would check its input and make an output each time.

    For one thread at a time.
    """

    def __init__(self, graph: Any, shape: tuple[int, ...], classes: int) -> None:
        self.graph, self.binding = graph, graph.io_binding()
        self.pixels, self.logits = np.empty(shape, np.uint8), np.empty((shape[0], classes), np.float32)
        given, found = graph.get_inputs()[0].name, graph.get_outputs()[0].name
        self.binding.bind_input(given, "cpu", 0, np.uint8, self.pixels.shape, self.pixels.ctypes.data)
        self.binding.bind_output(found, "cpu", 0, np.float32, self.logits.shape, self.logits.ctypes.data)

    def __call__(self, images: Pixels) -> Logits:
        """Logits float32 `[B, K]` of uint8 `[B, C, H, W]`."""
        self.pixels[:] = images
        self.graph.run_with_iobinding(self.binding)
        return self.logits.copy()


def session(path: Path, provider: str, device: str, threads: int, classes: int) -> Callable[[Pixels], Logits]:
    """The graph in `path` as a function of images, run by `provider`; BundleError when it cannot be loaded here."""
    try:
        import onnxruntime  # a worker that runs eager need not have it
    except ImportError:
        raise BundleError("onnxruntime is not installed; install it, or set engine: eager") from None
    if provider not in onnxruntime.get_available_providers():
        raise BundleError(f"{provider}: not in this onnxruntime; install onnxruntime-gpu where there is a GPU")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Threads that wait by spinning take the cores from the other workers and from the server.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Without VNNI, a processor's fast products of uint8 and int8 overflow 16 bits; then slower ones that do not.
    options.add_session_config_entry("session.x64quantprecision", "1")
    where = {} if device == "cpu" else {"device_id": device.rpartition(":")[2]}
    try:
        model = path.read_bytes()
        model = lzma.decompress(model) if path.suffix == ".xz" else model
        graph = onnxruntime.InferenceSession(model, options, providers=[(provider, where)], enable_fallback=0)
    except Exception as error:  # ONNX Runtime has no common class of its errors
        raise BundleError(f"{path}: ONNX Runtime cannot load it: {line(error)}") from error
    name, outputs = graph.get_inputs()[0].name, [graph.get_outputs()[0].name]

    idle: defaultdict[int, deque[Bound]] = defaultdict(deque)

    def forward(images: Pixels) -> Logits:
        if len(images) > FEW:
            many: Logits = graph.run(outputs, {name: images})[0]
            return many
        waiting = idle[len(images)]
        try:
            bound = waiting.pop()
        except IndexError:  # a new size, or all are with other threads
            bound = Bound(graph, images.shape, classes)
        few = bound(images)
        waiting.append(bound)
        return few

    return forward

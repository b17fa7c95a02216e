"""ONNX Runtime's engines: a graph in a file, run by one of its providers.

B images, C channels, H and W pixels, K classes; images are uint8 `[B, C, H, W]`, logits float32 `[B, K]`.
"""

import lzma
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from handler.errors import BundleError, line


def session(path: Path, provider: str, device: str, threads: int) -> Callable[[NDArray[np.uint8]], NDArray[np.float32]]:
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

    def forward(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = graph.run(outputs, {name: images})[0]
        return logits

    return forward

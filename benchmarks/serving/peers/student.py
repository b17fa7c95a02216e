"""The student as every peer serves it: the same file, the same decoding, the same answer. Environment: BUNDLE, RUNTIME.

RUNTIME onnx is ONNX Runtime with the bundle's ONNX file; torch is PyTorch with its weights. One thread each.
"""

import json
import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from handler.contract import probabilities

Pixels = NDArray[np.uint8]
PNG = b"\x89PNG"


class Student:
    """The network and what a request must look like."""

    def __init__(self, bundle: Path, runtime: str) -> None:
        contract = json.loads((bundle / "contract.json").read_text())
        self.shape = contract["height"], contract["width"], contract["channels"]
        self.labels: list[str] = contract["labels"]
        self.forward = _onnx(bundle / "student.onnx") if runtime == "onnx" else _torch(bundle)
        self.forward(np.zeros((1, self.shape[2], *self.shape[:2]), np.uint8))

    @classmethod
    def from_environment(cls) -> "Student":
        """That of BUNDLE in RUNTIME."""
        return cls(Path(os.environ["BUNDLE"]), os.environ["RUNTIME"])

    def decode(self, body: bytes) -> Pixels:
        """Pixels `[C, H, W]` of a PNG image or of raw bytes `[H, W, C]`."""
        if body.startswith(PNG):
            image = Image.open(BytesIO(body)).convert("L" if self.shape[2] == 1 else "RGB")
            return np.asarray(image, np.uint8).reshape(self.shape).transpose(2, 0, 1)
        return np.frombuffer(body, np.uint8).reshape(self.shape).transpose(2, 0, 1)

    def answers(self, images: Sequence[Pixels]) -> list[dict[str, Any]]:
        """What a request gets, for each image of a batch: what our own archive answers, without its identity."""
        scores = probabilities(self.forward(np.stack(images)))
        return [
            {"prediction": [row], "label": [self.labels[k]], "class_id": [k]}
            for row, k in zip(scores.round(9).tolist(), scores.argmax(axis=1).tolist(), strict=True)
        ]


def _onnx(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


def _torch(bundle: Path) -> Any:
    """PyTorch as its documentation says: eval mode, inference mode, one thread."""
    import torch

    from handler.contract import Contract
    from handler.engines import ENGINES, Setup

    torch.set_num_threads(1)
    return ENGINES["eager"].load(bundle / "student.pt", Setup(Contract.read(bundle / "contract.json")))

"""The student in a portable form, and the proof that it still answers the same."""

import contextlib
import io
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from handler.bundle import atomic
from handler.contract import Contract
from handler.errors import DistilleryError

INPUT, OUTPUT = "pixels", "logits"
OPSET = 20


def to_onnx(network: nn.Module, contract: Contract, path: Path) -> None:
    """Write the network as ONNX: uint8 `[B, C, H, W]` → float32 `[B, K]`, B free; checked by onnx.checker.

    Raises DistilleryError when an operator of the network has no ONNX form.
    """
    example = torch.zeros(2, *contract.shape, dtype=torch.uint8)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                network.eval().cpu().to(memory_format=torch.contiguous_format),
                (example,),
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                opset_version=OPSET,
                dynamo=True,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error).splitlines()[0]
        raise DistilleryError(f"{contract.network}: cannot be exported to ONNX: {reason}") from error
    assert program is not None
    onnx.checker.check_model(program.model_proto, full_check=True)
    with atomic(path) as temporary:
        temporary.write_bytes(program.model_proto.SerializeToString(deterministic=True))


def onnx_session(path: Path, threads: int = 1) -> onnxruntime.InferenceSession:
    """A CPU session over an exported network, with `threads` threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def onnx_logits(session: onnxruntime.InferenceSession, images: Tensor, batch: int = 500) -> Tensor:
    """Logits float32 `[N, K]` of uint8 `[N, C, H, W]`."""
    parts = [session.run([OUTPUT], {INPUT: part.numpy()})[0] for part in torch.split(images, batch)]
    return torch.from_numpy(np.concatenate(parts))

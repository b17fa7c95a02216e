"""A student in portable forms: uint8 `[B, C, H, W]`, B free, in; float32 `[B, K]` out; the contract goes along."""

import contextlib
import io
import logging
import lzma
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from handler.bundle import FILES, atomic
from handler.contract import Contract
from handler.engines import INT8, PROCESSOR
from handler.errors import DistilleryError, line
from training.config import LEAST
from training.lean import lean

INPUT, OUTPUT = "pixels", "logits"
OPSET = 20
CONTRACT = FILES.contract
BATCH = 100  # images that calibration looks at together
# For numbers of one byte, LZMA's guesses about text only cost: no context, no position.
PACKED = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 0, "pb": 0}]


@dataclass(frozen=True)
class Source:
    """What is exported: a network on the CPU, what it is served by, and images `[N, C, H, W]` to calibrate it with."""

    network: nn.Module
    contract: Contract
    calibration: Tensor

    @property
    def example(self) -> Tensor:
        """A batch that shows which dimension is free."""
        return torch.zeros(2, *self.contract.shape, dtype=torch.uint8)

    def program(self) -> ExportedProgram:
        """The network as torch.export sees it."""
        network = self.network.eval().to(memory_format=torch.contiguous_format)
        return torch.export.export(network, (self.example,), dynamic_shapes=({0: Dim("batch")},))


def to_onnx(source: Source, path: Path) -> None:
    """ONNX, checked by onnx.checker; without what only the exporter's debugging needs."""
    with _exporting(source, path) as temporary:
        model = _onnx(source)
        lean(model)
        temporary.write_bytes(_bytes(model, source.contract))


def to_onnx_int8(source: Source, path: Path) -> None:
    """ONNX with int8 weights, one scale per output channel, and uint8 features of calibrated ranges; packed.

    By ONNX Runtime's static quantizer, whose kernels run it (Jacob et al. 2018, arXiv:1712.05877, eq. 3 and 12). In
    operators of integers, which is what the runtime makes of the other notation, that has a scale per bias besides.
    """
    if len(source.calibration) < LEAST:
        raise DistilleryError(f"calibration: expected at least {LEAST} images, got {len(source.calibration)}")
    with _exporting(source, path) as temporary, tempfile.TemporaryDirectory() as folder:
        plain, prepared, small = (f"{folder}/{name}.onnx" for name in ("plain", "prepared", "small"))
        onnx.save(_onnx(source), plain)
        quant_pre_process(plain, prepared)
        quantization.quantize_static(
            prepared,
            small,
            _Images(source.calibration),
            quant_format=quantization.QuantFormat.QOperator,
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            activation_type=quantization.QuantType.QUInt8,
        )
        temporary.write_bytes(lzma.compress(_bytes(onnx.load(small), source.contract), filters=PACKED))


def to_exported(source: Source, path: Path) -> None:
    """The program of torch.export."""
    with _exporting(source, path) as temporary, temporary.open("wb") as stream:
        torch.export.save(source.program(), stream, extra_files={CONTRACT: source.contract.to_json()})


def to_compiled(source: Source, path: Path) -> None:
    """AOTInductor's package: compiled here, for this kind of processor; needs a C++ compiler."""
    contract = source.contract
    extra = {CONTRACT: contract.to_json(), PROCESSOR: torch.backends.cpu.get_cpu_capability()}
    # For C++, without JSON.
    extra |= {"shape": " ".join(map(str, contract.shape)), "labels": "\n".join(contract.labels)}
    # As many threads as the process that runs it has, not as many as here.
    options = {"aot_inductor.metadata": extra, "cpp.dynamic_threads": True}
    with _exporting(source, path) as temporary, tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "package.pt2"  # the compiler insists on the name's end
        torch._inductor.aoti_compile_and_package(source.program(), package_path=str(package), inductor_configs=options)
        shutil.copyfile(package, temporary)


def to_torchscript(source: Source, path: Path) -> None:
    """TorchScript, traced and frozen; deprecated upstream."""
    with _exporting(source, path) as temporary:
        traced = torch.jit.trace(source.network.eval(), source.example)  # type: ignore[no-untyped-call]
        torch.jit.save(torch.jit.freeze(traced), str(temporary), _extra_files={CONTRACT: source.contract.to_json()})


def to_executorch(source: Source, path: Path) -> None:
    """ExecuTorch's program for devices, its layers on XNNPACK; needs the package executorch."""
    with _exporting(source, path) as temporary:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        lowered = to_edge_transform_and_lower(source.program(), partitioner=[XnnpackPartitioner()])
        temporary.write_bytes(lowered.to_executorch().buffer)


@dataclass(frozen=True)
class Format:
    """How a network is written, and the name of its file."""

    write: Callable[[Source, Path], None]
    file: str


FORMATS = {
    "onnx": Format(to_onnx, FILES.onnx),
    INT8: Format(to_onnx_int8, FILES.onnx_int8),
    "exported": Format(to_exported, FILES.exported),
    "compiled": Format(to_compiled, FILES.compiled),
    "torchscript": Format(to_torchscript, FILES.torchscript),
    "executorch": Format(to_executorch, "student.pte"),
}


def product(role: str, name: str) -> str:
    """The name of the file that holds the network of `role` in the format `name`."""
    return FORMATS[name].file.replace("student", role, 1)


class _Images(quantization.CalibrationDataReader):  # type: ignore[misc]
    """Images, as the quantizer wants to be given them."""

    def __init__(self, images: Tensor) -> None:
        self.parts = iter(torch.split(images, BATCH))

    def get_next(self) -> dict[str, object] | None:
        """The next batch, None after the last."""
        part = next(self.parts, None)
        return None if part is None else {INPUT: part.numpy()}


def _onnx(source: Source) -> onnx.ModelProto:
    with contextlib.redirect_stdout(io.StringIO()):
        found = torch.onnx.export(
            source.program(), input_names=[INPUT], output_names=[OUTPUT], opset_version=OPSET, dynamo=True
        )
    assert found is not None
    return found.model_proto


def _bytes(model: onnx.ModelProto, contract: Contract) -> bytes:
    """The model as it is stored, with the contract in its metadata."""
    graph = model.graph
    for part in (*graph.node, *graph.initializer, *graph.input, *graph.output, graph):
        part.ClearField("metadata_props")
    graph.ClearField("value_info")
    onnx.helper.set_model_props(model, {CONTRACT: contract.to_json()})
    onnx.checker.check_model(model, full_check=True)
    stored: bytes = model.SerializeToString(deterministic=True)
    return stored


@contextlib.contextmanager
def _exporting(source: Source, path: Path) -> Iterator[Path]:
    """Where to write what becomes `path`, whole or not at all.

    Exporters warn and advise about what they do themselves, and raise errors of many classes and pages: the user gets
    one line.
    """
    loggers = [logging.getLogger(name) for name in (None, "onnxruntime.quantization")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with atomic(path) as temporary, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield temporary
    except Exception as error:
        raise DistilleryError(f"{path}: '{source.contract.network}' cannot be exported: {line(error)}") from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

"""Engines: what computes a student's logits. One function each: its file in, a function of pixels out.

B images, C channels, H and W pixels, K classes; images are uint8 `[B, C, H, W]`, logits float32 `[B, K]`.
"""

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

from handler.bundle import FILES
from handler.contract import Contract, Logits, Pixels
from handler.errors import BundleError, SettingsError, line
from handler.networks import build
from handler.onnx_engines import session
from handler.widths import fit

Forward = Callable[[Pixels], Logits]
INT8 = "onnx-int8"
PROCESSOR = "processor"
SHORT = {"bf16": (torch.bfloat16, 0.1), "fp16": (torch.float16, 0.0125)}
"""Formats shorter than float32, and by how much a probability may then differ from float32's.

Layer upon layer rounds to the 8 bits of bf16, and logits of 14 were off by 0.1 in the end, twice 2^-8 of themselves.
A probability is off by at most half as much as its logits: 0.05, of which a network that is in order may have twice.
fp16 has 11 bits, so an eighth of that.
"""


@dataclass(frozen=True)
class Setup:
    """What an engine is loaded for."""

    contract: Contract
    device: str = "cpu"
    threads: int = 1
    precision: str = "fp32"


@dataclass(frozen=True)
class Engine:
    """Which file of a bundle it runs, how that is loaded, on which devices, and in which precisions.

    `tolerance` is by how much a probability may differ from what this engine said where it was exported. In floating
    point only the order of sums differs between machines; integer kernels round where they please.
    """

    file: str
    load: Callable[[Path, Setup], Forward]
    devices: tuple[str, ...] = ("cpu", "cuda")
    precisions: tuple[str, ...] = ("fp32",)
    tolerance: float = 1e-3


def network_of(path: Path, contract: Contract) -> nn.Module:
    """The PyTorch network of the state dict in `path`, as it answers; BundleError when it is none of `contract`'s."""
    size = contract.height, contract.width
    try:
        network = build(contract.network, channels=contract.channels, size=size, classes=len(contract.labels))
    except SettingsError as error:
        raise BundleError(f"engine eager: {error}; the exported engines can serve other networks") from None
    try:
        fit(network, torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises whatever the unpickler met
        raise BundleError(f"{path}: not the weights of '{contract.network}': {line(error)}") from error
    return network.eval().requires_grad_(False)


def _eager(path: Path, setup: Setup) -> Forward:
    """The state dict in its PyTorch network: the reference that every other engine must agree with."""
    network = network_of(path, setup.contract).to(setup.device)
    if setup.precision == "fp32":
        return on_torch(network, setup.device)
    # What would suffer stays in float32, such as the normalisation of the pixels.
    short = torch.autocast(torch.device(setup.device).type, SHORT[setup.precision][0])
    return on_torch(short(network.forward), setup.device)


def _exported(path: Path, setup: Setup) -> Forward:
    """The program of torch.export: the network without its Python code."""
    try:
        program = read_program(path)
    except Exception as error:
        raise BundleError(f"{path}: torch.export cannot load it: {line(error)}") from error
    return on_torch(move_to_device_pass(program, setup.device).module(), setup.device)


def _compiled(path: Path, setup: Setup) -> Forward:
    """The package of AOTInductor: machine code for the kind of processor that compiled it."""
    try:
        package = torch._inductor.aoti_load_package(str(path))
    except Exception as error:
        raise BundleError(f"{path}: AOTInductor cannot load it here: {line(error)}") from error
    made, here = package.get_metadata().get(PROCESSOR), torch.backends.cpu.get_cpu_capability()
    if made != here:  # it would die of an illegal instruction
        raise BundleError(f"{path}: compiled for a processor with {made}; this one has {here}")
    return on_torch(package, setup.device)


def _torchscript(path: Path, setup: Setup) -> Forward:
    """TorchScript: upstream has deprecated it; what runs it today goes on running it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the class that torch deprecates it by
            module = torch.jit.load(path, map_location=setup.device)  # type: ignore[no-untyped-call]
    except Exception as error:
        raise BundleError(f"{path}: TorchScript cannot load it: {line(error)}") from error
    return on_torch(module, setup.device)


def _onnx(path: Path, setup: Setup) -> Forward:
    """ONNX Runtime: for small networks several times faster than eager on a CPU. A name that ends in .xz is packed."""
    return session(path, "CPUExecutionProvider", setup.device, setup.threads, len(setup.contract.labels))


def _tensorrt(path: Path, setup: Setup) -> Forward:
    """ONNX Runtime's TensorRT, on an NVIDIA GPU; it compiles while it warms up."""
    return session(path, "TensorrtExecutionProvider", setup.device, setup.threads, len(setup.contract.labels))


ENGINES = {
    "eager": Engine(FILES.weights, _eager, precisions=("fp32", *SHORT)),
    "onnx": Engine(FILES.onnx, _onnx, devices=("cpu",)),
    INT8: Engine(FILES.onnx_int8, _onnx, devices=("cpu",), tolerance=0.1),
    "tensorrt": Engine(FILES.onnx, _tensorrt, devices=("cuda",), tolerance=SHORT["fp16"][1]),  # TF32 has 11 bits, too
    "exported": Engine(FILES.exported, _exported),
    "compiled": Engine(FILES.compiled, _compiled, devices=("cpu",)),
    "torchscript": Engine(FILES.torchscript, _torchscript),
}


def on_torch(module: Callable[[Tensor], Tensor], device: str) -> Forward:
    """A PyTorch module, which is on `device`, as a function of arrays.

    From and to a GPU it copies without waiting, which takes pinned memory on this side, and waits once for all.
    """
    on_gpu = torch.device(device).type == "cuda"

    def forward(images: Pixels) -> Logits:
        with torch.inference_mode():
            pixels = torch.from_numpy(images).pin_memory() if on_gpu else torch.from_numpy(images)
            logits = module(pixels.to(device, non_blocking=True)).float().to("cpu", non_blocking=True)
            if on_gpu:
                torch.cuda.current_stream(device).synchronize()  # pragma: no cover: only a GPU can run it
        found: Logits = logits.numpy()
        return found

    return forward


def read_program(path: Path) -> ExportedProgram:
    """What torch.export.save wrote; the errors are torch's, of any class."""
    log = logging.getLogger("torch.export")
    log.disabled = True  # it would print the traceback of what is one line here
    try:
        return torch.export.load(path)
    finally:
        log.disabled = False

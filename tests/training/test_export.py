"""Every format answers as the network does, in any batch, carries the contract, and fails in one line."""

import copy
import functools
import json
import lzma
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from handler.contract import Contract
from handler.engines import ENGINES, INT8, Setup
from handler.errors import DistilleryError
from tests.bundles import LABELS, SERVED, blocks, random_source, settled
from training import compress, measure, networks
from training.evaluate import logits_of, macs
from training.export import CONTRACT, FORMATS, Source, product, to_onnx_int8

COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")
FLOAT = ["onnx", "exported", "torchscript", pytest.param("compiled", marks=COMPILER)]


@pytest.fixture(scope="module")
def student() -> Source:
    return random_source()


@pytest.fixture(scope="module")
def pruned(student: Source) -> Source:
    network = copy.deepcopy(student.network)
    compress.prune(network, student.contract.shape, macs(network, student.contract.shape) // 2)
    return Source(settled(network, blocks(64)), SERVED, blocks(64))


@pytest.fixture(scope="module")
def file(
    student: Source, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Callable[[str], Path]:
    """The student in the format of that name, each written once: some take half a minute."""

    @functools.cache
    def written(name: str) -> Path:
        if name == "compiled":
            return Path(request.getfixturevalue("compiled"))
        path = tmp_path_factory.mktemp("student") / product("student", name)
        FORMATS[name].write(student, path)
        return path

    return written


def assert_same_answers(name: str, path: Path, source: Source) -> None:
    forward = ENGINES[name].load(path, Setup(SERVED))
    for count in (1, 3, 64):
        found = measure.answers(forward, source.calibration[:count])
        torch.testing.assert_close(found, logits_of(source.network, source.calibration[:count]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FLOAT)
def test_the_answers_are_the_networks(name: str, file: Callable[[str], Path], student: Source) -> None:
    path = file(name)
    assert_same_answers(name, path, student)
    assert [other.name for other in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["onnx", "exported", "torchscript"])
def test_the_answers_of_a_pruned_network_are_too(name: str, pruned: Source, tmp_path: Path) -> None:
    path = tmp_path / product("pruned", name)
    FORMATS[name].write(pruned, path)
    assert_same_answers(name, path, pruned)


def test_int8_answers_almost_the_same_from_bytes(file: Callable[[str], Path], student: Source) -> None:
    path = file(INT8)
    found = measure.answers(ENGINES[INT8].load(path, Setup(SERVED)), student.calibration)
    expected = logits_of(student.network, student.calibration)
    assert (found.softmax(1) - expected.softmax(1)).abs().max() < 0.1
    model = onnx.load_from_string(lzma.decompress(path.read_bytes()))
    large = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer if np.prod(tensor.dims) > 500]
    assert large and all(tensor.dtype == np.int8 for tensor in large)


def test_weights_on_a_grid_of_few_bits_are_few_numbers_and_pack_smaller(student: Source, tmp_path: Path) -> None:
    sizes = {}
    for bits in (8, 4):
        network = copy.deepcopy(student.network)
        compress.put_on_grid(network, bits)
        compress.settle(network)
        path = tmp_path / f"{bits}.onnx.xz"
        to_onnx_int8(Source(network, SERVED, student.calibration), path)
        sizes[bits] = path.stat().st_size
        model = onnx.load_from_string(lzma.decompress(path.read_bytes()))
        for tensor in model.graph.initializer:
            if len(tensor.dims) == 4:
                rows = numpy_helper.to_array(tensor).reshape(tensor.dims[0], -1)
                assert max(len(np.unique(row)) for row in rows) <= 2**bits - 1
    assert sizes[4] < 0.75 * sizes[8]


@pytest.mark.parametrize("name", [*FLOAT, INT8])
def test_the_contract_goes_along(name: str, file: Callable[[str], Path]) -> None:
    path, extra = file(name), {CONTRACT: ""}
    if name in ("onnx", INT8):
        data = path.read_bytes()
        model = onnx.load_from_string(lzma.decompress(data) if name == INT8 else data)
        extra = {entry.key: entry.value for entry in model.metadata_props}
    elif name == "exported":
        torch.export.load(path, extra_files=extra)
    elif name == "torchscript":
        with pytest.warns(FutureWarning):
            torch.jit.load(path, _extra_files=extra)  # type: ignore[no-untyped-call]
    else:
        extra = torch._inductor.aoti_load_package(str(path)).get_metadata()
    assert json.loads(extra[CONTRACT]) == json.loads(SERVED.to_json())


class Unsupported(nn.Module):
    """A network that decides by its data, which no format can express."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float().flatten(1)[:, :10] * (2 if x.float().sum() > 0 else 3)


@pytest.mark.parametrize("name", ["onnx", INT8, "exported"])
def test_what_cannot_be_exported_is_one_line_and_no_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(DistilleryError, match="made: 'separable' cannot be exported: ") as caught:
        FORMATS[name].write(Source(Unsupported(), SERVED, blocks(64)), tmp_path / "made")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_calibration_set_that_is_too_small_is_refused(student: Source, tmp_path: Path) -> None:
    with pytest.raises(DistilleryError, match="calibration: expected at least 32 images, got 5"):
        to_onnx_int8(Source(student.network, SERVED, blocks(5)), tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_not_installed_is_named(student: Source, tmp_path: Path) -> None:
    try:
        FORMATS["executorch"].write(student, tmp_path / "made.pte")
    except DistilleryError as error:
        assert "No module named 'executorch'" in str(error)
    else:
        assert (tmp_path / "made.pte").read_bytes()[4:8] == b"ET12"


@pytest.mark.parametrize("name", ["onnx", INT8, "exported"])
def test_a_network_of_25_million_parameters_goes_the_same_way(name: str, tmp_path: Path) -> None:
    """ResNet-50 by its torchvision name, with random weights: the path is not fitted to our student.

    Its blocks add little to what they are given, as in trained networks: else fifty layers blow up any rounding.
    """
    torch.manual_seed(0)
    images = blocks(32, 3, 64)
    network = networks.build("resnet50", channels=3, size=(64, 64), classes=10, mean=[0.5] * 3, std=[0.2] * 3)
    for module in network.modules():
        if isinstance(module, Bottleneck):
            nn.init.constant_(module.bn3.weight, 0.3)
    contract = Contract(network="resnet50", channels=3, height=64, width=64, labels=LABELS)
    path = tmp_path / product("student", name)
    FORMATS[name].write(Source(settled(network, images), contract, images), path)
    found = measure.answers(ENGINES[name].load(path, Setup(contract)), images)
    expected = logits_of(network, images)
    assert (found - expected).square().mean().sqrt() < (0.2 if name == INT8 else 1e-4) * expected.std()
    parameters = sum(p.numel() for p in network.parameters())
    assert parameters > 23e6
    assert path.stat().st_size < parameters * (1.1 if name == INT8 else 4.1)

"""A leaner graph gives the answers of before, and a graph of another form is left as it is."""

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from training.lean import lean

SHAPE = "N", 3, 6, 6
MEAN, STD = [0.2, 0.5, 0.7], [0.1, 0.3, 0.9]


def graph(*, keep: int = 1, group: int = 1, again: int = 0, grid: int = 1) -> onnx.ModelProto:
    """Pixels, normalised, one convolution with a border of zeros, the average of each channel."""
    random = np.random.default_rng(0)
    weights = random.normal(size=(6, 3 // group, 3, 3))
    stored = {"scale": np.float32(255), "w": weights, "b": random.normal(size=6), "axes": np.array([-1, -2])}
    stored |= {"m": np.array(MEAN).reshape(1, 3, 1, 1), "s": np.tile(np.array(STD).reshape(1, 3, 1, 1), (grid, grid))}
    nodes = [
        helper.make_node("Cast", ["pixels"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["x", "scale"], ["scaled"]),
        helper.make_node("Sub", ["scaled", "m"], ["centred"]),
        helper.make_node("Div", ["centred", "s"], ["normal"]),
        helper.make_node("Conv", ["normal", "w", "b"], ["features"], pads=[1, 1, 1, 1], group=group),
        helper.make_node("ReduceMean", ["features", "axes"], ["logits"], keepdims=keep),
    ]
    outputs: dict[str, tuple[str | int, ...]] = {"logits": ("N", 6, 1, 1) if keep else ("N", 6)}
    outputs |= {"normal": SHAPE} if again else {}
    tensors = [
        numpy_helper.from_array(np.asarray(value, np.int64 if name == "axes" else np.float32), name)
        for name, value in stored.items()
    ]
    made = helper.make_graph(
        nodes,
        "made",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, SHAPE)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        tensors,
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def answers(model: onnx.ModelProto) -> NDArray[np.float32]:
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    images = np.random.default_rng(1).integers(0, 256, (4, 3, 6, 6), dtype=np.uint8)
    found: NDArray[np.float32] = session.run(["logits"], {"pixels": images})[0]
    return found


def kinds(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def test_less_is_computed_and_the_same_comes_out() -> None:
    before, after = graph(), graph()
    lean(after)
    np.testing.assert_allclose(answers(after), answers(before), rtol=1e-5, atol=1e-5)
    assert kinds(after) == {"Cast": 1, "Sub": 1, "Conv": 1, "GlobalAveragePool": 1}
    assert {tensor.name for tensor in after.graph.initializer} == {"m", "w", "b"}


@pytest.mark.parametrize("how", [{"group": 3}, {"again": 1}, {"grid": 6}])
def test_a_scale_that_the_weights_cannot_take_stays(how: dict[str, int]) -> None:
    """In groups, weights do not see all channels; what something else reads, or differs by pixel, must stay."""
    before, after = graph(**how), graph(**how)
    lean(after)
    np.testing.assert_allclose(answers(after), answers(before), rtol=1e-5, atol=1e-5)
    assert kinds(after)["Div"] == 2


def test_an_average_without_its_dimensions_stays() -> None:
    model = graph(keep=0)
    lean(model)
    assert answers(model).shape == (4, 6)
    assert kinds(model)["ReduceMean"] == 1

"""An ONNX graph without what it would compute anew for every image, though it is known beforehand."""

from collections import Counter

import numpy as np
import onnx
from onnx import numpy_helper


def lean(model: onnx.ModelProto) -> None:
    """Rewrite the graph of `model` where that changes none of its answers by more than rounding.

    The first convolution's weights scale the pixels. What surrounds an image stays 0, so the mean is still taken from
    each pixel: (x / c − m) / s = (x − c·m) / (c·s). An average over the grid gets the operator of that name, which
    ONNX Runtime computes in the layout of its convolutions.
    """
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    grids = {value.name for value in graph.value_info if len(value.type.tensor_type.shape.dim) == 4}
    for node in list(graph.node):
        if node.op_type == "Conv":
            _scale_weights(graph, node, stored)
        elif node.op_type == "ReduceMean" and node.input[0] in grids and _over_the_grid(node, stored):
            node.op_type = "GlobalAveragePool"
            del node.input[1:], node.attribute[:]
    used = {name for node in graph.node for name in node.input}
    for tensor in stored.values():
        if tensor.name not in used:
            graph.initializer.remove(tensor)


def _scale_weights(graph: onnx.GraphProto, conv: onnx.NodeProto, stored: dict[str, onnx.TensorProto]) -> None:
    """Let a convolution scale what the exporter normalises in front of it, if it does and nothing else reads that."""
    makers = {name: node for node in graph.node for name in node.output}
    chain, name = [], conv.input[0]
    for kind in ("Div", "Sub", "Div"):
        node = makers.get(name)
        if node is None or node.op_type != kind or node.input[1] not in stored:
            return
        chain.append(node)
        name = node.input[0]
    readers = Counter([name for node in graph.node for name in node.input] + [value.name for value in graph.output])
    grouped = any(attribute.name == "group" and attribute.i > 1 for attribute in conv.attribute)
    by_std, minus_mean, by_scale = chain
    own = (*conv.input, minus_mean.input[1], by_std.output[0], minus_mean.output[0], by_scale.output[0])
    std, mean, scale = (numpy_helper.to_array(stored[node.input[1]]) for node in chain)
    by_channel = scale.size == 1 and (std.size == 1 or std.shape[2:] == (1, 1))
    if grouped or not by_channel or conv.input[1] not in stored or any(readers[name] > 1 for name in own):
        return
    weights = numpy_helper.to_array(stored[conv.input[1]]) / (std * scale)
    stored[conv.input[1]].CopyFrom(numpy_helper.from_array(weights.astype(np.float32), conv.input[1]))
    stored[minus_mean.input[1]].CopyFrom(numpy_helper.from_array(mean * scale, minus_mean.input[1]))
    minus_mean.input[0], conv.input[0] = by_scale.input[0], minus_mean.output[0]
    graph.node.remove(by_std)
    graph.node.remove(by_scale)


def _over_the_grid(node: onnx.NodeProto, stored: dict[str, onnx.TensorProto]) -> bool:
    """Whether it averages the last two dimensions and keeps them."""
    kept = all(attribute.i for attribute in node.attribute if attribute.name == "keepdims")
    axes = stored.get(node.input[1]) if len(node.input) > 1 else None
    return kept and axes is not None and {axis % 4 for axis in numpy_helper.to_array(axes).tolist()} == {2, 3}

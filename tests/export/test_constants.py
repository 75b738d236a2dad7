"""What does not depend on the image is computed while tracing; what ONNX cannot express is said in one line."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from dfs_cli.errors import ExportError
from dfs_cli.export.constants import fold_constants
from dfs_cli.export.runtime import open_session
from dfs_cli.export.trace import trace


def model_of(nodes: list[onnx.NodeProto], values: list[onnx.ValueInfoProto] | None = None) -> onnx.ModelProto:
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", [1, 4, 6]), ("y", None))
    ]
    graph = helper.make_graph(nodes, "part", ends[:1], ends[1:], value_info=values)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("dfs", 1)])


def constant(name: str, value: list[int]) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.array(value)))


def test_shapes_and_what_is_computed_from_them_become_initializers() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),  # 1, 4, 6
        constant("first", [1]),
        constant("last", [3]),
        helper.make_node("Slice", ["shape", "first", "last"], ["sizes"]),  # 4, 6
        helper.make_node("Relu", ["x"], ["positive"]),
        helper.make_node("Reshape", ["positive", "sizes"], ["y"]),
    ]
    graph = fold_constants(model_of(nodes))
    assert [node.op_type for node in graph.node] == ["Relu", "Reshape"]
    values = {tensor.name: numpy_helper.to_array(tensor).tolist() for tensor in graph.initializer}
    assert values["sizes"] == [4, 6]


def test_the_shape_of_what_an_opaque_node_returns_is_known() -> None:
    nodes = [
        helper.make_node("Quantized", ["x"], ["z"], domain="dfs"),
        helper.make_node("Relu", ["z"], ["positive"]),
        helper.make_node("Shape", ["positive"], ["shape"]),
        helper.make_node("Reshape", ["x", "shape"], ["y"]),
    ]
    graph = fold_constants(model_of(nodes, [helper.make_tensor_value_info("z", TensorProto.FLOAT, [2, 12])]))
    assert [node.op_type for node in graph.node] == ["Quantized", "Relu", "Reshape"]
    assert [numpy_helper.to_array(tensor).tolist() for tensor in graph.initializer] == [[2, 12]]


class Unknown(nn.Module):
    """Computes what ONNX has no operator for."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.special.bessel_j0(x)
        return y


def test_what_onnx_cannot_express_is_refused_in_one_line() -> None:
    with pytest.raises(ExportError, match="Unknown cannot be written as an ONNX graph") as caught:
        trace(Unknown(), lambda module, x: module(x), torch.zeros(1, 3, 4, 4))
    assert "bessel_j0" in str(caught.value) and "\n" not in str(caught.value)


def test_a_graph_that_onnx_runtime_cannot_run_is_refused_in_one_line() -> None:
    graph = model_of([helper.make_node("Quantized", ["x"], ["y"], domain="dfs")])
    with pytest.raises(ExportError, match="ONNX Runtime cannot run the graph: ") as caught:
        open_session(graph.SerializeToString())
    assert "\n" not in str(caught.value)

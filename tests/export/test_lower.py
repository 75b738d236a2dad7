"""Folding and space to depth, on single layers."""

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from dfs_cli.export.graph import Graph
from dfs_cli.export.runtime import open_session
from dfs_cli.export.space_to_depth import merge_pixels, on_merged_pixels
from dfs_cli.export.trace import QuantizedLayer
from dfs_cli.nn.integers import fold
from dfs_cli.nn.quantization import Convolution


def test_batch_norm_is_folded_on_integers() -> None:
    codes, steps = torch.tensor([3.0, -7.0, 5.0]).reshape(3, 1, 1, 1), torch.tensor([0.5, 0.25, 1e-30])
    gain, shift = torch.tensor([[2.0, -1.0, 1.0], [0.3125, -0.0625, 1.0]], dtype=torch.float64)
    folded = fold(codes, steps, 0.125, 4, gain, shift)
    weight, scale, bias = (t.numpy() for t in (folded.weight, folded.scale, folded.bias))
    # What the integers stand for: factor * scale * codes, and the shift.
    units = scale * 0.125
    np.testing.assert_allclose((weight[:2].reshape(2) * scale[:2]), [3.0, 1.75])
    np.testing.assert_allclose(bias * units, [0.3125, -0.0625, 1.0], rtol=1e-6)
    assert np.abs(weight).max() <= 127 and np.abs(bias).max() <= 2**30 and (scale > 0).all()
    # 0.3125 is two and a half units of 0.125: with twice the codes it is an integer.
    assert weight[0, 0, 0, 0] == 6 and bias[0] == 5


@pytest.mark.parametrize(
    ("channels", "size", "padding", "height", "width"),
    [(3, 7, 3, 32, 20), (3, 3, 1, 8, 8), (1, 5, 2, 10, 6), (4, 4, 1, 12, 8), (3, 2, 0, 6, 6), (3, 7, 0, 16, 16)],
)
def test_a_convolution_on_merged_pixels_computes_the_same(
    channels: int, size: int, padding: int, height: int, width: int
) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (5, channels, size, size)).astype(np.float32)
    geometry = Convolution((2, 2), (padding, padding), (1, 1), 1)
    layer = QuantizedLayer(codes, np.ones(5), 1.0, -127, 127, 8, None, geometry)
    merged = on_merged_pixels(layer, height, width)
    assert merged is not None
    assert merged.geometry is not None
    assert merged.codes.shape[1] == 4 * channels
    x = rng.integers(-127, 128, (1, channels, height, width)).astype(np.float32)
    graph = Graph()
    names = [merge_pixels(graph, "x", channels, height, width), graph.constant(merged.codes, np.float32)]
    graph.add("Conv", names, ["y"], pads=merged.geometry.padding)
    made = helper.make_graph(
        graph.nodes,
        "pixels",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        graph.initializers,
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (y,) = open_session(model.SerializeToString(), threads=1).run(None, {"x": x})
    expected = nn.functional.conv2d(torch.from_numpy(x), torch.from_numpy(codes), None, 2, padding)
    assert np.array_equal(y, expected.numpy())


@pytest.mark.parametrize(
    ("shape", "stride", "dilation", "groups", "height", "fits"),
    [
        ((5, 3, 3, 3), 2, 1, 1, 8, True),
        ((5, 3, 3, 3), 1, 1, 1, 8, False),
        ((5, 3, 3, 3), 2, 2, 1, 8, False),
        ((6, 1, 3, 3), 2, 1, 3, 8, False),
        ((5, 16, 3, 3), 2, 1, 1, 8, False),
        ((5, 3, 3, 3), 2, 1, 1, 7, False),
    ],
    ids=["fits", "stride", "dilation", "groups", "channels", "odd height"],
)
def test_pixels_are_merged_only_for_a_dense_strided_convolution_of_few_channels(
    shape: tuple[int, ...], stride: int, dilation: int, groups: int, height: int, fits: bool
) -> None:
    geometry = Convolution((stride, stride), (1, 1), (dilation, dilation), groups)
    layer = QuantizedLayer(np.ones(shape), np.ones(shape[0]), 1.0, 0, 255, 8, None, geometry)
    assert (on_merged_pixels(layer, height, 8) is not None) == fits


def test_pixels_are_not_merged_for_a_linear_layer() -> None:
    layer = QuantizedLayer(np.ones((5, 3)), np.ones(5), 1.0, 0, 255, 8, None, None)
    assert on_merged_pixels(layer, 8, 8) is None

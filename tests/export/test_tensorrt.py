"""Graphs for TensorRT's importer."""

import numpy as np
import onnx
import pytest
from common import SIZE
from common_export import (
    MODELS,
    TENSORRT_TAKES,
    decisions_of,
    images,
    make_network,
    mixed_bits,
    run_graph,
    static_network,
)
from onnx import numpy_helper

from dfs_cli.cost.decisions import Decisions
from dfs_cli.export.network import LOGITS, export_network, export_static
from dfs_cli.export.part_writer import PartWriter
from dfs_cli.export.parts import Parts
from dfs_cli.nn.network import DynamicResNet

pytestmark = pytest.mark.medium


def check_graph(model: onnx.ModelProto, network: DynamicResNet, decisions: Decisions | None) -> None:
    """Its operators, its integers, and its results."""
    graph = model.graph
    assert {node.op_type for node in graph.node} <= TENSORRT_TAKES
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    quantizers = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert quantizers
    for node in quantizers:
        scale, zero = (values[name] for name in node.input[1:])
        assert zero.dtype == np.int8 and not zero.any() and scale.dtype == np.float32 and (scale > 0).all()
    assert {v.dtype for v in values.values()} <= {np.dtype(t) for t in (np.float32, np.int8, np.int64)}
    forced = None if decisions is None else Decisions.alike(decisions.options[0], 8)
    expected = network.run(images(8), forced).logits.detach().numpy()
    differences = [np.abs(run_graph(model, i)[LOGITS][0] - e).max() for i, e in zip(images(8), expected, strict=True)]
    # Where a value lies between two codes, the last digit of a floating point number decides.
    assert np.median(differences) < 1e-5 and max(differences) < 0.05 * np.abs(expected).max()


def check_option(name: str, option: int, gate: str) -> None:
    network = make_network(MODELS[name](), gate, (0, 4, 7, 8))
    passes = 2 if gate == "probe" else 1
    decisions = decisions_of(network, [option] * len(network.blocks) * passes, passes)
    check_graph(export_static(PartWriter(Parts(network, SIZE), tensorrt=True), decisions), network, decisions)


@pytest.mark.parametrize(("option", "gate"), [(1, "rnn"), (3, "probe")])
def test_a_graph_for_tensorrt_has_signed_codes_with_zero_points_of_0(option: int, gate: str) -> None:
    check_option("Bottleneck", option, gate)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("option", "gate"), [(1, "rnn"), (3, "rnn"), (3, "probe")])
def test_every_family_has_a_graph_for_tensorrt(name: str, option: int, gate: str) -> None:
    check_option(name, option, gate)


def test_a_static_network_has_a_graph_for_tensorrt() -> None:
    network = static_network(MODELS["BasicBlock"](), mixed_bits)
    check_graph(export_network(PartWriter(Parts(network, SIZE), tensorrt=True)), network, None)

"""Graphs of networks whose layers were equalised."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from common import SIZE, preactivated_resnet, tiny_resnet
from common_export import (
    TENSORRT_TAKES,
    decisions_of,
    gated_network,
    images,
    mixed_bits,
    part_writer,
    run_graph,
    static_network,
    subgraphs,
)
from hostile import hostile
from timm.models.resnet import Bottleneck
from torch import nn

from dfs_cli.cost.decisions import Decisions
from dfs_cli.export.check import compare
from dfs_cli.export.network import LOGITS, export_network, export_static
from dfs_cli.export.part_writer import PartWriter
from dfs_cli.export.parts import Parts
from dfs_cli.export.write import random_batches
from dfs_cli.nn.layers import FractionalLayer
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.surgery.equalise import equalise, input_gains
from dfs_cli.surgery.initialise import fit_steps

pytestmark = pytest.mark.medium


def hostile_bottlenecks() -> nn.Module:
    # The deep stem has three convolutions, the last of which the stream begins with.
    return hostile(tiny_resnet(Bottleneck), "dead channels", "peaks", "scaled branches", "scaled stream")


def refitted(network: DynamicResNet, kinds: tuple[str, ...] = ("",)) -> DynamicResNet:
    """``network`` with a gain in every quantized layer behind the stem whose name ends with one of ``kinds``."""
    layers = {name: m for name, m in network.backbone.named_modules() if isinstance(m, FractionalLayer)}
    names = [name for name in layers if layers[name].bitwidths and not name.startswith(("conv1", "stem"))]
    names = [name for name in names if name.endswith(kinds)]
    gains = input_gains(network, names, images(16))
    assert len({float(g) for gain in gains.values() for g in gain}) > 4
    equalise(network, gains)
    fit_steps(network, images(16))
    return network


def gains_in(graph: onnx.GraphProto) -> int:
    """How often a graph and its branches multiply by powers of two that are not all the same."""
    count = 0
    for part in (graph, *subgraphs(graph)):
        values = {t.name: onnx.numpy_helper.to_array(t) for t in part.initializer}
        for node in part.node:
            factor = values.get(node.input[1]) if node.op_type == "Mul" else None
            if factor is not None and factor.size > 1 and len(np.unique(factor)) > 1:
                count += bool((np.frexp(factor)[0] == 0.5).all())
    return count


def logits_of(model: onnx.ModelProto, count: int = 8) -> np.ndarray:
    return np.concatenate([run_graph(model, image)[LOGITS] for image in images(count)])


def assert_same(actual: np.ndarray, network: DynamicResNet, decisions: Decisions | None = None) -> None:
    forced = None if decisions is None else Decisions.alike(decisions.options[0], len(actual))
    expected = network.run(images(len(actual)), forced).logits.detach().numpy()
    difference = np.abs(actual - expected).max(axis=1) / np.abs(expected).max()
    # Where a value lies between two codes, the last digit of a floating point number decides.
    assert np.median(difference) < 1e-4 and difference.max() < 0.05


@pytest.mark.parametrize("make", [hostile_bottlenecks, preactivated_resnet])
def test_a_dynamic_graph_computes_what_the_network_does(make: Callable[[], nn.Module]) -> None:
    network = refitted(gated_network(make(), bits=(0, 4, 8)))
    model = export_network(part_writer(network))
    onnx.checker.check_model(model)
    comparison = compare(model.SerializeToString(), network, random_batches(SIZE, 40), labelled=False)
    assert comparison.same_decisions >= 0.95 and comparison.logit_difference < 0.05


def test_every_option_computes_what_it_does_in_the_network() -> None:
    network = refitted(gated_network(hostile_bottlenecks(), bits=(0, 4, 8, 16, 32)))
    writer = part_writer(network)
    for option in range(len(network.bits)):
        decisions = decisions_of(network, [option] * len(network.blocks))
        assert_same(logits_of(export_static(writer, decisions)), network, decisions)


def test_inside_a_block_a_gain_costs_nothing() -> None:
    network = refitted(static_network(tiny_resnet(Bottleneck), lambda block, layer: 8))
    model = export_network(part_writer(network))
    assert_same(logits_of(model), network)
    names = [name for name, m in network.backbone.named_modules() if getattr(m, "input_gain", None) is not None]
    outside = [name for name in names if not name.endswith(("conv2", "conv3"))]
    assert gains_in(model.graph) == len(outside) < len(names)


def test_a_graph_for_tensorrt_computes_what_the_network_does() -> None:
    network = refitted(static_network(hostile_bottlenecks(), mixed_bits))
    model = export_network(PartWriter(Parts(network, SIZE), tensorrt=True))
    assert {node.op_type for node in model.graph.node} <= TENSORRT_TAKES
    assert_same(logits_of(model), network)


@pytest.mark.parametrize(("inside", "features"), [(True, "int8"), (False, "float")])
def test_blocks_hand_on_bytes_unless_their_inputs_have_gains(inside: bool, features: str) -> None:
    network = static_network(hostile(tiny_resnet(Bottleneck), "scaled branches"), lambda block, layer: 8)
    network = refitted(network, ("conv2", "conv3") if inside else ("conv1", "conv2", "conv3"))
    writer = part_writer(network)
    assert writer.features == features
    assert_same(logits_of(export_network(writer)), network)

"""Networks and graphs that the tests of the export share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import numpy as np
import onnx
import torch
from common import SIZE, make_dynamic, preactivated_resnet, se_resnet, spread_gate, tiny_resnet
from onnx import TensorProto, helper
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from dfs_cli.config import DynamicConfig
from dfs_cli.control.base import controller_of
from dfs_cli.control.gates import Gate, summarise
from dfs_cli.control.probe import ProbeController
from dfs_cli.cost.decisions import Decisions
from dfs_cli.export.graph import IR_VERSION, Graph
from dfs_cli.export.network import IMAGES
from dfs_cli.export.part_writer import PartWriter
from dfs_cli.export.parts import Key, Parts
from dfs_cli.export.runtime import open_session
from dfs_cli.export.trace import OPSET
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.nn.passes import uncertainty
from dfs_cli.surgery.plan import plan_costs

MODELS: dict[str, Callable[[], nn.Module]] = {
    "BasicBlock": lambda: tiny_resnet(BasicBlock),
    "Bottleneck": lambda: tiny_resnet(Bottleneck),
    "squeeze and excitation": se_resnet,
    "preactivation": preactivated_resnet,
}


TENSORRT_TAKES = {
    "Add", "AveragePool", "BatchNormalization", "Cast", "Clip", "Concat", "Conv", "DequantizeLinear", "Div", "Erf",
    "Expand", "Flatten", "Gemm", "GlobalAveragePool", "GlobalMaxPool", "HardSwish", "Identity",
    "InstanceNormalization", "LeakyRelu", "Max", "MaxPool", "Mul", "Pad", "QuantizeLinear", "ReduceMax", "ReduceMean",
    "ReduceSum", "Relu", "Reshape", "Sigmoid", "Slice", "Softmax", "Split", "Sqrt", "Sub", "Transpose", "Unsqueeze",
}  # fmt: skip
"""Of the operators of its importer's list (docs/operators.md of onnx-tensorrt), those that a ResNet may need."""


def images(count: int, size: tuple[int, int, int] = SIZE) -> Tensor:
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(1))


def gated_network(
    model: nn.Module, gate: str = "rnn", bits: tuple[int, ...] = (0, 4, 8), size: tuple[int, int, int] = SIZE
) -> DynamicResNet:
    """A network with a gate before every block, whose decisions depend on the image."""
    network = make_dynamic(model, DynamicConfig(bits=bits, gate=gate), size)  # type: ignore[arg-type]
    spread_gate(network, 1.0)
    # Where a gate's state is closed its scores are equal, and the last digit would decide: a preference does.
    preference = cast(Gate, controller_of(network).get_submodule("gate")).preference
    nn.init.normal_(preference, std=0.1, generator=torch.Generator().manual_seed(1))
    return network


def probe_network(
    model: nn.Module,
    bits: tuple[int, ...] = (0, 4, 8),
    mirror: bool = False,
    size: tuple[int, int, int] = SIZE,
    first_view: float | None = None,
    alike: bool = False,
) -> DynamicResNet:
    """A network of two passes; half of 40 images take the second one."""
    config = DynamicConfig(bits=bits, gate="probe", mirror=mirror, first_view=first_view, alike=alike)
    network = make_dynamic(model, config, size)
    controller = controller_of(network)
    assert isinstance(controller, ProbeController)
    options = torch.arange(len(network.blocks))
    controller.policy.copy_(options % len(bits))
    controller.second_policy.copy_((options + 1) % len(bits))
    with torch.no_grad():
        logits, features = network.follow(images(40, size), controller.policy.expand(40, -1), view=controller.views[0])
        if controller.gate is not None:
            spread_gate(network, 4.0)
            controller.gate.normalise_input(summarise(logits, features))
        controller.operating_point = float(uncertainty(logits).median())
    return network


def make_network(
    model: nn.Module, gate: str, bits: tuple[int, ...] = (0, 4, 8), size: tuple[int, int, int] = SIZE
) -> DynamicResNet:
    """A network whose decisions depend on the image; the second pass, where there is one, is mirrored."""
    if gate == "probe":
        return probe_network(model, bits, mirror=True, size=size)
    return gated_network(model, gate, bits, size)


def static_network(
    model: nn.Module,
    choose: Callable[[int, int], int],
    bits: tuple[int, ...] = (0, 4, 8),
    size: tuple[int, int, int] = SIZE,
    mirror: bool = False,
) -> DynamicResNet:
    """A static network.

    Args:
        choose: from a block's index and a layer's index in the block to the layer's bitwidth.
    """
    config = DynamicConfig(bits=bits, gate="static", mirror=mirror)
    table = plan_costs(model, config, size)
    seen = [0] * len(table.blocks)
    chosen = {}
    for layer in table.layers:
        if layer.block is not None:
            chosen[layer.name] = choose(layer.block, seen[layer.block])
            seen[layer.block] += 1
    return make_dynamic(model, config, size, table=table.with_layer_bits(chosen))


def mixed_bits(block: int, layer: int) -> int:
    """Skips the second block; in the others, 8 bits for even layers and 4 for odd ones, or the other way round."""
    return 0 if block == 1 else (8, 4)[(block + layer) % 2]


def decisions_of(network: DynamicResNet, policy: Sequence[int], passes: int = 1) -> Decisions:
    """Decisions for one image."""
    return Decisions(torch.tensor(policy).reshape(1, passes, len(network.blocks)))


def part_writer(network: DynamicResNet) -> PartWriter:
    """Writes ``network``."""
    return PartWriter(Parts(network, SIZE))


def run_graph(model: onnx.ModelProto, image: Tensor, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    """The outputs for one image (C, H, W), by name."""
    session = open_session(model.SerializeToString(), threads=1)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {IMAGES: image[None].numpy(), **inputs}), strict=True))


def run_batch(
    model: onnx.ModelProto, shown: Tensor, sizes: Sequence[int], **inputs: np.ndarray
) -> dict[str, np.ndarray]:
    """The outputs for images (N, C, H, W), by name, divided into batches of ``sizes``."""
    session = open_session(model.SerializeToString(), threads=1)
    names = [output.name for output in session.get_outputs()]
    results = [session.run(names, {IMAGES: part.numpy(), **inputs}) for part in shown.split(list(sizes))]
    return dict(zip(names, map(np.concatenate, zip(*results, strict=True)), strict=True))


def subgraphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The branches of all ``If`` nodes, nested ones included."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield attribute.g
                yield from subgraphs(attribute.g)


def parts_with_other_codes(network: DynamicResNet, size: tuple[int, int, int] = SIZE) -> dict[Key, float]:
    """The share of codes in which the graph of each part, on its own, differs from the network; without those that do not."""
    writer = PartWriter(Parts(network, size))
    assert writer.features == "int8"
    found: dict[Key, float] = {}
    with torch.inference_mode():
        shown = images(32, size)  # enough that a single value between two codes, which many others follow, is few
        x = network.stem(shown)
        found["stem"] = float((run_part(writer, "stem", shown) != x.numpy()).mean())
        for block in range(len(network.blocks)):
            for option in range(len(network.bits)):
                expected = network.run_block(block, x.clone(), option).numpy()
                found[block, option] = float((run_part(writer, (block, option), x) != expected).mean())
            x = network.run_block(block, x, option=2)
    return {key: share for key, share in found.items() if share}


def run_part(writer: PartWriter, key: Key, x: Tensor) -> np.ndarray:
    """What a part on its own makes of each of ``x`` (N, ...); its graph may take and give bytes."""
    features = writer.parts.network.features if writer.features == "int8" else None
    if isinstance(key, str):
        first = last = 0 if key == "stem" else len(writer.parts.network.blocks)
    else:
        first, last = key[0], key[0] + 1
    given, rounds = x.numpy(), None
    if features is not None and key != "stem":
        codes = (x / (source := features.at(first)).step()).round() - source.limits()[0]
        given = np.ascontiguousarray(codes.numpy().astype(np.uint8).transpose(0, 2, 3, 1))
    if features is not None and key != "head":
        rounds = features.at(last)
    graph = Graph()
    graph.add("Identity", [writer.write(graph, key, "x")], ["y"])
    kinds = [TensorProto.FLOAT if given.dtype == np.float32 else TensorProto.UINT8]
    kinds.append(TensorProto.FLOAT if rounds is None else TensorProto.UINT8)
    infos = [
        helper.make_tensor_value_info(name, kind, shape)
        for name, kind, shape in zip("xy", kinds, ([1, *given.shape[1:]], None), strict=True)
    ]
    made = helper.make_graph(graph.nodes, "part", infos[:1], infos[1:], graph.initializers)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    session = open_session(model.SerializeToString(), threads=1)
    y: np.ndarray = np.concatenate([session.run(None, {"x": item[None]})[0] for item in given])
    if rounds is None:
        return y
    codes = torch.from_numpy(y.transpose(0, 3, 1, 2)).float() + rounds.limits()[0]
    restored: np.ndarray = (codes * rounds.step().detach()).numpy()
    return restored

"""A dynamic network as one ONNX graph for one image, with an ``If`` for every decision."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from dfs_cli import __version__
from dfs_cli.export.bytes import ByteLowering, ByteScales, Key, is_identity, measure_scales, pool_codes
from dfs_cli.export.gates import GateWriter, Pooled, look_up_bits, write_doubt, write_refine_gate
from dfs_cli.export.graph import Graph, Test
from dfs_cli.export.layers import OPSET, Traced, trace
from dfs_cli.export.lower import Lowering
from dfs_cli.export.portable import PortableLowering
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.nn.probe import ProbedResNet

IMAGES, OPERATING_POINT, LOGITS, BITS = "images", "operating_point", "logits", "bits"
NOT_RUN = -1

_IR_VERSION = 8

Decide = Callable[[Graph, int, Pooled | None], Test]


class Parts:
    """The parts of a network, traced when they are first needed.

    Args:
        network: in evaluation mode, on the CPU.
        input_size: (C, H, W) of the images.
        samples: images (N, C, H, W) to set the scales from with which blocks hand on bytes, where they can; see
            :mod:`dfs_cli.export.bytes`. None: floating point.
        portable: for runtimes whose importers take less, see :mod:`dfs_cli.export.portable`; without ``samples``.
    """

    def __init__(
        self,
        network: DynamicResNet,
        input_size: tuple[int, int, int],
        samples: np.ndarray | None = None,
        portable: bool = False,
    ) -> None:
        self.network, self.input_size = network, input_size
        self.lowering = PortableLowering if portable else Lowering
        self.stem, x = trace(network.backbone, network.layout.stem, torch.zeros(1, *input_size))
        self.inputs: list[Tensor] = []
        for block in network.blocks:
            self.inputs.append(x)
            with torch.no_grad():
                x = block.skip(block.module, x)
        self.head, logits = trace(network.backbone, network.layout.head, x)
        self.classes = logits.shape[1]
        self.last = x
        self.option = cache(self._option)
        self.scales: ByteScales | None = None if samples is None else measure_scales(self, samples)

    @property
    def features(self) -> str:
        """What blocks hand on: ``bytes`` or ``floats``."""
        return "floats" if self.scales is None else "bytes"

    def part(self, key: Key) -> Traced:
        """``stem``, ``head``, or a block (index) with one of its options (index)."""
        return self.option(*key) if isinstance(key, tuple) else self.stem if key == "stem" else self.head

    def write(self, graph: Graph, key: Key, x: str) -> str:
        """Add a part to ``graph``; returns its output."""
        if isinstance(key, tuple) and self.keeps_input(*key):
            return x
        if self.scales is None:
            return self.lowering(graph, self.part(key), x).run()
        return ByteLowering(graph, self.part(key), x, self.scales.ranges.get(key, {}), *self.scales.edges(key)).run()

    def pool(self, graph: Graph, block: int, x: str) -> Pooled:
        """The mean over the pixels of ``x``, the input of a block, or of the head where ``block`` is their number."""
        if self.scales is None:
            mean = graph.add("ReduceMean", [x], axes=[2, 3], keepdims=0)
            mean = graph.add("Unsqueeze", [mean, graph.constant([0], np.int64)])
        else:
            mean = pool_codes(graph, x, *self._features(block).shape[1:])
        return Pooled(mean, self.mean_scale(block))

    def mean_scale(self, block: int) -> float:
        """What :meth:`pool` scales by."""
        return 1.0 if self.scales is None else self.scales.streams[block] / self._features(block)[0, 0].numel()

    def _features(self, block: int) -> Tensor:
        return (*self.inputs, self.last)[block]

    def keeps_input(self, block: int, option: int) -> bool:
        """Whether an option of a block hands on what it got."""
        edges = (None, None) if self.scales is None else self.scales.edges((block, option))
        return edges[0] == edges[1] and is_identity(self.option(block, option))

    def _option(self, block: int, option: int) -> Traced:
        part, x = self.network.blocks[block], self.inputs[block]
        if (bits := self.network.config.bits[option]) == 0:
            return trace(part.module, part.skip, x)[0]
        with part.precision.at(bits):
            return trace(part.module, lambda module, x: module(x), x)[0]


def export_dynamic(parts: Parts) -> onnx.ModelProto:
    """The network with its gate. Inputs ``images`` (1, C, H, W) and, optional, ``operating_point``, a double; outputs
    ``logits`` (1, classes) and ``bits`` (1, P * L), the bitwidths chosen, pass after pass; -1: the pass was not run.
    """
    graph, network, point = Graph(), parts.network, OPERATING_POINT
    graph.initializers.append(helper.make_tensor(point, TensorProto.DOUBLE, [], [network.operating_point]))
    if isinstance(network, ProbedResNet):
        logits, bits = _two_passes(graph, parts, network, point)
    else:
        logits, bits = _one_pass(graph, parts, network, point)
    inputs = [helper.make_tensor_value_info(point, TensorProto.DOUBLE, [])]
    passes = 2 if isinstance(network, ProbedResNet) else 1
    shape = [1, passes * len(network.blocks)]
    graph.add("Identity", [bits], [BITS])
    outputs = [helper.make_tensor_value_info(BITS, TensorProto.INT64, shape)]
    return finish(graph, logits, parts.classes, parts.input_size, inputs, outputs)


def export_static(parts: Parts, policy: Sequence[int]) -> onnx.ModelProto:
    """The network with the same decisions for every image, without control flow; output ``logits``.

    Args:
        policy: option indices (P * L,), as in :class:`dfs_cli.nn.network.Output`.
    """
    graph, network = Graph(), parts.network
    blocks = len(network.blocks)
    logits, _ = _straight(graph, parts, IMAGES, policy[:blocks])
    if len(policy) > blocks and policy[blocks] >= 0:
        assert isinstance(network, ProbedResNet)
        second, _ = _straight(graph, parts, _view(graph, network), policy[blocks:])
        logits = _add_evidence(graph, network, logits, second)
    bits = [NOT_RUN if option < 0 else network.config.bits[option] for option in policy]
    return finish(graph, logits, parts.classes, parts.input_size, metadata={"policy": json.dumps(bits)})


def _straight(graph: Graph, parts: Parts, images: str, policy: Sequence[int]) -> tuple[str, str]:
    """One pass with fixed options; returns logits and the features before the head."""
    x = parts.write(graph, "stem", images)
    for block, option in enumerate(policy):
        x = parts.write(graph, (block, int(option)), x)
    return parts.write(graph, "head", x), x


def _gated(graph: Graph, parts: Parts, images: str, decide: Decide, pools: bool) -> str:
    """One pass with an ``If`` for every decision; returns the logits.

    Args:
        decide: from the graph, a block's index and the mean of its input to the test for options, see :meth:`Graph.choose`.
        pools: whether ``decide`` needs the mean; else it gets None.
    """
    x = parts.write(graph, "stem", images)
    pooled = parts.pool(graph, 0, x) if pools else None
    options, last = range(len(parts.network.config.bits)), len(parts.network.blocks) - 1
    for block in range(last + 1):
        is_chosen = decide(graph, block, pooled)
        mean = "" if pooled is None else pooled.name

        def run(inner: Graph, option: int, block: int = block, x: str = x, mean: str = mean) -> list[str]:
            y = parts.write(inner, (block, option), x)
            if not pools or block == last:
                return [y]
            # A block that hands on its input hands on the mean of it, too.
            return [y, mean if parts.keeps_input(block, option) else parts.pool(inner, block + 1, y).name]

        branches = [lambda inner, option=option, run=run: run(inner, option) for option in options]
        x, *means = graph.choose(is_chosen, branches)
        pooled = Pooled(means[0], parts.mean_scale(block + 1)) if means else None
    return parts.write(graph, "head", x)


def _one_pass(graph: Graph, parts: Parts, network: DynamicResNet, point: str) -> tuple[str, str]:
    writer = GateWriter(graph, network.gate, network.prices.cpu().numpy(), point)
    state = writer.start(graph)
    chosen: list[str] = []

    def decide(inner: Graph, block: int, pooled: Pooled | None) -> Test:
        nonlocal state
        assert pooled is not None
        decision, state = writer.write(inner, block, pooled, state)
        chosen.append(decision)
        return writer.test(decision)

    logits = _gated(graph, parts, IMAGES, decide, pools=True)
    return logits, writer.write_bits(graph, chosen, network.config.bits)


def _two_passes(graph: Graph, parts: Parts, network: ProbedResNet, point: str) -> tuple[str, str]:
    blocks = len(network.blocks)
    first, features = _straight(graph, parts, IMAGES, network.policy.tolist())
    doubt, margin = write_doubt(graph, first, parts.classes)
    is_unsure = graph.add("Squeeze", [graph.add("Greater", [doubt, point])])

    def look_again(inner: Graph) -> list[str]:
        charge = network.price * network.prices.cpu().numpy()
        pooled = parts.pool(inner, blocks, features)
        choice = write_refine_gate(inner, network.gate, charge, doubt, margin, pooled)

        def decide(graph: Graph, block: int, _: Pooled | None) -> Test:
            return graph.equals(graph.add("Gather", [choice, graph.constant(block, np.int64)]))

        second = _gated(inner, parts, _view(inner, network), decide, pools=False)
        row = inner.add("Reshape", [choice, inner.constant([1, blocks], np.int64)])
        return [_add_evidence(inner, network, first, second), look_up_bits(inner, network.config.bits, row)]

    def leave(inner: Graph) -> list[str]:
        return [first, inner.constant(np.full((1, blocks), NOT_RUN, np.int64))]

    logits, second_bits = graph.branch(is_unsure, look_again, leave)
    first_bits = [[network.config.bits[option] for option in network.policy.tolist()]]
    return logits, graph.add("Concat", [graph.constant(first_bits, np.int64), second_bits], axis=1)


def _view(graph: Graph, network: ProbedResNet) -> str:
    """What the second pass sees: the images, mirrored along W where the network was tuned so."""
    if not network.config.mirror:
        return IMAGES
    numbers = [graph.constant([i], np.int64) for i in (-1, np.iinfo(np.int64).min, 3)]
    return graph.add("Slice", [IMAGES, *numbers, numbers[0]])


def _add_evidence(graph: Graph, network: ProbedResNet, first: str, second: str) -> str:
    weights = network.evidence.detach().cpu().numpy()
    parts = [graph.add("Mul", [graph.constant(w), logits]) for w, logits in zip(weights, (first, second), strict=True)]
    return graph.add("Add", parts)


def finish(
    graph: Graph,
    logits: str,
    classes: int,
    input_size: tuple[int, int, int],
    inputs: Sequence[onnx.ValueInfoProto] = (),
    outputs: Sequence[onnx.ValueInfoProto] = (),
    metadata: dict[str, str] | None = None,
) -> onnx.ModelProto:
    """The model that ``graph`` is, with ``images`` for its input and ``logits`` for its output, besides others."""
    graph.add("Identity", [logits], [LOGITS])
    made = helper.make_graph(
        graph.nodes,
        "dfs",
        [helper.make_tensor_value_info(IMAGES, TensorProto.FLOAT, [1, *input_size]), *inputs],
        [helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, [1, classes]), *outputs],
        graph.initializers,
    )
    model = helper.make_model(
        made,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=_IR_VERSION,
        producer_name="dfs",
        producer_version=__version__,
    )
    helper.set_model_props(model, metadata or {})
    return model

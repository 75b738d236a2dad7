"""A network as one ONNX graph, for one image or several: with an ``If`` for every decision, or plain where there is none."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import onnx
from onnx import TensorProto, helper

from dfs_cli import __version__
from dfs_cli.control.base import controller_of
from dfs_cli.cost.decisions import Decisions
from dfs_cli.export.controllers import writer_of
from dfs_cli.export.graph import IR_VERSION, Graph
from dfs_cli.export.part_writer import PartWriter
from dfs_cli.export.trace import OPSET
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.presets import BatchSize

IMAGES, OPERATING_POINT, LIMIT, LOGITS, BITS = "images", "operating_point", "limit", "logits", "bits"
"""Names of inputs and outputs."""


def export_network(writer: PartWriter) -> onnx.ModelProto:
    """The network with its controller.

    Inputs are ``images`` (N, C, H, W) and, optional, the doubles ``operating_point`` and, where the network has a limit,
    ``limit``. Outputs are ``logits`` (N, classes) and ``bits`` (N, P * L), the bitwidths that were chosen, pass after pass, -1
    where a pass was not run.

    N is the writer's: 1, another number, or any.

    A static network decides nothing: its graph is the one that :func:`export_static` describes.
    """
    graph, network = Graph(), writer.network
    controller = controller_of(network)
    controller_writer = writer_of(controller)
    if controller_writer.decisions is not None:
        return export_static(writer, controller_writer.decisions)
    is_limited = controller.limit < math.inf
    logits, bits = controller_writer.decide(graph, writer, IMAGES, OPERATING_POINT, LIMIT if is_limited else None)
    optional = {OPERATING_POINT: controller.operating_point} | ({LIMIT: controller.limit} if is_limited else {})
    for name, value in optional.items():
        graph.initializers.append(helper.make_tensor(name, TensorProto.DOUBLE, [], [value]))
    graph.add("Identity", [bits], [BITS])
    parts, chosen = writer.parts, len(controller.views) * len(network.blocks)
    return finish(
        graph,
        logits,
        parts.classes,
        parts.input_size,
        parts.batch,
        [helper.make_tensor_value_info(name, TensorProto.DOUBLE, []) for name in optional],
        [helper.make_tensor_value_info(BITS, TensorProto.INT64, [dimension(parts.batch), chosen])],
    )


def export_static(writer: PartWriter, decisions: Decisions) -> onnx.ModelProto:
    """The network with the same ``decisions`` (for one image) for every image: a plain graph, without control flow.

    Input ``images`` (N, C, H, W), output ``logits`` (N, classes); the metadata's ``policy`` holds the bitwidths (P * L).
    """
    graph = Graph()
    logits = writer_of(controller_of(writer.network)).follow(graph, writer, IMAGES, decisions)
    policy = decisions.bits(writer.network.bits)[0].tolist()
    metadata = {"policy": json.dumps(policy)}
    parts = writer.parts
    return finish(graph, logits, parts.classes, parts.input_size, parts.batch, metadata=metadata)


def fixed_decisions(network: DynamicResNet) -> Decisions | None:
    """The decisions, for one image, of a static network; None: they depend on the image."""
    return writer_of(controller_of(network)).decisions


def dimension(batch: BatchSize) -> int | str:
    """The first axis of images and results: a number, or a name."""
    return batch if isinstance(batch, int) else "N"


def finish(
    graph: Graph,
    logits: str,
    classes: int,
    input_size: tuple[int, int, int],
    batch: BatchSize = 1,
    inputs: Sequence[onnx.ValueInfoProto] = (),
    outputs: Sequence[onnx.ValueInfoProto] = (),
    metadata: dict[str, str] | None = None,
) -> onnx.ModelProto:
    """A model of ``graph`` with the input ``images`` and the output ``logits``.

    Args:
        logits: their name in the graph.
        input_size: (C, H, W).
        batch: how many images it takes at once.
        inputs, outputs: further ones.
    """
    graph.add("Identity", [logits], [LOGITS])
    made = helper.make_graph(
        graph.nodes,
        "dfs",
        [helper.make_tensor_value_info(IMAGES, TensorProto.FLOAT, [dimension(batch), *input_size]), *inputs],
        [helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, [dimension(batch), classes]), *outputs],
        graph.initializers,
    )
    model = helper.make_model(
        made,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="dfs",
        producer_version=__version__,
    )
    helper.set_model_props(model, metadata or {})
    return model

"""The scales of int8 features, from sample images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto, helper

from dfs_cli.export.graph import IR_VERSION, Graph
from dfs_cli.export.lower import Lowering
from dfs_cli.export.parts import Key, Parts
from dfs_cli.export.runtime import open_session
from dfs_cli.export.trace import DOMAIN, OPSET, Traced
from dfs_cli.nn.quantization import BYTE_BITS

LARGEST_CODE = 255
"""Of the unsigned 8-bit codes that features are stored as."""

LEAST_RANGE = 1e-6
"""A range is at least so large: a scale must not be zero."""

Ranges = Mapping[str, tuple[float, float]]
"""The smallest and the largest value of a traced part's intermediate results, by traced name."""


@dataclass(frozen=True)
class FeatureScales:
    """The scales of the features between blocks, and the ranges of what blocks compute.

    Args:
        streams: L + 1 scales, of the codes that enter each block and the head.
        ranges: by part, the ranges of its intermediate results.
    """

    streams: tuple[float, ...]
    ranges: Mapping[Key, Ranges]

    def of_part(self, key: Key) -> tuple[float | None, float | None]:
        """The scales of a part's input and output; None: floating point."""
        if isinstance(key, tuple):
            return self.streams[key[0]], self.streams[key[0] + 1]
        return (None, self.streams[0]) if key == "stem" else (self.streams[-1], None)


def measure_scales(parts: Parts, options: Sequence[Sequence[int]], images: np.ndarray) -> FeatureScales | None:
    """Measure the scales on ``images`` (N, C, H, W).

    Args:
        options: for each of the L blocks, the options that the graph can run, ascending. No other option is traced.

    Returns:
        None where features cannot be int8: a layer runs at more than 8 bits, or a block's output has negative values.
    """
    bits = {parts.network.fixed.bits}
    for block, choices in enumerate(options):
        bits.update(*(parts.layer_bits(block, option) for option in choices))
    if max(bits) > BYTE_BITS:
        return None
    ranges: dict[Key, Ranges] = {}
    ranges["stem"], samples = _observe(parts.part("stem"), images)
    largest = [_largest([samples])]
    for block, choices in enumerate(options):
        outputs = []
        for option in choices:
            ranges[block, option], output = _observe(parts.part((block, option)), samples)
            outputs.append(output)
        if min(float(values.min()) for values in (samples, *outputs)) < 0:
            return None
        largest.append(_largest(outputs))
        samples = outputs[-1]
    linked = [any(parts.is_identity(block, option) for option in choices) for block, choices in enumerate(options)]
    return FeatureScales(tuple(value / LARGEST_CODE for value in _shared(largest, linked)), ranges)


def _shared(largest: Sequence[float], linked: Sequence[bool]) -> list[float]:
    """The largest values (L + 1) before and after each block, equal around blocks that may hand on their input."""
    shared = list(largest)
    for i, is_linked in enumerate(linked):
        if is_linked:
            shared[i + 1] = max(shared[i : i + 2])
    for i in reversed(range(len(linked))):
        if linked[i]:
            shared[i] = shared[i + 1]
    return shared


def _largest(samples: list[np.ndarray]) -> float:
    return max([LEAST_RANGE, *(float(values.max()) for values in samples)])


def _observe(traced: Traced, images: np.ndarray) -> tuple[Ranges, np.ndarray]:
    """Ranges of the intermediate results of a part for ``images`` (N, C, H, W), and its output (N, C', H', W')."""
    graph = Graph()
    lowering = Lowering(graph, traced, "x")
    result = lowering.run()
    kinds = ("BatchNormalization", "Relu")
    named = {
        node.output[0]: lowering.names[node.output[0]]
        for node in traced.graph.node
        if (node.op_type in kinds or node.domain == DOMAIN) and node.output[0] in lowering.names
    }
    graph.add("Identity", [result], ["y"])
    wanted = ["y", *dict.fromkeys(named.values())]
    shape = [1, *images.shape[1:]]
    made = helper.make_graph(
        graph.nodes,
        "part",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in wanted],
        graph.initializers,
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    session = open_session(model.SerializeToString())
    results = [session.run(wanted, {"x": image[None]}) for image in images]
    columns = dict(zip(wanted, zip(*results, strict=True), strict=True))
    ranges = {
        traced_name: (min(float(v.min()) for v in columns[name]), max(float(v.max()) for v in columns[name]))
        for traced_name, name in named.items()
    }
    return ranges, np.concatenate(columns["y"])

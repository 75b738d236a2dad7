"""Pooling of codes: features are rounded before the maximum is taken, not after."""

from __future__ import annotations

import onnx


def round_before_pooling(graph: onnx.GraphProto, rounded: str) -> onnx.GraphProto:
    """``graph`` with nodes of the type ``rounded`` moved, in place, before the maximum pooling whose result they alone read.

    The largest code is that of the largest value, and the convolution before the pooling can give codes.
    """
    nodes = list(graph.node)
    for place, pool in enumerate(nodes):
        readers = [node for node in nodes if pool.output[0] in node.input]
        if pool.op_type != "MaxPool" or [node.op_type for node in readers] != [rounded]:
            continue
        (node,) = readers
        before, between, after = pool.input[0], pool.output[0], node.output[0]
        node.input[0], node.output[0] = before, between
        pool.input[0], pool.output[0] = between, after
        nodes.remove(node)
        nodes.insert(place, node)
        ordered = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(ordered)
        break
    return graph

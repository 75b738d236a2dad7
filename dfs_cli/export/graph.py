"""A small builder of ONNX graphs with subgraphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

IR_VERSION = 8
"""Of the ONNX file format."""

_SMALL = 64  # bytes

Branch = Callable[["Graph"], Sequence[str]]
"""Adds its nodes to the graph it is given, and returns the names of its outputs."""

Test = Callable[["Graph", int], str]
"""From the graph and a branch's number to the name of a boolean: whether a branch before that one is chosen."""


class Graph:
    """Nodes and initializers under construction; names are unique in the graph and its subgraphs together.

    Args:
        parent: the graph of which this one is a subgraph; None: it is the outermost one.
    """

    def __init__(self, parent: Graph | None = None) -> None:
        self._parent = parent
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._count: list[int] = [0] if parent is None else parent._count
        self._constants: dict[tuple[Any, ...], str] = {}

    def name(self, stem: str) -> str:
        """A new name that begins with ``stem``."""
        self._count[0] += 1
        return f"{stem}_{self._count[0]}"

    def constant(self, value: Any, dtype: Any = None) -> str:
        """The name of an initializer. Equal large ones are stored once here and in the graphs around, small ones in each."""
        array = np.asarray(value, dtype=dtype)
        is_large, content = array.nbytes > _SMALL, array.tobytes()
        # The digest of a large one: its bytes need not be kept twice.
        key = (array.dtype.str, array.shape, sha256(content).digest() if is_large else content)
        name = self._known(key) if is_large else self._constants.get(key)
        if name is None:
            name = self._constants[key] = self.name("c")
            self.initializers.append(numpy_helper.from_array(np.array(array, order="C", copy=True), name))
        return name

    def _known(self, key: tuple[Any, ...]) -> str | None:
        """The name of a constant here or in a graph around this one."""
        name = self._constants.get(key)
        return name if name or self._parent is None else self._parent._known(key)

    def add(self, op: str, inputs: Sequence[str], outputs: int | Sequence[str] = 1, **attributes: Any) -> str:
        """Add a node; returns the name of its first output.

        Args:
            outputs: the names of its outputs, or how many there are.
        """
        names = [self.name(op.lower()) for _ in range(outputs)] if isinstance(outputs, int) else list(outputs)
        self.nodes.append(helper.make_node(op, list(inputs), names, self.name(op), **attributes))
        return names[0]

    def branch(self, condition: str, then: Branch, otherwise: Branch) -> list[str]:
        """Add an ``If`` node; returns its outputs.

        Args:
            condition: name of one boolean.
            then, otherwise: each builds its nodes in a new subgraph, in which names from outside may be used, and returns as
                many outputs as the other.
        """
        parts = [self._subgraph(part) for part in (then, otherwise)]
        count = len(parts[0].output)
        outputs = [self.name("if") for _ in range(count)]
        self.nodes.append(
            helper.make_node("If", [condition], outputs, self.name("If"), then_branch=parts[0], else_branch=parts[1])
        )
        return outputs

    def repeat(self, count: str, value: str, build: Callable[[Graph, str, str], str]) -> str:
        """Add a ``Loop`` node; returns the value after the last turn.

        Args:
            count: name of the number of turns, an integer tensor of one element.
            value: name of the value before the first turn, in single precision.
            build: adds the nodes of a turn to the graph it is given, in which names from outside may be used; from the names of
                the turn's number, a scalar, and of the value before it to the name of the value after it.
        """
        turn, is_going_on, before, after = (self.name(stem) for stem in ("turn", "is_going_on", "before", "after"))
        inputs = [
            helper.make_tensor_value_info(turn, onnx.TensorProto.INT64, []),
            helper.make_tensor_value_info(is_going_on, onnx.TensorProto.BOOL, []),
            helper.make_tensor_value_info(before, onnx.TensorProto.FLOAT, None),
        ]
        body = self._subgraph(lambda inner: [is_going_on, build(inner, turn, before)], inputs)
        self.nodes.append(helper.make_node("Loop", [count, "", value], [after], self.name("Loop"), body=body))
        return after

    def choose(self, is_before: Test, branches: Sequence[Branch], first: int = 0) -> list[str]:
        """The outputs of one of ``branches``, by a balanced tree of ``If`` nodes.

        Args:
            first: the number of the first branch.
        """
        if len(branches) == 1:
            return list(branches[0](self))
        middle = len(branches) // 2
        return self.branch(
            is_before(self, first + middle),
            lambda graph: graph.choose(is_before, branches[:middle], first),
            lambda graph: graph.choose(is_before, branches[middle:], first + middle),
        )

    @staticmethod
    def less(index: str) -> Test:
        """The test whether ``index``, the name of an integer tensor of one element, is less than a branch's number."""
        return lambda graph, value: graph.add("Less", [index, graph.constant(value, np.int64)])

    def _subgraph(self, build: Branch, inputs: Sequence[onnx.ValueInfoProto] = ()) -> onnx.GraphProto:
        inner = Graph(self)
        outputs = list(build(inner))
        inside = {name for node in inner.nodes for name in node.output}
        # An output that comes from outside, or is returned twice, needs a new name.
        outputs = [
            name if name in inside and name not in outputs[:i] else inner.add("Identity", [name])
            for i, name in enumerate(outputs)
        ]
        values = [onnx.ValueInfoProto(name=name) for name in outputs]
        return helper.make_graph(inner.nodes, self.name("branch"), list(inputs), values, inner.initializers)

"""Gates as ONNX nodes, in double precision as PyTorch evaluates them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
from torch import Tensor, nn

from dfs_cli.export.graph import Graph
from dfs_cli.nn.gate import FeedForwardGate, Gate, RecurrentGate, RefineGate

_DOUBLE = np.float64


class GateWriter:
    """Writes a gate that decides block by block. Its state goes from block to block as names.

    Args:
        prices: (L, K), the cost of each option.
        operating_point: name of the price of cost, a double.
    """

    def __init__(self, gate: Gate, prices: np.ndarray, operating_point: str) -> None:
        self.gate, self.prices, self.operating_point = gate, prices, operating_point

    def start(self, graph: Graph) -> list[str]:
        """The state before the first block."""
        zeros = np.zeros((1, self.gate.hidden))
        return [graph.constant(zeros), graph.constant(zeros)] if isinstance(self.gate, RecurrentGate) else []

    def write(self, graph: Graph, block: int, pooled: str, state: Sequence[str]) -> tuple[str, list[str]]:
        """Decide on a block from ``pooled`` (1, C), the mean of its input in double precision.

        Returns:
            The option's index, an integer scalar, and the next state.
        """
        embedded = linear(graph, self.gate.embed[block], pooled)
        if isinstance(self.gate, RecurrentGate):
            state = self._cell(graph, embedded, state)
            scores = linear(graph, self.gate.head, state[0])
        else:
            scores = linear(graph, cast(FeedForwardGate, self.gate).heads[block], graph.add("Relu", [embedded]))
        scores = graph.add("Add", [scores, graph.constant(_double(self.gate.preference[block])[None])])
        charge = graph.add("Mul", [graph.constant(self.prices[block][None], _DOUBLE), self.operating_point])
        best = graph.add("ArgMax", [graph.add("Sub", [scores, charge])], axis=1, keepdims=0)
        return graph.add("Squeeze", [best]), list(state)

    def _cell(self, graph: Graph, embedded: str, state: Sequence[str]) -> list[str]:
        """An LSTM cell, with PyTorch's order of gates: input, forget, cell, output."""
        cell = cast(RecurrentGate, self.gate).cell
        hidden, memory = state
        weight = np.concatenate([_double(cell.weight_ih), _double(cell.weight_hh)], axis=1).T
        bias = _double(cell.bias_ih) + _double(cell.bias_hh)
        joined = graph.add("Concat", [embedded, hidden], axis=1)
        scores = graph.add("Gemm", [joined, graph.constant(weight), graph.constant(bias)])
        parts = [graph.name("split") for _ in range(4)]
        graph.add("Split", [scores], parts, axis=1)
        enter, forget, output = (graph.add("Sigmoid", [parts[i]]) for i in (0, 1, 3))
        fresh = graph.add("Mul", [enter, graph.add("Tanh", [parts[2]])])
        memory = graph.add("Add", [graph.add("Mul", [forget, memory]), fresh])
        return [graph.add("Mul", [output, graph.add("Tanh", [memory])]), memory]


def write_doubt(graph: Graph, logits: str, classes: int) -> tuple[str, str]:
    """How unsure ``logits`` (1, classes) are, see :func:`dfs_cli.nn.probe.doubt`: (1, 1); and the margin (1, 1) between the
    two largest, both in double precision."""
    values = graph.add("Cast", [logits], to=11)
    ordered = graph.add("TopK", [values, graph.constant([classes], np.int64)], 2, axis=1)
    ends = [graph.constant([i], np.int64) for i in (0, 1, 2, classes)]
    top, second, others = (
        graph.add("Slice", [ordered, ends[a], ends[b], ends[1]]) for a, b in ((0, 1), (1, 2), (1, 3))
    )
    rest = graph.add("ReduceLogSumExp", [others], axes=[1], keepdims=1)
    return graph.add("Sub", [rest, top]), graph.add("Sub", [top, second])


def write_refine_gate(graph: Graph, gate: RefineGate, charge: np.ndarray, found: Sequence[str]) -> str:
    """The options (L,) of the second pass.

    Args:
        charge: (L, K), what each option's score is lowered by.
        found: doubt (1, 1), margin (1, 1) and pooled features (1, C) of the first pass, in double precision.
    """
    doubt, margin, pooled = found
    summary = graph.add("Concat", [graph.add("Neg", [doubt]), margin, pooled], axis=1)
    centred = graph.add("Sub", [summary, graph.constant(_double(gate.input_mean)[None])])
    x = graph.add("Div", [centred, graph.constant(_double(gate.input_deviation)[None])])
    scores = linear(graph, gate.head, graph.add("Relu", [linear(graph, gate.embed, x)]))
    scores = graph.add("Reshape", [scores, graph.constant([gate.blocks, gate.options], np.int64)])
    scores = graph.add("Add", [scores, graph.constant(_double(gate.preference))])
    return graph.add("ArgMax", [graph.add("Sub", [scores, graph.constant(charge, _DOUBLE)])], axis=1, keepdims=0)


def linear(graph: Graph, layer: nn.Module, x: str) -> str:
    """A linear layer in double precision."""
    weight, bias = cast(Tensor, layer.weight), cast("Tensor | None", layer.bias)
    inputs = [x, graph.constant(_double(weight).T)]
    return graph.add("Gemm", inputs if bias is None else [*inputs, graph.constant(_double(bias))])


def _double(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()

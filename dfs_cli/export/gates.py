"""Gates as ONNX nodes, in double precision, as PyTorch evaluates them, where runtimes can do so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
from onnx import TensorProto
from torch import Tensor, nn

from dfs_cli.export.graph import Graph
from dfs_cli.nn.gate import FeedForwardGate, Gate, RecurrentGate, RefineGate

_DOUBLE = np.float64


class GateWriter:
    """Writes a gate that decides block by block. Its state goes from block to block as names.

    The recurrent cell is one LSTM node, in single precision (runtimes have no other), the embedding folded into its weights:
    a node costs microseconds, whatever it computes.

    Args:
        prices: (L, K), the cost of each option.
        operating_point: name of the price of cost, a double.
    """

    def __init__(self, graph: Graph, gate: Gate, prices: np.ndarray, operating_point: str) -> None:
        self.gate, self.is_recurrent = gate, isinstance(gate, RecurrentGate)
        self.dtype = np.float32 if self.is_recurrent else _DOUBLE
        charge = graph.add("Mul", [graph.constant(prices, _DOUBLE), operating_point])
        rows = graph.add("Sub", [graph.constant(_double(gate.preference)), charge])
        if self.is_recurrent:
            rows = graph.add("Cast", [rows], to=TensorProto.FLOAT)
        self.biases = [graph.name("row") for _ in prices]
        graph.add("Split", [rows], self.biases, axis=0)

    def start(self, graph: Graph) -> list[str]:
        """The state before the first block."""
        zeros = graph.constant(np.zeros((1, 1, self.gate.hidden)), np.float32)
        return [zeros, zeros] if self.is_recurrent else []

    def write(self, graph: Graph, block: int, pooled: str, state: Sequence[str]) -> tuple[str, list[str]]:
        """Decide on a block from ``pooled`` (1, 1, C), the mean of its input in single precision.

        Returns:
            The option's index, an integer tensor of one element, and the next state.
        """
        if isinstance(self.gate, RecurrentGate):
            state = self._cell(graph, self.gate, block, pooled, state)
            weight = graph.constant(_double(self.gate.head.weight).T, self.dtype)
            scores = graph.add("MatMul", [state[0], weight])
        else:
            gate = cast(FeedForwardGate, self.gate)
            row = graph.add("Squeeze", [pooled, graph.constant([0], np.int64)])
            pooled = graph.add("Cast", [row], to=TensorProto.DOUBLE)
            scores = linear(graph, gate.heads[block], graph.add("Relu", [linear(graph, gate.embed[block], pooled)]))
        scores = graph.add("Add", [scores, self.biases[block]])
        return graph.add("ArgMax", [scores], axis=-1, keepdims=0), list(state)

    @staticmethod
    def _cell(graph: Graph, gate: RecurrentGate, block: int, pooled: str, state: Sequence[str]) -> list[str]:
        """The embedding and an LSTM cell, whose order of gates is another in PyTorch than in ONNX."""
        embed = cast(nn.Linear, gate.embed[block])
        outer, inner = (_reordered(_double(w)) for w in (gate.cell.weight_ih, gate.cell.weight_hh))
        bias = outer @ _double(embed.bias) + _reordered(_double(gate.cell.bias_ih) + _double(gate.cell.bias_hh))
        inputs = [
            pooled,
            graph.constant((outer @ _double(embed.weight))[None], np.float32),
            graph.constant(inner[None], np.float32),
            graph.constant(np.concatenate([bias, np.zeros_like(bias)])[None], np.float32),
        ]
        outputs = ["", graph.name("hidden"), graph.name("memory")]
        graph.add("LSTM", [*inputs, "", *state], outputs, hidden_size=gate.hidden)
        return outputs[1:]


def _reordered(rows: np.ndarray) -> np.ndarray:
    """Rows of PyTorch's input, forget, cell and output gates as ONNX's input, output, forget and cell gates."""
    enter, forget, cell, output = np.split(rows, 4)
    return np.concatenate([enter, output, forget, cell])


def write_doubt(graph: Graph, logits: str, classes: int) -> tuple[str, str]:
    """How unsure ``logits`` (1, classes) are, see :func:`dfs_cli.nn.probe.doubt`: (1, 1); and the margin (1, 1) between the
    two largest, both in double precision."""
    values = graph.add("Cast", [logits], to=TensorProto.DOUBLE)
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

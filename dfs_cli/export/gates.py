"""Gates as ONNX nodes, in double precision, as PyTorch evaluates them, where runtimes can do so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
from onnx import TensorProto
from torch import Tensor, nn

from dfs_cli.export.graph import Graph, Test
from dfs_cli.nn.gate import FeedForwardGate, Gate, RecurrentGate, RefineGate

_DOUBLE = np.float64


class Pooled(NamedTuple):
    """The mean over the pixels of features, as ``scale`` times a value (1, 1, C) in single precision, by name."""

    name: str
    scale: float


class GateWriter:
    """Writes a gate that decides block by block. Its state goes from block to block as names.

    A node costs microseconds, whatever it computes, so there are few: the recurrent cell is one LSTM node, in single precision
    (runtimes have no other), the embedding a product whose weights hold what its input is to be scaled by; of two options only
    the difference of their scores is computed.

    Args:
        prices: (L, K), the cost of each option.
        operating_point: name of the price of cost, a double.
    """

    def __init__(self, graph: Graph, gate: Gate, prices: np.ndarray, operating_point: str) -> None:
        self.gate, self.is_recurrent = gate, isinstance(gate, RecurrentGate)
        self.dtype = np.float32 if self.is_recurrent else _DOUBLE
        self.is_binary = gate.options == 2
        charge = graph.add("Mul", [graph.constant(self._scores(prices), _DOUBLE), operating_point])
        rows = graph.add("Sub", [graph.constant(self._scores(_double(gate.preference))), charge])
        if self.is_recurrent:
            rows = graph.add("Cast", [rows], to=TensorProto.FLOAT)
        self.biases = [graph.name("row") for _ in prices]
        graph.add("Split", [rows], self.biases, axis=0)

    def _scores(self, rows: np.ndarray) -> np.ndarray:
        """``rows`` (N, K) of scores, or of two options by how much the first is ahead, (N, 1)."""
        return rows[:, :1] - rows[:, 1:] if self.is_binary else rows

    def start(self, graph: Graph) -> list[str]:
        """The state before the first block."""
        zeros = graph.constant(np.zeros((1, 1, self.gate.hidden)), np.float32)
        return [zeros, zeros] if self.is_recurrent else []

    def write(self, graph: Graph, block: int, pooled: Pooled, state: Sequence[str]) -> tuple[str, list[str]]:
        """Decide on a block from the mean of its input.

        Returns:
            The decision, one element: the option's index, or, of two options, whether it is the first; and the next state.
        """
        if isinstance(self.gate, RecurrentGate):
            state = self._cell(graph, self.gate, block, pooled, state)
            hidden, head = state[0], self.gate.head
        else:
            gate = cast(FeedForwardGate, self.gate)
            hidden = graph.add("Relu", [linear(graph, gate.embed[block], _row(graph, pooled), pooled.scale)])
            head = cast(nn.Linear, gate.heads[block])
        weight = self._scores(_double(head.weight).T)
        if self.is_binary:
            # The second option's lead in what was computed, against the first one's in what was known.
            lead = graph.add("MatMul", [hidden, graph.constant(-weight, self.dtype)])
            return graph.add("LessOrEqual", [lead, self.biases[block]]), list(state)
        scores = graph.add("MatMul", [hidden, graph.constant(weight, self.dtype)])
        scores = graph.add("Add", [scores, self.biases[block]])
        return graph.add("ArgMax", [scores], axis=-1, keepdims=1), list(state)

    def test(self, decision: str) -> Test:
        """The test for the options that ``decision`` tells apart."""
        return (lambda graph, option: decision) if self.is_binary else Graph.equals(decision)

    def write_bits(self, graph: Graph, decisions: Sequence[str], bits: Sequence[int]) -> str:
        """The bitwidths (1, L) that ``decisions`` mean."""
        found = graph.add("Concat", decisions, axis=1)
        found = graph.add("Reshape", [found, graph.constant([1, len(decisions)], np.int64)])
        if not self.is_binary:
            return look_up_bits(graph, bits, found)
        return graph.add("Where", [found, *(graph.constant(b, np.int64) for b in bits)])

    @staticmethod
    def _cell(graph: Graph, gate: RecurrentGate, block: int, pooled: Pooled, state: Sequence[str]) -> list[str]:
        """The embedding and an LSTM cell, whose order of gates is another in PyTorch than in ONNX."""
        embed = cast(nn.Linear, gate.embed[block])
        outer, inner = (_reordered(_double(w)) for w in (gate.cell.weight_ih, gate.cell.weight_hh))
        bias = outer @ _double(embed.bias) + _reordered(_double(gate.cell.bias_ih) + _double(gate.cell.bias_hh))
        weight = graph.constant(pooled.scale * _double(embed.weight).T, np.float32)
        inputs = [
            graph.add("MatMul", [pooled.name, weight]),
            graph.constant(outer[None], np.float32),
            graph.constant(inner[None], np.float32),
            graph.constant(np.concatenate([bias, np.zeros_like(bias)])[None], np.float32),
        ]
        outputs = ["", graph.name("hidden"), graph.name("memory")]
        graph.add("LSTM", [*inputs, "", *state], outputs, hidden_size=gate.hidden)
        return outputs[1:]


def look_up_bits(graph: Graph, bits: Sequence[int], indices: str) -> str:
    """The bitwidths of options, by their ``indices``, of any shape."""
    return graph.add("Gather", [graph.constant(bits, np.int64), indices])


def _row(graph: Graph, pooled: Pooled) -> str:
    """``pooled`` (1, C) in double precision, not yet scaled."""
    row = graph.add("Squeeze", [pooled.name, graph.constant([0], np.int64)])
    return graph.add("Cast", [row], to=TensorProto.DOUBLE)


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


def write_refine_gate(
    graph: Graph, gate: RefineGate, charge: np.ndarray, doubt: str, margin: str, pooled: Pooled
) -> str:
    """The options (L,) of the second pass.

    Args:
        charge: (L, K), what each option's score is lowered by.
        doubt, margin: (1, 1), of the first pass, in double precision.
        pooled: its features.
    """
    means = graph.add("Mul", [_row(graph, pooled), graph.constant(pooled.scale, _DOUBLE)])
    summary = graph.add("Concat", [graph.add("Neg", [doubt]), margin, means], axis=1)
    centred = graph.add("Sub", [summary, graph.constant(_double(gate.input_mean)[None])])
    x = graph.add("Div", [centred, graph.constant(_double(gate.input_deviation)[None])])
    scores = linear(graph, gate.head, graph.add("Relu", [linear(graph, gate.embed, x)]))
    scores = graph.add("Reshape", [scores, graph.constant([gate.blocks, gate.options], np.int64)])
    scores = graph.add("Add", [scores, graph.constant(_double(gate.preference))])
    return graph.add("ArgMax", [graph.add("Sub", [scores, graph.constant(charge, _DOUBLE)])], axis=1, keepdims=0)


def linear(graph: Graph, layer: nn.Module, x: str, scale: float = 1.0) -> str:
    """A linear layer in double precision, of ``scale`` times ``x``."""
    weight, bias = cast(Tensor, layer.weight), cast("Tensor | None", layer.bias)
    inputs = [x, graph.constant(scale * _double(weight).T)]
    return graph.add("Gemm", inputs if bias is None else [*inputs, graph.constant(_double(bias))])


def _double(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()

"""Gates as ONNX nodes, in double precision, as PyTorch evaluates them, where runtimes have it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, cast

import numpy as np
from onnx import TensorProto
from torch import Tensor, nn

from dfs_cli.control.base import Ceiling
from dfs_cli.control.gates import FeedForwardGate, Gate, RecurrentGate, SecondPassGate
from dfs_cli.export.graph import Graph, Test
from dfs_cli.export.part_writer import Pooled

_DOUBLE = np.float64
_HOPELESS = -1e30
"""A score below all others; finite in single precision."""


class LeftOver:
    """Writes what a limit leaves for the blocks to come, above the cost of their cheapest options.

    Args:
        limit: name of the limit, a double.
        extras: (L, K), what options cost more than a block's cheapest one.
        least: cost of the cheapest decision.
        batched: whether there may be several images.
    """

    def __init__(self, graph: Graph, limit: str, extras: Tensor, least: Tensor, batched: bool) -> None:
        self._extras, self._batched = extras.cpu().numpy(), batched
        self._zero = graph.constant(0, _DOUBLE)
        rest = graph.add("Sub", [limit, graph.constant(float(least), _DOUBLE)])
        self._name = graph.add("Max", [rest, self._zero])
        self._after, self._has_spent = "", False

    def forbid(self, graph: Graph, block: int, scores: str, dtype: type[np.floating]) -> str:
        """``scores`` (..., K), hopeless for options that are too dear."""
        self._after = graph.add("Sub", [self._name, graph.constant(self._extras[block], _DOUBLE)])
        is_too_dear = graph.add("Less", [self._after, self._zero])
        return graph.add("Where", [is_too_dear, graph.constant(_HOPELESS, dtype), scores])

    def spend(self, graph: Graph, decision: str) -> None:
        """Pay for ``decision`` (N,), the options of the block whose scores were written last."""
        if not self._batched:
            self._name = graph.add("Gather", [self._after, decision])
            return
        column = graph.add("Unsqueeze", [decision, graph.constant([1], np.int64)])
        # Before the first block all images have the same left: (K,), later (N, K).
        kind = "GatherElements" if self._has_spent else "Gather"
        self._name = graph.add(kind, [self._after, column], axis=int(self._has_spent))
        self._has_spent = True


class GateWriter(ABC):
    """Writes a gate that decides block by block. Its state goes from block to block as names.

    A node costs microseconds, whatever it computes, so there are few. Of two options only the difference of their scores is
    computed, where there is no limit.

    Args:
        option_costs: (L, K).
        operating_point: name of the cost multiplier, a double.
        ceiling: the dearest options that the blocks may have.
        left: what a limit leaves; None: there is no limit.
        batched: whether there may be several images.
    """

    dtype: ClassVar[type[np.floating]] = _DOUBLE
    """Precision of the scores."""

    def __init__(
        self,
        graph: Graph,
        gate: Gate,
        option_costs: np.ndarray,
        operating_point: str,
        ceiling: Ceiling,
        left: LeftOver | None,
        batched: bool,
    ) -> None:
        self.gate, self.batched, self._left = gate, batched, left
        self._is_binary = gate.options == 2 and left is None
        charge = graph.add("Mul", [graph.constant(self._scores(option_costs), _DOUBLE), operating_point])
        preference = graph.constant(self._scores(_preference(gate.preference, ceiling)))
        rows = graph.add("Sub", [preference, charge])
        if self.dtype is not _DOUBLE:
            rows = graph.add("Cast", [rows], to=TensorProto.FLOAT)
        self._biases = [graph.name("row") for _ in option_costs]
        graph.add("Split", [rows], self._biases, axis=0)

    def start(self, graph: Graph) -> list[str]:  # noqa: ARG002
        """The state before the first block."""
        return []

    def write(self, graph: Graph, block: int, pooled: Pooled, state: Sequence[str]) -> tuple[str, list[str]]:
        """Decide on a block from the mean of its input.

        Returns:
            The decision (N,): the option's index, or, of two options, whether it is the first; and the next state.
        """
        hidden, head, state = self._hidden(graph, block, pooled, state)
        weight = self._scores(_double(head.weight).T)
        if self._is_binary:
            # The second option's lead in what depends on the image, against the first one's in what does not.
            lead = graph.add("MatMul", [hidden, graph.constant(-weight, self.dtype)])
            decision = graph.add("LessOrEqual", [lead, self._biases[block]])
        else:
            scores = graph.add("MatMul", [hidden, graph.constant(weight, self.dtype)])
            scores = graph.add("Add", [scores, self._biases[block]])
            if self._left is not None:
                scores = self._left.forbid(graph, block, scores, self.dtype)
            decision = graph.add("ArgMax", [scores], axis=-1, keepdims=1)
        # OpenVINO takes no condition of more axes.
        decision = graph.add("Reshape", [decision, graph.constant([-1], np.int64)])
        if self._left is not None:
            self._left.spend(graph, decision)
        return decision, list(state)

    def test(self, decision: str) -> Test:
        """The test whether ``decision`` names an option before another one."""
        return (lambda graph, option: decision) if self._is_binary else Graph.less(decision)

    def options(self, graph: Graph, decision: str) -> str:
        """The options (N,) that ``decision`` names."""
        if not self._is_binary:
            return decision
        return graph.add("Where", [decision, *(graph.constant(option, np.int64) for option in (0, 1))])

    def write_bits(self, graph: Graph, decisions: Sequence[str], bits: Sequence[int]) -> str:
        """The bitwidths (1, L) of ``decisions`` on one image."""
        joined = graph.add("Concat", decisions, axis=0)
        joined = graph.add("Reshape", [joined, graph.constant([1, len(decisions)], np.int64)])
        if not self._is_binary:
            return look_up_bits(graph, bits, joined)
        return graph.add("Where", [joined, *(graph.constant(b, np.int64) for b in bits)])

    @abstractmethod
    def _hidden(
        self, graph: Graph, block: int, pooled: Pooled, state: Sequence[str]
    ) -> tuple[str, nn.Linear, Sequence[str]]:
        """The values from which a block's options are scored, the linear map to the scores, and the next state."""

    def _scores(self, rows: np.ndarray) -> np.ndarray:
        """``rows`` (N, K) of scores; of two options the first one's lead, (N, 1)."""
        return rows[:, :1] - rows[:, 1:] if self._is_binary else rows


class RecurrentGateWriter(GateWriter):
    """Writes a recurrent gate: one LSTM node, in single precision (runtimes have no other), behind a product whose weights hold
    the embedding and the scale of its input. Images are its batch; each block is a step."""

    dtype = np.float32
    gate: RecurrentGate

    def start(self, graph: Graph) -> list[str]:
        if self.batched:  # left out, a state is zero for every image
            return ["", ""]
        zeros = graph.constant(np.zeros((1, 1, self.gate.hidden)), np.float32)
        return [zeros, zeros]

    def _hidden(
        self, graph: Graph, block: int, pooled: Pooled, state: Sequence[str]
    ) -> tuple[str, nn.Linear, Sequence[str]]:
        gate = self.gate
        embed = cast(nn.Linear, gate.embed[block])
        outer, inner = (_reordered(_double(w)) for w in (gate.cell.weight_ih, gate.cell.weight_hh))
        bias = outer @ _double(embed.bias) + _reordered(_double(gate.cell.bias_ih) + _double(gate.cell.bias_hh))
        weight = graph.constant(pooled.scale * _double(embed.weight).T, np.float32)
        embedded = graph.add("MatMul", [pooled.name, weight])
        inputs = [
            graph.add("Transpose", [embedded], perm=[1, 0, 2]) if self.batched else embedded,
            graph.constant(outer[None], np.float32),
            graph.constant(inner[None], np.float32),
            graph.constant(np.concatenate([bias, np.zeros_like(bias)])[None], np.float32),
        ]
        outputs = ["", graph.name("hidden"), graph.name("memory")]
        graph.add("LSTM", [*inputs, "", *state], outputs, hidden_size=gate.hidden)
        return outputs[1], gate.head, outputs[1:]


class FeedForwardGateWriter(GateWriter):
    """Writes a feed-forward gate."""

    gate: FeedForwardGate

    def _hidden(
        self, graph: Graph, block: int, pooled: Pooled, state: Sequence[str]
    ) -> tuple[str, nn.Linear, Sequence[str]]:
        hidden = graph.add("Relu", [_linear(graph, self.gate.embed[block], _row(graph, pooled), pooled.scale)])
        return hidden, cast(nn.Linear, self.gate.heads[block]), state


def look_up_bits(graph: Graph, bits: Sequence[int], indices: str) -> str:
    """The bitwidths that ``indices`` of options, of any shape, stand for."""
    return graph.add("Gather", [graph.constant(bits, np.int64), indices])


def _row(graph: Graph, pooled: Pooled) -> str:
    """``pooled`` as (N, C) in double precision, not scaled yet."""
    row = graph.add("Squeeze", [pooled.name, graph.constant([1], np.int64)])
    return graph.add("Cast", [row], to=TensorProto.DOUBLE)


def _reordered(rows: np.ndarray) -> np.ndarray:
    """Rows for an LSTM's input, forget, cell and output gates, in PyTorch's order, in ONNX's: input, output, forget, cell."""
    enter, forget, cell, output = np.split(rows, 4)
    return np.concatenate([enter, output, forget, cell])


def write_uncertainty(graph: Graph, logits: str, classes: int) -> tuple[str, str]:
    """The uncertainty (N, 1) of ``logits`` (N, classes), see :func:`dfs_cli.nn.passes.uncertainty`, and these, the largest
    ones first, both in double precision; in few nodes, since every image pays for them."""
    values = graph.add("Cast", [logits], to=TensorProto.DOUBLE)
    ordered = graph.add("TopK", [values, graph.constant([classes], np.int64)], 2, axis=1)
    others = graph.name("others")
    top = graph.add("Split", [ordered, graph.constant([1, classes - 1], np.int64)], [graph.name("top"), others], axis=1)
    rest = graph.add("ReduceLogSumExp", [others], axes=[1], keepdims=1)
    return graph.add("Sub", [rest, top]), ordered


def write_second_pass_gate(
    graph: Graph,
    gate: SecondPassGate,
    ceiling: Ceiling,
    charge: np.ndarray,
    uncertainty: str,
    ordered: str,
    pooled: Pooled,
) -> str:
    """The options (N, L) of the second pass; (N, R, L) where there are charges for R rungs.

    Args:
        ceiling: the dearest options that the blocks may have.
        charge: (L, K) or (R, L, K), subtracted from the options' scores.
        uncertainty, ordered: of the first pass, see :func:`write_uncertainty`.
        pooled: the first pass's features.
    """
    means = graph.add("Mul", [_row(graph, pooled), graph.constant(pooled.scale, _DOUBLE)])
    top, second = (graph.add("Gather", [ordered, graph.constant([i], np.int64)], axis=1) for i in range(2))
    margin = graph.add("Sub", [top, second])
    summary = graph.add("Concat", [graph.add("Neg", [uncertainty]), margin, means], axis=1)
    centred = graph.add("Sub", [summary, graph.constant(_double(gate.input_mean)[None])])
    x = graph.add("Div", [centred, graph.constant(_double(gate.input_deviation)[None])])
    scores = _linear(graph, gate.head, graph.add("Relu", [_linear(graph, gate.embed, x)]))
    # (N, 1, L, K) together with (R, L, K) is (N, R, L, K).
    rungs = [1] * (charge.ndim - 2)
    shape = graph.constant([-1, *rungs, gate.blocks, gate.options], np.int64)
    scores = graph.add("Reshape", [scores, shape])
    scores = graph.add("Add", [scores, graph.constant(_preference(gate.preference, ceiling))])
    return graph.add("ArgMax", [graph.add("Sub", [scores, graph.constant(charge, _DOUBLE)])], axis=-1, keepdims=0)


def write_affordable_choice(graph: Graph, rungs: str, costs: np.ndarray, most: str) -> str:
    """The options (N, L) of the first rung that costs no more than ``most``.

    Args:
        rungs: (N, R, L), the options of each.
        costs: (L, K), of the options.
        most: name of what they may cost together, a double.
    """
    blocks, options = costs.shape
    places = graph.add("Add", [rungs, graph.constant(options * np.arange(blocks), np.int64)])
    of_blocks = graph.add("Gather", [graph.constant(costs.ravel(), _DOUBLE), places])
    totals = graph.add("ReduceSum", [of_blocks, graph.constant([2], np.int64)], keepdims=0)
    can_be_paid = graph.add("Cast", [graph.add("LessOrEqual", [totals, most])], to=TensorProto.FLOAT)
    return graph.add("GatherND", [rungs, graph.add("ArgMax", [can_be_paid], axis=1, keepdims=1)], batch_dims=1)


def _linear(graph: Graph, layer: nn.Module, x: str, scale: float = 1.0) -> str:
    """A linear layer applied to ``scale`` times ``x``, in double precision."""
    weight, bias = cast(Tensor, layer.weight), cast("Tensor | None", layer.bias)
    inputs = [x, graph.constant(scale * _double(weight).T)]
    return graph.add("Gemm", inputs if bias is None else [*inputs, graph.constant(_double(bias))])


def _preference(preference: Tensor, ceiling: Ceiling) -> np.ndarray:
    """Scores (L, K) without a look at the image, hopeless for options that are too dear."""
    return np.where(ceiling.forbidden().cpu().numpy(), _HOPELESS, _double(preference))


def _double(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()

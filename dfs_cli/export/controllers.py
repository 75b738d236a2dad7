"""The decisions of a controller as nodes: a writer for each kind, and the one place that tells the kinds apart."""

from __future__ import annotations

from functools import singledispatch
from typing import NamedTuple

import numpy as np

from dfs_cli.control.base import Controller
from dfs_cli.control.gated import GatedController
from dfs_cli.control.gates import FeedForwardGate, Gate, RecurrentGate
from dfs_cli.control.ladder import charges
from dfs_cli.control.probe import ProbeController
from dfs_cli.control.static import StaticController
from dfs_cli.cost.decisions import NOT_RUN, Decisions
from dfs_cli.errors import ExportError
from dfs_cli.export.gates import (
    FeedForwardGateWriter,
    GateWriter,
    LeftOver,
    RecurrentGateWriter,
    look_up_bits,
    write_affordable_choice,
    write_second_pass_gate,
    write_uncertainty,
)
from dfs_cli.export.graph import Graph, Test
from dfs_cli.export.part_writer import PartWriter, Pooled


class Results(NamedTuple):
    """The results of a network, by name.

    Args:
        logits: (1, classes).
        bits: (1, P * L), the bitwidths that were chosen.
    """

    logits: str
    bits: str


class ControllerWriter:
    """Writes a network together with its controller."""

    decisions: Decisions | None = None
    """The decisions, for one image, where they are the same for every image; None: they differ."""

    def decide(self, graph: Graph, writer: PartWriter, images: str, point: str, limit: str | None) -> Results:
        """Write the network as the controller decides; not called where ``decisions`` says it all.

        Args:
            writer: of the network's parts.
            images: name of the images (1, C, H, W).
            point, limit: names of the operating point and the limit, doubles; None: there is no limit.
        """
        raise NotImplementedError

    def follow(self, graph: Graph, writer: PartWriter, images: str, decisions: Decisions) -> str:
        """Write the network with the same ``decisions`` (for one image) for every image; returns the logits."""
        logits, _ = writer.write_pass(graph, images, _policy(decisions, 0))
        return logits


class StaticWriter(ControllerWriter):
    """One pass with one policy: a plain graph."""

    def __init__(self, controller: StaticController) -> None:
        self.decisions = Decisions.alike(controller.policy.cpu(), 1)


class GatedWriter(ControllerWriter):
    """One pass with a gate and an ``If`` for every block."""

    def __init__(self, controller: GatedController) -> None:
        self._controller = controller

    def decide(self, graph: Graph, writer: PartWriter, images: str, point: str, limit: str | None) -> Results:
        gate = self._controller.gate
        costs = self._controller.option_costs[0].cpu().numpy()
        left = None if limit is None else LeftOver(graph, limit, *self._controller.extras())
        gate_writer = _GATE_WRITERS[type(gate)](graph, gate, costs, point, self._controller.ceiling, left)
        state = gate_writer.start(graph)
        chosen: list[str] = []

        def decide(inner: Graph, block: int, pooled: Pooled | None) -> Test:
            nonlocal state
            assert pooled is not None
            decision, state = gate_writer.write(inner, block, pooled, state)
            chosen.append(decision)
            return gate_writer.test(decision)

        logits = writer.write_deciding_pass(graph, images, decide, pools=True)
        return Results(logits, gate_writer.write_bits(graph, chosen, writer.network.bits))


class ProbeWriter(ControllerWriter):
    """A first pass with one policy, and one ``If`` around the whole second pass."""

    def __init__(self, controller: ProbeController) -> None:
        self._controller = controller

    def decide(self, graph: Graph, writer: PartWriter, images: str, point: str, limit: str | None) -> Results:
        controller, bits, blocks = self._controller, writer.network.bits, len(writer.network.blocks)
        policy = controller.policy.tolist()
        looks, looks_again = (writer.seeing(view) for view in controller.views)
        first, features = looks.write_pass(graph, images, policy)
        uncertainty, margin = write_uncertainty(graph, first, writer.parts.classes)
        is_unsure = graph.add("Squeeze", [graph.add("Greater", [uncertainty, point])])
        gate = controller.gate
        costs, left = controller.option_costs[1], None
        charge = controller.cost_multiplier * costs
        if limit is not None:
            always, least = controller.base_costs()
            charge = charges(controller.multiplier, costs, controller.ceiling)
            left = graph.add("Sub", [limit, graph.constant(float(always), np.float64)])
            can_refine = graph.add("LessOrEqual", [graph.constant(float(least), np.float64), left])
            is_unsure = graph.add("And", [is_unsure, can_refine])

        def repeat(inner: Graph) -> list[str]:
            again = controller.second_policy.tolist()
            second, _ = looks_again.write_pass(inner, images, again)
            row = inner.constant([[bits[option] for option in again]], np.int64)
            return [self._add_logits(inner, first, second), row]

        def refine(inner: Graph) -> list[str]:
            if gate is None:
                return repeat(inner)
            pooled = looks.pool(inner, blocks, features)
            choice = write_second_pass_gate(
                inner, gate, controller.ceiling, charge.cpu().numpy(), uncertainty, margin, pooled
            )
            if left is not None:
                choice = write_affordable_choice(inner, choice, costs.cpu().numpy(), left)

            # All tests at once, in one node: a node costs microseconds.
            numbers = range(1, len(bits))
            is_before = [[inner.name("before") for _ in numbers] for _ in range(blocks)]
            column = inner.add("Reshape", [choice, inner.constant([blocks, 1], np.int64)])
            tests = inner.add("Less", [column, inner.constant([list(numbers)], np.int64)])
            tests = inner.add("Reshape", [tests, inner.constant([-1], np.int64)])
            inner.add("Split", [tests], [name for names in is_before for name in names], axis=0)

            def decide(graph: Graph, block: int, _: Pooled | None) -> Test:  # noqa: ARG001
                return lambda _, number: is_before[block][number - 1]

            second = looks_again.write_deciding_pass(inner, images, decide, pools=False)
            row = inner.add("Reshape", [choice, inner.constant([1, blocks], np.int64)])
            return [self._add_logits(inner, first, second), look_up_bits(inner, bits, row)]

        def stop(inner: Graph) -> list[str]:
            return [first, inner.constant(np.full((1, blocks), NOT_RUN, np.int64))]

        logits, second_bits = graph.branch(is_unsure, refine, stop)
        first_bits = [[bits[option] for option in policy]]
        return Results(logits, graph.add("Concat", [graph.constant(first_bits, np.int64), second_bits], axis=1))

    def follow(self, graph: Graph, writer: PartWriter, images: str, decisions: Decisions) -> str:
        looks, looks_again = (writer.seeing(view) for view in self._controller.views)
        first = super().follow(graph, looks, images, decisions)
        if decisions.passes == 1 or not decisions.ran[0, 1]:
            return first
        second, _ = looks_again.write_pass(graph, images, _policy(decisions, 1))
        return self._add_logits(graph, first, second)

    def _add_logits(self, graph: Graph, first: str, second: str) -> str:
        weights = self._controller.logit_weights.detach().cpu().numpy()
        weighted = [
            graph.add("Mul", [graph.constant(weight), logits])
            for weight, logits in zip(weights, (first, second), strict=True)
        ]
        return graph.add("Add", weighted)


_GATE_WRITERS: dict[type[Gate], type[GateWriter]] = {
    RecurrentGate: RecurrentGateWriter,
    FeedForwardGate: FeedForwardGateWriter,
}


@singledispatch
def writer_of(controller: Controller) -> ControllerWriter:
    """The writer for a kind of controller.

    Raises:
        ExportError: there is none.
    """
    raise ExportError(f"a network with a {type(controller).__name__} cannot be written as an ONNX graph")


writer_of.register(StaticController, StaticWriter)
writer_of.register(GatedController, GatedWriter)
writer_of.register(ProbeController, ProbeWriter)


def _policy(decisions: Decisions, index: int) -> list[int]:
    """The options (L,) of the first image in a pass."""
    policy: list[int] = decisions.in_pass(index)[0].tolist()
    return policy

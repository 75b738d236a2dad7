"""The decisions of a controller as nodes: a writer for each kind, and the one place that tells the kinds apart."""

from __future__ import annotations

from functools import singledispatch
from typing import NamedTuple

import numpy as np
from onnx import TensorProto

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
from dfs_cli.export.groups import Choice, rows_of, write_choice
from dfs_cli.export.part_writer import PartWriter, Pooled


class Results(NamedTuple):
    """The results of a network, by name.

    Args:
        logits: (N, classes).
        bits: (N, P * L), the bitwidths that were chosen.
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
            images: name of the images (N, C, H, W).
            point, limit: names of the operating point and the limit, doubles; None: there is no limit.
        """
        raise NotImplementedError

    def follow(self, graph: Graph, writer: PartWriter, images: str, decisions: Decisions) -> str:
        """Write the network with the same ``decisions`` (for one image) for every image; returns the logits."""
        logits, _ = writer.write_pass(graph, images, _policy(decisions, 0))
        return logits


class StaticWriter(ControllerWriter):
    """One policy: a plain graph, with one pass for each view."""

    def __init__(self, controller: StaticController) -> None:
        self._views = controller.views
        self.decisions = Decisions.alike(controller.policy.cpu(), 1, len(self._views))

    def follow(self, graph: Graph, writer: PartWriter, images: str, decisions: Decisions) -> str:
        logits = [
            writer.seeing(view).write_pass(graph, images, _policy(decisions, index))[0]
            for index, view in enumerate(self._views[: decisions.passes])
        ]
        return logits[0] if len(logits) == 1 else graph.add("Mean", logits)


class GatedWriter(ControllerWriter):
    """One pass with a gate and an ``If`` for every block; of several images an ``If`` for every option of every block."""

    def __init__(self, controller: GatedController) -> None:
        self._controller = controller

    def decide(self, graph: Graph, writer: PartWriter, images: str, point: str, limit: str | None) -> Results:
        gate, bits, batched = self._controller.gate, writer.network.bits, writer.batched
        costs = self._controller.option_costs[0].cpu().numpy()
        left = None if limit is None else LeftOver(graph, limit, *self._controller.extras(), batched)
        gate_writer = _GATE_WRITERS[type(gate)](graph, gate, costs, point, self._controller.ceiling, left, batched)
        state = gate_writer.start(graph)
        chosen: list[str] = []

        def decide(inner: Graph, block: int, pooled: Pooled | None) -> Test:
            nonlocal state
            assert pooled is not None
            decision, state = gate_writer.write(inner, block, pooled, state)
            chosen.append(decision)
            return gate_writer.test(decision)

        def choose(inner: Graph, block: int, pooled: Pooled | None) -> Choice:
            decide(inner, block, pooled)
            chosen[-1] = gate_writer.options(inner, chosen[-1])
            return write_choice(inner, chosen[-1], len(bits))

        if writer.batched:
            logits = writer.write_grouped_pass(graph, images, choose, pools=True)
            columns = [graph.add("Unsqueeze", [name, graph.constant([1], np.int64)]) for name in chosen]
            return Results(logits, look_up_bits(graph, bits, graph.add("Concat", columns, axis=1)))
        logits = writer.write_deciding_pass(graph, images, decide, pools=True)
        return Results(logits, gate_writer.write_bits(graph, chosen, bits))


class _First(NamedTuple):
    """What the first pass says about N images, by name.

    Args:
        logits: (N, classes).
        features: (N, ...), before the head.
        uncertainty, ordered: see :func:`dfs_cli.export.gates.write_uncertainty`.
    """

    logits: str
    features: str
    uncertainty: str
    ordered: str


class ProbeWriter(ControllerWriter):
    """A first pass with one policy, and one ``If`` around the whole second pass, which the unsure of several images take."""

    def __init__(self, controller: ProbeController) -> None:
        self._controller = controller

    def decide(self, graph: Graph, writer: PartWriter, images: str, point: str, limit: str | None) -> Results:
        controller, bits, blocks = self._controller, writer.network.bits, len(writer.network.blocks)
        policy = controller.policy.tolist()
        looks = writer.seeing(controller.views[0])
        logits, features = looks.write_pass(graph, images, policy)
        first = _First(logits, features, *write_uncertainty(graph, logits, writer.parts.classes))
        is_unsure, left = graph.add("Greater", [first.uncertainty, point]), None
        if limit is not None:
            always, least = controller.base_costs()
            left = graph.add("Sub", [limit, graph.constant(float(always), np.float64)])
            can_refine = graph.add("LessOrEqual", [graph.constant(float(least), np.float64), left])
            is_unsure = graph.add("And", [is_unsure, can_refine])
        if writer.batched:
            return self._refine_some(graph, writer, images, is_unsure, first, left)

        def refine(inner: Graph) -> list[str]:
            choice, second = self._look_again(inner, writer, images, first, left)
            return [self._add_logits(inner, logits, second), look_up_bits(inner, bits, choice)]

        def stop(inner: Graph) -> list[str]:
            return [logits, inner.constant(np.full((1, blocks), NOT_RUN, np.int64))]

        both, second_bits = graph.branch(graph.add("Squeeze", [is_unsure]), refine, stop)
        first_bits = [[bits[option] for option in policy]]
        return Results(both, graph.add("Concat", [graph.constant(first_bits, np.int64), second_bits], axis=1))

    def _refine_some(
        self, graph: Graph, writer: PartWriter, images: str, is_unsure: str, first: _First, left: str | None
    ) -> Results:
        """Write the second pass over those of several ``images`` whose first answer is not sure (N, 1)."""
        controller, bits, blocks = self._controller, writer.network.bits, len(writer.network.blocks)
        policy = [bits[option] for option in controller.policy.tolist()]
        # (N, 1) together with (1, L) is (N, L).
        first_bits, not_run = (
            graph.add("Expand", [graph.constant([row], np.int64), graph.add("Shape", [first.uncertainty])])
            for row in (policy, [NOT_RUN] * blocks)
        )
        rows = rows_of(graph, graph.add("Reshape", [is_unsure, graph.constant([-1], np.int64)]))
        is_any = graph.add("Cast", [graph.add("Size", [rows])], to=TensorProto.BOOL)

        def refine(inner: Graph) -> list[str]:
            def gather(name: str) -> str:
                return inner.add("GatherND", [name, rows])

            needed = first._fields if controller.gate else ("logits",)
            unsure, shown = first._replace(**{name: gather(getattr(first, name)) for name in needed}), gather(images)
            choice, second = self._look_again(inner, writer, shown, unsure, left)
            both = self._add_logits(inner, unsure.logits, second)
            logits = inner.add("ScatterND", [first.logits, rows, both])
            if not controller.gate:
                choice = inner.add("Expand", [choice, inner.add("Shape", [rows])])
            return [logits, inner.add("ScatterND", [not_run, rows, look_up_bits(inner, bits, choice)])]

        logits, second_bits = graph.branch(is_any, refine, lambda inner: [first.logits, not_run])
        return Results(logits, graph.add("Concat", [first_bits, second_bits], axis=1))

    def _look_again(
        self, graph: Graph, writer: PartWriter, images: str, first: _First, left: str | None
    ) -> tuple[str, str]:
        """Write the second pass over all of ``images``.

        Args:
            first: what is known about them.
            left: name of what a limit leaves for the blocks; None: there is no limit.

        Returns:
            The options (N, L), or (1, L) where they are the same for all, and the logits (N, classes).
        """
        controller, looks = self._controller, writer.seeing(self._controller.views[1])
        if not controller.gate:
            policy = controller.second_policy.tolist()
            return graph.constant([policy], np.int64), looks.write_pass(graph, images, policy)[0]
        pooled = writer.seeing(controller.views[0]).pool(graph, len(writer.network.blocks), first.features)
        costs = controller.option_costs[1]
        charge = controller.cost_multiplier * costs
        if left is not None:
            charge = charges(controller.multiplier, costs, controller.ceiling)
        choice = write_second_pass_gate(
            graph, controller.gate, controller.ceiling, charge.cpu().numpy(), first.uncertainty, first.ordered, pooled
        )
        if left is not None:
            choice = write_affordable_choice(graph, choice, costs.cpu().numpy(), left)
        if not writer.batched:
            return choice, self._write_decided(graph, looks, images, choice)
        # Images with the same options in every block run together, one group after the other. There are few groups, mostly
        # one; groups in every block would take more nodes.
        policies, group_of = graph.name("policies"), graph.name("group_of")
        graph.add("Unique", [choice], [policies, "", group_of, ""], axis=0)

        def run_group(inner: Graph, group: str, logits: str) -> str:
            members = rows_of(inner, inner.add("Equal", [group_of, group]))
            shown = inner.add("GatherND", [images, members])
            second = self._write_decided(inner, looks, shown, inner.add("Gather", [policies, group], axis=0))
            return inner.add("ScatterND", [logits, members, second])

        return choice, graph.repeat(graph.add("Shape", [policies], end=1), first.logits, run_group)

    def _write_decided(self, graph: Graph, looks: PartWriter, images: str, policy: str) -> str:
        """Write a pass over ``images`` with the same options, (L,) or (1, L), for all; returns its logits."""
        numbers, blocks = range(1, len(looks.network.bits)), len(looks.network.blocks)
        # All tests at once, in one node: a node costs microseconds.
        is_before = [[graph.name("before") for _ in numbers] for _ in range(blocks)]
        column = graph.add("Reshape", [policy, graph.constant([blocks, 1], np.int64)])
        tests = graph.add("Less", [column, graph.constant([list(numbers)], np.int64)])
        tests = graph.add("Reshape", [tests, graph.constant([-1], np.int64)])
        graph.add("Split", [tests], [name for names in is_before for name in names], axis=0)

        def decide(graph: Graph, block: int, _: Pooled | None) -> Test:  # noqa: ARG001
            return lambda _, number: is_before[block][number - 1]

        return looks.write_deciding_pass(graph, images, decide, pools=False)

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

"""A graph computes what its network computes, for every kind of controller."""

import json
from typing import cast

import numpy as np
import onnx
import pytest
import torch
from common import SIZE, tiny_resnet
from common_export import (
    MODELS,
    decisions_of,
    gated_network,
    images,
    make_network,
    mixed_bits,
    part_writer,
    probe_network,
    run_graph,
    static_network,
    subgraphs,
)
from onnx import numpy_helper
from timm.models.resnet import Bottleneck
from torch import nn

from dfs_cli.config import DynamicConfig, GateKind
from dfs_cli.control.base import Controller, controller_of
from dfs_cli.control.gated import GatedController
from dfs_cli.control.probe import ProbeController
from dfs_cli.cost.decisions import NOT_RUN, Decisions
from dfs_cli.data.images import Batch
from dfs_cli.errors import ExportError
from dfs_cli.export.check import compare
from dfs_cli.export.controllers import writer_of
from dfs_cli.export.network import BITS, IMAGES, LIMIT, LOGITS, OPERATING_POINT, export_network, export_static
from dfs_cli.export.parts import Parts
from dfs_cli.export.runtime import open_session
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.surgery.plan import plan_costs

pytestmark = pytest.mark.medium

# Where a value lies between two codes, the last digit of a floating point number decides.
CLOSE = 0.02

slow = pytest.mark.slow


def check_same_as_network(network: DynamicResNet) -> None:
    """Compare graph and network on images of very different contrast."""
    model = export_network(part_writer(network))
    onnx.checker.check_model(model)
    varied = images(40) * torch.linspace(0.2, 5.0, 40).reshape(-1, 1, 1, 1)
    batches = [Batch(varied, torch.zeros(40, dtype=torch.long), ())]
    comparison = compare(model.SerializeToString(), network, batches, labelled=False)
    assert comparison.same_decisions >= 0.95
    assert comparison.logit_difference < CLOSE
    decisions = network.run(varied).decisions
    if not isinstance(controller := controller_of(network), ProbeController) or controller.gate is not None:
        assert decisions.distinct() >= len(network.bits)  # otherwise it would prove little
    if decisions.passes > 1:
        assert 0 < decisions.ran[:, 1].sum() < 40


@pytest.mark.parametrize(("gate", "bits"), [("rnn", (0, 8)), ("ff", (0, 4, 8)), ("probe", (0, 4, 8))])
def test_the_graph_decides_and_answers_as_the_network_does(gate: str, bits: tuple[int, ...]) -> None:
    check_same_as_network(make_network(tiny_resnet(Bottleneck), gate, bits))


@pytest.mark.parametrize("name", ["Bottleneck", *(pytest.param(n, marks=slow) for n in MODELS if n != "Bottleneck")])
@pytest.mark.parametrize("alike", [False, True])
def test_a_first_pass_sees_smaller_images_in_the_graph_too(name: str, alike: bool) -> None:
    network = probe_network(MODELS[name](), mirror=True, first_view=0.75, alike=alike)
    check_same_as_network(network)
    model = export_network(part_writer(network))
    resizes = [node for node in model.graph.node if node.op_type == "Resize"]
    assert len(resizes) == 1, "outside the second pass"
    (again,) = (node for node in model.graph.node if node.op_type == "If")
    inner = {node.op_type for branch in again.attribute for node in branch.g.node}
    assert ("If" in inner) != alike and "Resize" not in inner
    # Decisions of the first pass alone, for every image.
    image = images(1)[0]
    policy = controller_of(network).policies()[-1]
    decisions = Decisions.alike(policy, 1)
    (logits,) = run_graph(export_static(part_writer(network), decisions), image).values()
    assert np.abs(logits - network.run(image[None], decisions).logits.detach().numpy()).max() < CLOSE


@pytest.mark.parametrize(("gate", "bits"), [("rnn", (0, 8)), ("ff", (0, 4, 8)), ("probe", (0, 4, 8))])
def test_the_graph_keeps_to_the_dearest_options_that_are_allowed(gate: str, bits: tuple[int, ...]) -> None:
    network = make_network(tiny_resnet(Bottleneck), gate, bits)
    controller = cast("GatedController | ProbeController", controller_of(network))
    varied = images(40) * torch.linspace(0.2, 5.0, 40).reshape(-1, 1, 1, 1)
    free = network.run(varied).decisions
    widest = (free.in_pass(free.passes - 1) == len(bits) - 1).sum(dim=0)
    assert widest.max() > 0, "some image must take what is forbidden then"
    block = int(widest.argmax())
    controller.ceiling.highest[block] = len(bits) - 2
    kept = network.run(varied).decisions
    assert int(kept.in_pass(kept.passes - 1)[:, block].max()) <= len(bits) - 2
    check_same_as_network(network)


@pytest.mark.parametrize(
    ("gate", "bits"), [("rnn", (0, 8)), ("rnn", (0, 4, 8)), ("ff", (0, 4, 8)), ("probe", (0, 4, 8))]
)
def test_the_graph_keeps_the_limit_that_the_network_has_and_any_other_as_an_input(
    gate: GateKind, bits: tuple[int, ...]
) -> None:
    network = make_network(tiny_resnet(Bottleneck), gate, bits)
    table = plan_costs(tiny_resnet(Bottleneck), DynamicConfig(bits=bits, gate=gate, mirror=gate == "probe"), SIZE)
    controller = controller_of(network)
    varied = images(40) * torch.linspace(0.2, 5.0, 40).reshape(-1, 1, 1, 1)
    free = network.run(varied).decisions
    low, high = (float(cost) for cost in table.cost(free).aminmax())
    default = high - 1e-6
    controller.limit = default
    model = export_network(part_writer(network))
    onnx.checker.check_model(model)
    session = open_session(model.SerializeToString(), threads=1)
    assert [value.name for value in session.get_inputs()] == [IMAGES]

    def decided(**inputs: np.ndarray) -> torch.Tensor:
        found = [session.run([BITS], {IMAGES: image[None].numpy(), **inputs})[0] for image in varied]
        return torch.from_numpy(np.concatenate(found))

    seen = []
    for limit in (default, 0.3 * low + 0.7 * high, high + 1):
        controller.limit = limit
        expected = network.run(varied).decisions
        inputs = {} if limit == default else {LIMIT: np.array(limit)}
        bits_in_graph = decided(**inputs)
        same = (bits_in_graph == expected.bits(network.bits)).all(dim=1)
        assert same.double().mean() >= 0.95
        options = torch.bucketize(bits_in_graph, torch.tensor(network.bits))
        in_graph = Decisions(options.masked_fill(bits_in_graph < 0, NOT_RUN).reshape(expected.options.shape))
        assert float(table.cost(in_graph).max()) <= limit and float(table.cost(expected).max()) <= limit
        seen.append(float(table.cost(expected).mean()))
    assert len(set(seen)) == 3 and bool(expected.equal(free).all()), "each limit must change something but the largest"
    below = decided(**{LIMIT: np.array(0.0)})
    assert (below[:, -len(network.blocks) :] == (-1 if gate == "probe" else 0)).all(), "the cheapest decision"


def test_a_network_without_a_limit_has_no_node_for_one() -> None:
    for gate in ("rnn", "probe"):
        network = make_network(tiny_resnet(), gate)
        free = export_network(part_writer(network)).graph
        assert LIMIT not in [tensor.name for tensor in free.initializer]
        controller_of(network).limit = 1.0
        limited = export_network(part_writer(network)).graph
        assert LIMIT in [tensor.name for tensor in limited.initializer]
        more = sum(len(g.node) for g in (limited, *subgraphs(limited))) - sum(
            len(g.node) for g in (free, *subgraphs(free))
        )
        # Of a gate, four before each of five blocks and two in the beginning; of a second pass, a few whatever L is.
        assert more == (22 if gate == "rnn" else 10)


@slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("gate", ["rnn", "ff", "probe"])
@pytest.mark.parametrize("bits", [(0, 4, 8), (0, 8)])
def test_every_family_decides_and_answers_as_the_network_does(name: str, gate: str, bits: tuple[int, ...]) -> None:
    check_same_as_network(make_network(MODELS[name](), gate, bits))


@pytest.mark.parametrize("name", ["BasicBlock", *(pytest.param(name, marks=slow) for name in list(MODELS)[1:])])
def test_every_option_computes_what_it_computes_in_the_network(name: str) -> None:
    network = gated_network(MODELS[name](), bits=(0, 2, 4, 6, 8, 16, 32))
    writer = part_writer(network)
    for option, bits in enumerate(network.bits):
        decisions = decisions_of(network, [option] * len(network.blocks))
        expected = network.run(images(1), decisions).logits[0].detach().numpy()
        logits = run_graph(export_static(writer, decisions), images(1)[0])[LOGITS][0]
        assert np.abs(logits - expected).max() < CLOSE * np.abs(expected).max(), bits


@pytest.mark.parametrize("name", ["Bottleneck", *(pytest.param(n, marks=slow) for n in MODELS if n != "Bottleneck")])
@pytest.mark.parametrize("mix", ["uniform", "per layer"])
def test_the_graph_of_a_static_network_is_plain_and_computes_what_the_network_computes(name: str, mix: str) -> None:
    network = static_network(MODELS[name](), mixed_bits if mix == "per layer" else lambda block, layer: 4)
    model = export_network(part_writer(network))
    onnx.checker.check_model(model)
    assert not list(subgraphs(model.graph))
    assert [value.name for value in model.graph.input] == [IMAGES]
    assert [value.name for value in model.graph.output] == [LOGITS]
    expected = network.run(images(4)).logits.detach().numpy()
    logits = np.concatenate([run_graph(model, image)[LOGITS] for image in images(4)])
    assert np.abs(logits - expected).max() < CLOSE * np.abs(expected).max()


def test_a_static_network_of_two_views_is_a_plain_graph_with_both() -> None:
    network = static_network(tiny_resnet(), mixed_bits, mirror=True)
    model = export_network(part_writer(network))
    onnx.checker.check_model(model)
    assert not list(subgraphs(model.graph))
    expected = network.run(images(4))
    assert expected.decisions.passes == 2
    logits = np.concatenate([run_graph(model, image)[LOGITS] for image in images(4)])
    expected_logits = expected.logits.detach().numpy()
    assert np.abs(logits - expected_logits).max() < CLOSE * np.abs(expected_logits).max()


def test_the_metadata_of_a_plain_graph_names_the_policy() -> None:
    """Of a block whose layers differ, the widest layer's bitwidth."""
    model = export_network(part_writer(static_network(tiny_resnet(), mixed_bits)))
    assert json.loads({p.key: p.value for p in model.metadata_props}["policy"]) == [8, 0, 8, 8, 8]


@pytest.mark.parametrize("mirror", [False, True])
def test_a_dynamic_network_with_fixed_decisions_has_no_control_flow(mirror: bool) -> None:
    network = probe_network(tiny_resnet(), mirror=mirror)
    both = decisions_of(network, [1, 2, 0, 1, 2, 2, 2, 1, 2, 0], passes=2)
    one = Decisions(both.options.clone().index_fill_(1, torch.tensor([1]), NOT_RUN))
    for decisions in (both, one):
        model = export_static(part_writer(network), decisions)
        assert not list(subgraphs(model.graph))
        expected = network.run(images(1), decisions).logits.detach().numpy()
        np.testing.assert_allclose(run_graph(model, images(1)[0])[LOGITS], expected, atol=CLOSE)


def test_there_is_an_if_per_block_or_one_around_the_second_pass() -> None:
    gated = export_network(part_writer(gated_network(tiny_resnet()))).graph
    assert [node.op_type for node in gated.node].count("If") == 5
    probe = export_network(part_writer(probe_network(tiny_resnet()))).graph
    assert [node.op_type for node in probe.node].count("If") == 1


def test_the_operating_point_of_a_gate_can_be_changed_per_call() -> None:
    model = export_network(part_writer(gated_network(tiny_resnet())))
    image = images(1)[0]
    assert (run_graph(model, image, **{OPERATING_POINT: np.array(1e9)})[BITS] == 0).all()
    assert (run_graph(model, image, **{OPERATING_POINT: np.array(-1e9)})[BITS] == 8).all()


def test_the_operating_point_decides_on_the_second_pass() -> None:
    network = probe_network(tiny_resnet())
    model, image = export_network(part_writer(network)), images(1)[0]
    refined = run_graph(model, image, **{OPERATING_POINT: np.array(-1e9)})
    assert (refined[BITS][:, 5:] >= 0).all()
    stopped = run_graph(model, image, **{OPERATING_POINT: np.array(1e9)})
    assert (stopped[BITS][:, 5:] == -1).all()
    # The first answer is the answer.
    policy = cast(ProbeController, controller_of(network)).policy
    assert stopped[BITS][0, :5].tolist() == [network.bits[option] for option in policy]
    expected = network.run(images(1), Decisions.alike(policy, 1)).logits.detach().numpy()
    np.testing.assert_allclose(stopped[LOGITS], expected, atol=CLOSE)


def test_weights_lie_in_the_branch_that_uses_them_and_are_bytes() -> None:
    network = gated_network(tiny_resnet())
    graph = export_network(part_writer(network)).graph
    outside = {tensor.name for tensor in graph.initializer}
    branches = [branch for branch in subgraphs(graph) if any(node.op_type == "Conv" for node in branch.node)]
    assert len(branches) >= 2 * len(network.blocks)
    for branch in branches:
        assert not {name for node in branch.node for name in node.input} & outside
        weights = [a for tensor in branch.initializer if (a := numpy_helper.to_array(tensor)).size > 64]
        assert weights and all(array.dtype in (np.int8, np.uint8) for array in weights)


def test_both_passes_share_the_weights_of_the_bitwidths_that_they_share() -> None:
    graph = export_network(part_writer(probe_network(tiny_resnet(), first_view=0.75, alike=True))).graph
    arrays = [numpy_helper.to_array(tensor) for one in (graph, *subgraphs(graph)) for tensor in one.initializer]
    weights = [array.tobytes() for array in arrays if array.dtype == np.int8 and array.ndim == 4]
    assert weights and len(set(weights)) == len(weights)


def test_parts_are_traced_without_changing_the_network() -> None:
    network = gated_network(tiny_resnet())
    before = {k: v.clone() for k, v in network.state_dict().items()}
    Parts(network, SIZE).part((0, 1))
    assert before.keys() == network.state_dict().keys()
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


def test_a_controller_without_a_writer_is_refused() -> None:
    with pytest.raises(ExportError, match="Identity"):
        writer_of(cast(Controller, nn.Identity()))

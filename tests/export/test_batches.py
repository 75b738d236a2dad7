"""Graphs for several images decide and answer as the graph for one."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from common import SIZE, tiny_resnet
from common_export import (
    decisions_of,
    images,
    make_network,
    mixed_bits,
    part_writer,
    probe_network,
    run_batch,
    static_network,
    subgraphs,
)
from timm.models.resnet import Bottleneck
from torch import Tensor, nn

from dfs_cli.cost.decisions import NOT_RUN, Decisions
from dfs_cli.data.images import Batch
from dfs_cli.errors import ConfigError, ExportError
from dfs_cli.export.baselines import export_dense, quantize_dense
from dfs_cli.export.batched import trace_batched
from dfs_cli.export.check import compare
from dfs_cli.export.network import BITS, LOGITS, OPERATING_POINT, export_network, export_static
from dfs_cli.export.part_writer import PartWriter
from dfs_cli.export.parts import Parts
from dfs_cli.export.write import write_onnx
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.presets import BatchSize, parse_batch

pytestmark = pytest.mark.medium

VARIED = images(40) * torch.linspace(0.2, 5.0, 40).reshape(-1, 1, 1, 1)
"""Images of very different contrast."""


def batch_writer(network: DynamicResNet, batch: BatchSize, tensorrt: bool = False) -> PartWriter:
    return PartWriter(Parts(network, SIZE, batch), tensorrt)


def check_same_as_alone(network: DynamicResNet, batch: BatchSize, shown: Tensor = VARIED) -> dict[str, np.ndarray]:
    """Compare the graph for batches with that for one image and with the network; returns its results."""
    alone, model = export_network(part_writer(network)), export_network(batch_writer(network, batch))
    onnx.checker.check_model(model)
    # Of any number at once: a batch, a smaller rest, and a single image.
    sizes = [24, len(shown) - 25, 1] if batch == "dynamic" else [int(batch)] * (len(shown) // int(batch))
    found, expected = run_batch(model, shown, sizes), run_batch(alone, shown, [1] * len(shown))
    assert found.keys() == expected.keys()
    output = network.run(shown)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)
    np.testing.assert_allclose(found[LOGITS], output.logits.detach().numpy(), rtol=1e-5, atol=1e-5)
    if BITS in found:
        np.testing.assert_array_equal(found[BITS], output.decisions.bits(network.bits).numpy())
    return found


@pytest.mark.parametrize("batch", [8, "dynamic"])
@pytest.mark.parametrize(("gate", "bits"), [("rnn", (0, 8)), ("rnn", (4, 8)), ("ff", (0, 4, 8)), ("probe", (0, 4, 8))])
def test_every_image_gets_what_it_gets_alone(gate: str, bits: tuple[int, ...], batch: BatchSize) -> None:
    network = make_network(tiny_resnet(Bottleneck), gate, bits)
    found = check_same_as_alone(network, batch)[BITS][:8]
    # Otherwise it would prove little: images of one batch differ in a block, and there is one that they share.
    last = found[found[:, -1] >= 0][:, -len(network.blocks) :]
    distinct = [len(np.unique(column)) for column in last.T]
    assert max(distinct) > 1
    if gate == "probe":
        assert 0 < len(last) < 8


@pytest.mark.parametrize("batch", [8, "dynamic"])
def test_static_networks_in_batches(batch: BatchSize) -> None:
    network = static_network(tiny_resnet(Bottleneck), mixed_bits)
    check_same_as_alone(network, batch)
    assert not list(subgraphs(export_network(batch_writer(network, batch)).graph))


@pytest.mark.parametrize("batch", [8, "dynamic"])
def test_no_image_and_all_images_take_the_second_pass(batch: BatchSize) -> None:
    network = probe_network(tiny_resnet(), mirror=True)
    alone, model = export_network(part_writer(network)), export_network(batch_writer(network, batch))
    for point, runs in ((1e9, False), (-1e9, True)):
        given = {OPERATING_POINT: np.array(point)}
        found, expected = run_batch(model, VARIED, [8] * 5, **given), run_batch(alone, VARIED, [1] * 40, **given)
        assert ((found[BITS][:, 5:] != NOT_RUN) == runs).all()
        for name in (LOGITS, BITS):
            np.testing.assert_array_equal(found[name], expected[name])
    assert len(np.unique(found[BITS], axis=0)) > 1, "second passes must differ"


def test_the_second_pass_is_not_entered_where_all_are_sure() -> None:
    graph = export_network(batch_writer(probe_network(tiny_resnet()), 8)).graph
    (branch,) = [node for node in graph.node if node.op_type == "If"]
    taken, left = (attribute.g for attribute in sorted(branch.attribute, key=lambda a: a.name, reverse=True))
    assert [node.op_type for node in taken.node].count("Loop") == 1
    assert {node.op_type for node in left.node} == {"Identity"}


@pytest.mark.parametrize("tensorrt", [False, True])
@pytest.mark.parametrize("batch", [8, "dynamic"])
def test_plain_graphs_in_batches(tensorrt: bool, batch: BatchSize) -> None:
    network = probe_network(tiny_resnet(), mirror=True)
    decisions = decisions_of(network, [1, 2, 0, 1, 2, 2, 2, 1, 2, 0], passes=2)
    model = export_static(batch_writer(network, batch, tensorrt), decisions)
    expected = network.run(VARIED, Decisions.alike(decisions.options[0], 40)).logits.detach().numpy()
    found = run_batch(model, VARIED, [8] * 5)[LOGITS]
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("batch", [16, "dynamic"])
def test_a_comparison_fills_up_the_last_batch(batch: BatchSize) -> None:
    network = make_network(tiny_resnet(), "probe")
    content = export_network(batch_writer(network, batch)).SerializeToString()
    targets = network.run(VARIED).logits.argmax(dim=1)
    targets[:3] += 1  # three of forty are wrong
    batches = [Batch(VARIED[:37], targets[:37] % 10, ()), Batch(VARIED[37:], targets[37:], ())]
    comparison = compare(content, network, batches, labelled=True)
    assert comparison.images == 40 and comparison.same_decisions == comparison.same_answers == 1
    assert comparison.top1 == comparison.onnx_top1 == pytest.approx(92.5)


@pytest.mark.parametrize("batch", [4, "dynamic"])
def test_a_file_for_batches(batch: BatchSize, tmp_path: Path) -> None:
    network, file = make_network(tiny_resnet(), "rnn"), tmp_path / "out.onnx"
    shown = [Batch(VARIED, torch.zeros(40, dtype=torch.long), ())]
    assert write_onnx(file, network, SIZE, shown, labelled=False, batch=batch).holds
    graph = onnx.load(file).graph
    axes = [value.type.tensor_type.shape.dim[0] for value in (graph.input[0], *graph.output)]
    assert [axis.dim_value or axis.dim_param for axis in axes] == [batch if batch == 4 else "N"] * 3


def test_dense_graphs_in_batches() -> None:
    model = tiny_resnet(Bottleneck).eval()
    dense = export_dense(model, SIZE, "dynamic")
    expected = model(VARIED).detach().numpy()
    found = run_batch(onnx.load_from_string(dense), VARIED, [39, 1])[LOGITS]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    quantized, alone = (quantize_dense(graph, VARIED) for graph in (dense, export_dense(model, SIZE)))
    together = run_batch(onnx.load_from_string(quantized), VARIED, [40])[LOGITS]
    np.testing.assert_array_equal(together, run_batch(onnx.load_from_string(alone), VARIED, [1] * 40)[LOGITS])


class Mixing(nn.Module):
    """Looks at the size of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.shape[0]


def test_what_depends_on_the_size_of_the_batch_is_refused() -> None:
    with pytest.raises(ExportError, match="Mixing cannot be written for several images"):
        trace_batched(Mixing(), lambda module, x: module(x), torch.zeros(1, 3, 4, 4))


def test_what_a_batch_may_be() -> None:
    assert [parse_batch(given) for given in ("1", 8, "dynamic")] == [1, 8, "dynamic"]
    for given in ("0", "-1", "8.0", "many", "", 0, 2**16 + 1, "9" * 50):
        with pytest.raises(ConfigError, match=r"--batch .*: expected 1 to 65536, or dynamic"):
            parse_batch(given)


def test_for_one_image_there_are_no_groups() -> None:
    graph = export_network(part_writer(probe_network(tiny_resnet()))).graph
    nodes = [node.op_type for part in (graph, *subgraphs(graph)) for node in part.node]
    assert not {"Loop", "NonZero", "GatherND"} & {*nodes}

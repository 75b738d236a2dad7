"""Integer kernels, and int8 features between blocks."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from common import SIZE, preactivated_resnet, tiny_resnet
from common_export import (
    gated_network,
    images,
    make_network,
    mixed_bits,
    part_writer,
    parts_with_other_codes,
    run_graph,
    static_network,
    subgraphs,
)
from timm.models.resnet import Bottleneck
from torch import nn

from dfs_cli.export.check import compare
from dfs_cli.export.network import LOGITS, export_network
from dfs_cli.export.part_writer import PartWriter
from dfs_cli.export.parts import Key, Parts
from dfs_cli.export.runtime import open_session
from dfs_cli.export.trace import Traced
from dfs_cli.export.write import random_batches

pytestmark = pytest.mark.medium


def kernels_of(writer: PartWriter, folder: Path) -> list[list[str]]:
    """The kernels that ONNX Runtime really runs, a list for each branch."""
    file = folder / "optimised.onnx"
    open_session(export_network(writer).SerializeToString(), threads=1, optimised=str(file))
    graph = onnx.load(file).graph
    return [[node.op_type for node in part.node] for part in (graph, *subgraphs(graph))]


@pytest.mark.parametrize("gate", ["rnn", pytest.param("probe", marks=pytest.mark.slow)])
def test_with_int8_features_everything_in_a_block_runs_on_integers(gate: str, tmp_path: Path) -> None:
    network = make_network(tiny_resnet(Bottleneck), gate)
    writer = part_writer(network)
    assert writer.features == "int8"
    branches = kernels_of(writer, tmp_path)[1:]
    # Both options that run, of every block: three convolutions and an addition.
    assert sum(ops.count("QLinearAdd") for ops in branches) == 2 * len(network.blocks)
    assert sum(ops.count("QLinearConv") for ops in branches) >= 6 * len(network.blocks)
    assert not any("Conv" in ops or "ConvInteger" in ops for ops in branches)
    # Where there is no downsampling, skipping copies the codes and does nothing else.
    assert any(set(ops) == {"Identity"} for ops in branches)


@pytest.mark.parametrize("model", [tiny_resnet, lambda: tiny_resnet(Bottleneck), preactivated_resnet])
def test_every_part_gives_the_codes_of_the_network(model: Callable[[], nn.Module]) -> None:
    assert not parts_with_other_codes(gated_network(model(), bits=(0, 2, 5, 8)))


@pytest.mark.parametrize("bits", [(0, 8), (0, 4, 8)])
def test_a_graph_answers_as_the_network(bits: tuple[int, ...]) -> None:
    network = gated_network(tiny_resnet(Bottleneck), bits=bits)
    content = export_network(part_writer(network)).SerializeToString()
    comparison = compare(content, network, random_batches(SIZE, 40), labelled=False)
    assert comparison.same_decisions == comparison.same_answers == 1
    assert comparison.logit_difference < 1e-5


def test_a_static_network_with_int8_features_has_no_float_convolution(tmp_path: Path) -> None:
    network = static_network(tiny_resnet(Bottleneck), mixed_bits)
    writer = part_writer(network)
    assert writer.features == "int8"
    (ops,) = kernels_of(writer, tmp_path)
    assert "QLinearConv" in ops and "Conv" not in ops
    expected = network.run(images(4)).logits.detach().numpy()
    model = export_network(writer)
    logits = np.concatenate([run_graph(model, image)[LOGITS] for image in images(4)])
    assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()


class RecordingParts(Parts):
    """Remembers which options were asked for."""

    def part(self, key: Key) -> Traced:
        if isinstance(key, tuple):
            self.__dict__.setdefault("asked", set()).add(key)
        return super().part(key)


def test_only_the_policy_of_a_static_network_is_traced() -> None:
    network = static_network(tiny_resnet(), mixed_bits, bits=(0, 2, 4, 8, 32))
    parts = RecordingParts(network, SIZE)
    writer = PartWriter(parts)
    export_network(writer)
    # Option 3 has 8 bits, the widest layer's in each block; the second block is skipped.
    assert parts.__dict__["asked"] == {(0, 3), (1, 0), (2, 3), (3, 3), (4, 3)}
    # An option of 32 bits that is never chosen does not matter.
    assert writer.features == "int8"


@pytest.mark.parametrize("bits", [(0, 16), (8, 32)])
def test_features_are_float_where_an_option_has_more_than_8_bits(bits: tuple[int, ...]) -> None:
    assert part_writer(gated_network(tiny_resnet(), bits=bits)).features == "float"

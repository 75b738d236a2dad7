"""What is written, and what is refused."""

from pathlib import Path

import onnx
import pytest
import torch
from common import SIZE, spread_gate, tiny_resnet
from common_export import gated_network, mixed_bits, part_writer, static_network, subgraphs
from google.protobuf.message import EncodeError  # type: ignore[import-untyped]

from dfs_cli.control.base import controller_of
from dfs_cli.data.images import Batch
from dfs_cli.errors import DataError, ExportError, OutputError
from dfs_cli.export import write
from dfs_cli.export.check import Comparison, check_holds, compare
from dfs_cli.export.network import export_network
from dfs_cli.export.part_writer import PartWriter
from dfs_cli.export.write import (
    common_decisions,
    random_batches,
    serialise,
    write_onnx,
)

pytestmark = pytest.mark.medium


def test_features_are_int8_where_no_option_has_more_bits(tmp_path: Path) -> None:
    network = gated_network(tiny_resnet())
    controller_of(network).force(torch.tensor([2, 0, 2, 1, 2]))
    comparison = write_onnx(tmp_path / "out.onnx", network, SIZE, random_batches(SIZE, 16), labelled=False)
    assert comparison.holds and comparison.features == "int8"
    assert compare(tmp_path / "out.onnx", network, random_batches(SIZE, 16), labelled=False).holds


@pytest.mark.parametrize("tensorrt", [False, True])
def test_the_most_common_policy_is_written_without_control_flow(tensorrt: bool, tmp_path: Path) -> None:
    network, file = gated_network(tiny_resnet()), tmp_path / "out.onnx"
    batches = random_batches(SIZE, 16)
    write_onnx(file, network, SIZE, batches, labelled=False, static=not tensorrt, tensorrt=tensorrt)
    model = onnx.load(file)
    assert not list(subgraphs(model.graph))
    policy = common_decisions(network, batches).bits(network.bits)[0].tolist()
    assert model.metadata_props[0].value == str(policy)


def test_a_static_network_is_written_as_it_is(tmp_path: Path) -> None:
    network, file = static_network(tiny_resnet(), mixed_bits), tmp_path / "out.onnx"
    comparison = write_onnx(file, network, SIZE, random_batches(SIZE, 16), labelled=False)
    assert comparison.holds and comparison.same_decisions == 1.0
    assert not list(subgraphs(onnx.load(file).graph))


def test_a_graph_that_decides_otherwise_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, other = gated_network(tiny_resnet()), gated_network(tiny_resnet())
    spread_gate(other, 1.0, seed=5)
    monkeypatch.setattr(write, "export_network", lambda _: export_network(part_writer(other)))
    with pytest.raises(ExportError, match="same decisions for"):
        write_onnx(tmp_path / "out.onnx", network, SIZE, random_batches(SIZE, 16), labelled=False)
    assert not list(tmp_path.iterdir())


def test_a_file_that_exists_is_not_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "out.onnx"
    file.write_text("mine")
    with pytest.raises(OutputError, match="--force"):
        write_onnx(file, gated_network(tiny_resnet()), SIZE, random_batches(SIZE, 1), labelled=False)
    assert file.read_text() == "mine"


def test_a_comparison_needs_images(tmp_path: Path) -> None:
    empty = [Batch(torch.zeros(0, *SIZE), torch.zeros(0, dtype=torch.long), ())]
    network = gated_network(tiny_resnet())
    with pytest.raises(DataError, match="no image"):
        write_onnx(tmp_path / "out.onnx", network, SIZE, empty, labelled=True)
    with pytest.raises(DataError, match="no image"):
        write_onnx(tmp_path / "out.onnx", network, SIZE, empty, labelled=True, static=True)


def test_graphs_too_large_for_onnx_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: PartWriter) -> None:
        raise EncodeError("too large")

    monkeypatch.setattr(write, "export_network", fail)
    with pytest.raises(ExportError, match="2 GiB"):
        serialise(part_writer(gated_network(tiny_resnet())))


def test_on_real_images_decisions_and_accuracy_must_agree() -> None:
    check_holds(Comparison(1000, True, 0.995, 1.0, 90.0, 89.9, 0.0))
    for same, top1 in ((0.994, 90.0), (1.0, 89.8), (1.0, 90.2)):
        with pytest.raises(ExportError):
            check_holds(Comparison(1000, True, same, 1.0, 90.0, top1, 0.0))


def test_on_random_images_answers_must_agree_but_for_near_ties() -> None:
    check_holds(Comparison(256, False, 1.0, 255 / 256, 100.0, 99.6, 0.0))
    with pytest.raises(ExportError):
        check_holds(Comparison(256, False, 1.0, 254 / 256, 100.0, 99.2, 0.0))

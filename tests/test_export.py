import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import make_dynamic, preactivated_resnet, se_resnet, spread_gate, tiny_resnet
from google.protobuf.message import EncodeError  # type: ignore[import-untyped]
from onnx import TensorProto, helper, numpy_helper
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn
from typer.testing import CliRunner

from dfs_cli.cli.app import app
from dfs_cli.config import DynamicConfig
from dfs_cli.data.images import Batch
from dfs_cli.errors import ExportError
from dfs_cli.export import runtime, write
from dfs_cli.export.bytes import measure_scales
from dfs_cli.export.check import Comparison, check_holds, compare
from dfs_cli.export.graph import Graph
from dfs_cli.export.layers import QuantizedLayer
from dfs_cli.export.lower import fold
from dfs_cli.export.network import BITS, IMAGES, LOGITS, OPERATING_POINT, Parts, export_dynamic, export_static
from dfs_cli.export.pixels import merge_pixels, on_merged_pixels
from dfs_cli.export.runtime import open_session
from dfs_cli.export.write import random_batches, write_onnx
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.nn.probe import ProbedResNet, doubt
from dfs_cli.nn.quantization import Convolution
from dfs_cli.surgery.biases import round_biases

SIZE = (3, 32, 32)


MODELS = {
    "BasicBlock": lambda: tiny_resnet(BasicBlock),
    "Bottleneck": lambda: tiny_resnet(Bottleneck),
    "squeeze and excitation": se_resnet,
    "preactivation": preactivated_resnet,
}


def dynamic(
    model: nn.Module, gate: str = "rnn", bits: tuple[int, ...] = (0, 4, 8), mirror: bool = False
) -> DynamicResNet:
    network = make_dynamic(model, DynamicConfig(bits=bits, gate=gate, mirror=mirror))  # type: ignore[arg-type]
    spread_gate(network, 4.0 if gate == "probe" else 1.0)
    round_biases(network, SIZE)
    if isinstance(network, ProbedResNet):
        network.policy.copy_(torch.arange(len(network.blocks)) % len(bits))
        network.fit_gate(images(40))
        with torch.no_grad():
            network.operating_point = float(doubt(network.run(images(40)).first).median())
    return network


def images(count: int) -> torch.Tensor:
    return torch.randn(count, *SIZE, generator=torch.Generator().manual_seed(1))


def run(model: onnx.ModelProto, image: torch.Tensor, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    session = open_session(model.SerializeToString(), threads=1)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {IMAGES: image[None].numpy(), **inputs}), strict=True))


def subgraphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield attribute.g
                yield from subgraphs(attribute.g)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("gate", ["rnn", "ff", "probe"])
@pytest.mark.parametrize("bits", [(0, 4, 8), (0, 8)])
def test_the_graph_decides_and_answers_as_the_network_does(name: str, gate: str, bits: tuple[int, ...]) -> None:
    network = dynamic(MODELS[name](), gate, bits, mirror=gate == "probe")
    model = export_dynamic(Parts(network, SIZE))
    onnx.checker.check_model(model)
    varied = images(40) * torch.linspace(0.2, 5.0, 40).reshape(-1, 1, 1, 1)
    batches = [Batch(varied, torch.zeros(40, dtype=torch.long), ())]
    comparison = compare(model.SerializeToString(), network, batches, labelled=False)
    assert comparison.same_decisions >= 0.95
    assert comparison.logit_difference < 0.02
    decisions = network.run(varied).decisions
    assert len(decisions.unique(dim=0)) >= len(bits)  # else it would prove little
    if isinstance(network, ProbedResNet):
        assert set(decisions[:, -1].tolist()) > {-1}


@pytest.mark.parametrize("name", MODELS)
def test_every_option_computes_what_it_does_in_the_network(name: str) -> None:
    network = dynamic(MODELS[name](), bits=(0, 2, 4, 6, 8, 16, 32))
    for option in range(7):
        policy = [option] * len(network.blocks)
        expected = network.run(images(1), torch.tensor([policy])).logits[0].detach().numpy()
        found = run(export_static(Parts(network, SIZE), policy), images(1)[0])[LOGITS][0]
        # Where a value lies between two codes, the last digit of a floating point number decides.
        assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max(), network.config.bits[option]


def test_eight_bit_branches_run_on_integers(tmp_path: Path) -> None:
    network = dynamic(tiny_resnet(Bottleneck), bits=(0, 8))
    model = export_dynamic(Parts(network, SIZE))
    open_session(model.SerializeToString(), threads=1, optimised=str(tmp_path / "run.onnx"))
    kernels = [[n.op_type for n in g.node] for g in subgraphs(onnx.load(tmp_path / "run.onnx").graph)]
    # The first two convolutions of each bottleneck, at least.
    assert sum(ops.count("QLinearConv") for ops in kernels) >= 2 * len(network.blocks)
    assert sum("Conv" in ops and "QLinearConv" not in ops for ops in kernels) <= len(network.blocks)


@pytest.mark.parametrize("gate", ["rnn", "probe"])
def test_blocks_may_hand_on_bytes(gate: str, tmp_path: Path) -> None:
    network = dynamic(tiny_resnet(Bottleneck), gate, bits=(0, 4, 8))
    model = export_dynamic(Parts(network, SIZE, images(8).numpy()))
    onnx.checker.check_model(model)
    open_session(model.SerializeToString(), threads=1, optimised=str(tmp_path / "run.onnx"))
    parts = list(subgraphs(onnx.load(tmp_path / "run.onnx").graph))
    kernels = [[n.op_type for n in part.node] for part in parts]
    # Both options that run, of every block: three convolutions and an addition, all on integers.
    assert sum(ops.count("QLinearAdd") for ops in kernels) == 2 * len(network.blocks)
    assert sum(ops.count("QLinearConv") for ops in kernels) >= 6 * len(network.blocks)
    assert not any("Conv" in ops or "ConvInteger" in ops for ops in kernels)
    # Where there is no downsampling, skipping copies bytes and does nothing else.
    assert any(set(ops) == {"Identity"} for ops in kernels)
    comparison = compare(model.SerializeToString(), network, random_batches(SIZE, 40), labelled=False)
    assert comparison.logit_difference < 0.5 and comparison.same_decisions > 0.5


def test_bytes_are_used_only_where_they_keep_the_promise() -> None:
    """Decisions that bytes change make the graph fall back to floating point numbers, which do not change them."""
    network = dynamic(tiny_resnet(), bits=(0, 2, 8))
    batches = random_batches(SIZE, 32)
    in_bytes = compare(write.serialise(Parts(network, SIZE, images(8).numpy()), None), network, batches, labelled=False)
    content, comparison = write.make_graph(network, SIZE, batches, labelled=False)
    assert comparison.holds and comparison.features == ("bytes" if in_bytes.holds else "floats")
    assert compare(content, network, batches, labelled=False).same_decisions == comparison.same_decisions
    # Preactivated blocks hand on negative values, and 16 bits need more than a byte.
    assert measure_scales(Parts(dynamic(preactivated_resnet()), SIZE), images(2).numpy()) is None
    assert measure_scales(Parts(dynamic(tiny_resnet(), bits=(0, 16)), SIZE), images(2).numpy()) is None
    assert Parts(dynamic(preactivated_resnet()), SIZE, images(2).numpy()).features == "floats"


def test_weights_lie_in_the_branch_that_uses_them_and_are_bytes() -> None:
    network = dynamic(tiny_resnet(BasicBlock), bits=(0, 4, 8))
    graph = export_dynamic(Parts(network, SIZE)).graph
    outside = {tensor.name for tensor in graph.initializer}
    branches = [g for g in subgraphs(graph) if any(n.op_type == "Conv" for n in g.node)]
    assert len(branches) >= 2 * len(network.blocks)
    for branch in branches:
        own = {tensor.name: numpy_helper.to_array(tensor) for tensor in branch.initializer}
        used = {name for node in branch.node for name in node.input}
        assert not used & outside
        assert all(a.dtype in (np.int8, np.uint8) for a in own.values() if a.size > 64)


def test_there_is_an_if_per_block_and_one_around_the_second_pass() -> None:
    one = export_dynamic(Parts(dynamic(tiny_resnet(), bits=(0, 4, 8)), SIZE)).graph
    assert [n.op_type for n in one.node].count("If") == 5
    two = export_dynamic(Parts(dynamic(tiny_resnet(), "probe"), SIZE)).graph
    assert [n.op_type for n in two.node].count("If") == 1


def test_the_operating_point_can_be_changed_per_call() -> None:
    network = dynamic(tiny_resnet(), bits=(0, 4, 8))
    model = export_dynamic(Parts(network, SIZE))
    image = images(1)[0]
    assert (run(model, image, **{OPERATING_POINT: np.array(1e9)})[BITS] == 0).all()
    assert (run(model, image, **{OPERATING_POINT: np.array(-1e9)})[BITS] == 8).all()
    probed = export_dynamic(Parts(dynamic(tiny_resnet(), "probe"), SIZE))
    assert (run(probed, image, **{OPERATING_POINT: np.array(1e9)})[BITS][:, 5:] == -1).all()
    assert (run(probed, image, **{OPERATING_POINT: np.array(-1e9)})[BITS][:, 5:] >= 0).all()


def test_a_sure_image_gets_the_first_answer() -> None:
    network = dynamic(tiny_resnet(), "probe")
    found = run(export_dynamic(Parts(network, SIZE)), images(1)[0], **{OPERATING_POINT: np.array(1e9)})
    expected = network.run(images(1), network.policy[None]).logits.detach().numpy()
    np.testing.assert_allclose(found[LOGITS], expected, atol=0.02)
    assert found[BITS][0, :5].tolist() == [network.config.bits[i] for i in network.policy]


@pytest.mark.parametrize("mirror", [False, True])
def test_a_static_graph_has_no_control_flow(mirror: bool) -> None:
    network = dynamic(tiny_resnet(), "probe", mirror=mirror)
    policy = [1, 2, 0, 1, 2, 2, 2, 1, 2, 0]
    model = export_static(Parts(network, SIZE), policy)
    assert not list(subgraphs(model.graph))
    expected = network.run(images(1), torch.tensor([policy])).logits.detach().numpy()
    np.testing.assert_allclose(run(model, images(1)[0])[LOGITS], expected, atol=0.02)
    once = network.run(images(1), torch.tensor([[*policy[:5], *[-1] * 5]])).logits.detach().numpy()
    found = run(export_static(Parts(network, SIZE), [*policy[:5], *[-1] * 5]), images(1)[0])[LOGITS]
    np.testing.assert_allclose(found, once, atol=0.02)


TENSORRT_TAKES = {
    "Add", "AveragePool", "BatchNormalization", "Clip", "Conv", "DequantizeLinear", "Flatten", "Gemm", "GlobalAveragePool",
    "Identity", "MaxPool", "Mul", "Pad", "QuantizeLinear", "ReduceMean", "Relu", "Reshape", "Sigmoid", "Slice", "Sub",
}  # fmt: skip
"""Of the operators of its importer's list (docs/operators.md of onnx-tensorrt), those that a ResNet may need."""


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("option", "gate"), [(1, "rnn"), (3, "rnn"), (3, "probe")])
def test_a_graph_for_tensorrt_has_signed_bytes_whose_zero_is_zero(name: str, option: int, gate: str) -> None:
    is_probed = gate == "probe"
    network = dynamic(MODELS[name](), gate, bits=(0, 4, 7, 8), mirror=is_probed)
    policy = [option] * len(network.blocks) * (1 + is_probed)
    model = export_static(Parts(network, SIZE, portable=True), policy)
    graph = model.graph
    assert {node.op_type for node in graph.node} <= TENSORRT_TAKES
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    quantizers = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert sum(node.op_type == "QuantizeLinear" for node in quantizers) >= 2 * len(network.blocks)
    for node in quantizers:
        scale, zero = (values[name] for name in node.input[1:])
        assert zero.dtype == np.int8 and not zero.any() and scale.dtype == np.float32 and (scale > 0).all()
    assert {v.dtype for v in values.values()} <= {np.dtype(t) for t in (np.float32, np.int8, np.int64)}
    expected = network.run(images(8), torch.tensor([policy] * 8)).logits.detach().numpy()
    differences = [np.abs(run(model, i)[LOGITS][0] - e).max() for i, e in zip(images(8), expected, strict=True)]
    # Where a value lies between two codes, the last digit of a floating point number decides.
    assert np.median(differences) < 1e-5 and max(differences) < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("channels", "size", "padding", "height", "width"),
    [(3, 7, 3, 32, 20), (3, 3, 1, 8, 8), (1, 5, 2, 10, 6), (4, 4, 1, 12, 8), (3, 2, 0, 6, 6), (3, 7, 0, 16, 16)],
)
def test_merging_pixels_leaves_a_convolution_as_it_is(
    channels: int, size: int, padding: int, height: int, width: int
) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (5, channels, size, size)).astype(np.float32)
    geometry = Convolution((2, 2), (padding, padding), (1, 1), 1)
    layer = QuantizedLayer(codes, np.ones(5), 1.0, -127, 127, 8, None, geometry)
    merged = on_merged_pixels(layer, height, width)
    assert merged is not None
    assert merged.geometry is not None
    assert merged.codes.shape[1] == 4 * channels
    x = rng.integers(-127, 128, (1, channels, height, width)).astype(np.float32)
    graph = Graph()
    names = [merge_pixels(graph, "x", channels, height, width), graph.constant(merged.codes, np.float32)]
    graph.add("Conv", names, ["y"], pads=merged.geometry.padding)
    made = helper.make_graph(
        graph.nodes,
        "pixels",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        graph.initializers,
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (found,) = open_session(model.SerializeToString(), threads=1).run(None, {"x": x})
    expected = nn.functional.conv2d(torch.from_numpy(x), torch.from_numpy(codes), None, 2, padding)
    assert np.array_equal(found, expected.numpy())


def test_pixels_are_merged_only_where_that_is_the_same_convolution() -> None:
    def geometry(stride: int = 2, dilation: int = 1, groups: int = 1) -> Convolution:
        return Convolution((stride, stride), (1, 1), (dilation, dilation), groups)

    def fits(shape: tuple[int, ...], geometry: Convolution | None, height: int = 8) -> bool:
        layer = QuantizedLayer(np.ones(shape), np.ones(5), 1.0, 0, 255, 8, None, geometry)
        return on_merged_pixels(layer, height, 8) is not None

    assert fits((5, 3, 3, 3), geometry())
    assert not fits((5, 3, 3, 3), geometry(stride=1))
    assert not fits((5, 3, 3, 3), geometry(dilation=2))
    assert not fits((6, 1, 3, 3), geometry(groups=3))
    assert not fits((5, 16, 3, 3), geometry())
    assert not fits((5, 3, 3, 3), geometry(), height=7)
    assert not fits((5, 3), None)


def test_parts_are_traced_without_changing_the_network() -> None:
    network = dynamic(tiny_resnet())
    before = {k: v.clone() for k, v in network.state_dict().items()}
    Parts(network, SIZE).option(0, 1)
    assert before.keys() == network.state_dict().keys()
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


def test_batch_norm_is_folded_on_integers() -> None:
    codes = np.array([[[[3.0]]], [[[-7.0]]], [[[5.0]]]])
    layer = QuantizedLayer(codes, np.array([0.5, 0.25, 1e-30]), 0.125, 0, 15, 4, None, None)
    weight, scale, bias = fold(layer, np.array([2.0, -1.0, 1.0]), np.array([0.3125, -0.0625, 1.0]))
    # What the integers stand for: factor * scale * codes, and the shift.
    units = scale * 0.125
    np.testing.assert_allclose((weight[:2].reshape(2) * scale[:2]), [3.0, 1.75])
    np.testing.assert_allclose(bias * units, [0.3125, -0.0625, 1.0], rtol=1e-6)
    assert np.abs(weight).max() <= 127 and np.abs(bias).max() <= 2**30 and (scale > 0).all()
    # 0.3125 is two and a half units of 0.125: a multiple of two of the codes makes it an integer.
    assert weight[0, 0, 0, 0] == 6 and bias[0] == 5


def test_a_graph_that_decides_otherwise_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, other = dynamic(tiny_resnet()), dynamic(tiny_resnet())
    spread_gate(other, 1.0, seed=5)
    monkeypatch.setattr(write, "export_dynamic", lambda _: export_dynamic(Parts(other, SIZE)))
    with pytest.raises(ExportError, match="same decisions for"):
        write_onnx(tmp_path / "out.onnx", network, SIZE, random_batches(SIZE, 16), labelled=False)
    assert not list(tmp_path.iterdir())


def test_what_is_promised_is_what_is_checked() -> None:
    check_holds(Comparison(1000, True, 0.995, 1.0, 90.0, 89.9, 0.0))
    for same, top1 in ((0.994, 90.0), (1.0, 89.8), (1.0, 90.2)):
        with pytest.raises(ExportError):
            check_holds(Comparison(1000, True, same, 1.0, 90.0, top1, 0.0))
    # On noise an answer may be a near tie; top-1 is then the share of the network's own answers.
    check_holds(Comparison(256, False, 1.0, 255 / 256, 100.0, 99.6, 0.0))
    with pytest.raises(ExportError):
        check_holds(Comparison(256, False, 1.0, 254 / 256, 100.0, 99.2, 0.0))


def test_graphs_too_large_for_onnx_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Parts) -> None:
        raise EncodeError("too large")

    monkeypatch.setattr(write, "export_dynamic", fail)
    with pytest.raises(ExportError, match="2 GiB"):
        write.serialise(Parts(dynamic(tiny_resnet()), SIZE), None)


def test_export_command(artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    result = CliRunner().invoke(app, ["export", str(artifact), "--onnx", str(out), "--num-samples", "200", "--json"])
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["images"] == 200 and record["labelled"] and record["same_decisions"] >= 0.995
    assert record["bytes"] == out.stat().st_size
    again = CliRunner().invoke(app, ["export", str(artifact), "--onnx", str(out)])
    assert again.exit_code == 2 and "--force" in again.stderr
    static = CliRunner().invoke(
        app, ["export", str(artifact), "--onnx", str(out), "--num-samples", "50", "--static", "--force"]
    )
    assert static.exit_code == 0, static.stderr
    assert not list(subgraphs(onnx.load(out).graph))
    signed = CliRunner().invoke(
        app, ["export", str(artifact), "--onnx", str(out), "--num-samples", "50", "--tensorrt", "--force", "--json"]
    )
    assert signed.exit_code == 0, signed.stderr
    assert json.loads(signed.stdout)["static"] and json.loads(signed.stdout)["tensorrt"]
    graph = onnx.load(out).graph
    assert not list(subgraphs(graph)) and TensorProto.UINT8 not in {tensor.data_type for tensor in graph.initializer}


def test_without_the_packages_it_says_what_to_install(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["export", str(artifact), "--onnx", str(tmp_path / "out.onnx")])
    assert result.exit_code == 2 and "pip install 'dfs-cli[onnx]'" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1

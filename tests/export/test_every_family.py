"""Every family, structure and architecture as graphs: they compute what the network computes, and other runtimes load them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import timm
import torch
from common import randomise, shallow_model
from common_export import (
    TENSORRT_TAKES,
    gated_network,
    make_network,
    parts_with_other_codes,
    run_batch,
    run_part,
    static_network,
    subgraphs,
)
from common_openvino import run_openvino
from torch import Tensor, nn

from dfs_cli.control.probe import ProbeController
from dfs_cli.cost.decisions import NOT_RUN, Decisions
from dfs_cli.export.baselines import export_dense, quantize_dense
from dfs_cli.export.network import BITS, IMAGES, LOGITS, export_network, export_static, fixed_decisions
from dfs_cli.export.part_writer import PartWriter
from dfs_cli.export.parts import Key, Parts
from dfs_cli.export.runtime import open_session
from dfs_cli.models.zoo import candidate_names
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.nn.passes import uncertainty

pytestmark = pytest.mark.medium
slow = pytest.mark.slow

ALL_BITS = (0, 2, 3, 4, 5, 6, 7, 8, 16, 32)
GATES = ("rnn", "ff", "probe", "static")
SIZE = (3, 64, 32)
ARCHITECTURES = [name for name in candidate_names() if not name.endswith(("_cifar", "_digits"))]


class Structure(NamedTuple):
    """An architecture, arguments of timm, and the (C, H, W) of images."""

    name: str
    arguments: Mapping[str, Any] = MappingProxyType({})
    size: tuple[int, int, int] = SIZE


STRUCTURES = {
    "basic": Structure("resnet18"),
    "bottleneck": Structure("resnet26"),
    "deep stem, average pooling": Structure("resnet26d"),
    "groups": Structure("resnext50_32x4d"),
    "stem without pooling": Structure("resnetrs50"),
    "efficient channel attention": Structure("ecaresnet26t"),
    "light attention": Structure("ecaresnetlight"),
    "squeeze and excitation": Structure("seresnext26d_32x4d"),
    "SENet": Structure("senet154"),
    "blur pooling": Structure("resnetblur18"),
    "blur pooling, deep stem": Structure("resnetblur50d"),
    "average pooling against aliasing": Structure("resnetaa50"),
    "group normalisation": Structure("resnet50_gn"),
    "Res2Net": Structure("res2net50_14w_8s"),
    "Res2NeXt": Structure("res2next50"),
    "ResNeSt": Structure("resnest14d"),
    "ResNeSt, one split": Structure("resnest50d_1s4x24d"),
    "selective kernels": Structure("skresnet18"),
    "selective kernels, bottleneck": Structure("skresnext50_32x4d"),
    "preactivation, basic": Structure("resnetv2_18d"),
    "preactivation": Structure("resnetv2_50"),
    "preactivation, group normalisation": Structure("resnetv2_50d_gn"),
    "EvoNorm": Structure("resnetv2_50d_evos"),
    "filter response normalisation": Structure("resnetv2_50d_frn"),
    "weight standardisation": Structure("resnetv2_50x1_bit"),
    # What a user may have chosen for a model of his own.
    "SiLU": Structure("resnet18", {"act_layer": "silu"}),
    "hard swish": Structure("resnet26", {"act_layer": "hard_swish"}),
    "GELU": Structure("skresnet18", {"act_layer": "gelu"}),
    "leaky ReLU": Structure("res2net50d", {"act_layer": "leaky_relu"}),
    "one channel": Structure("resnet18", {"in_chans": 1}, (1, 64, 64)),
    "odd size": Structure("resnetblur18", {}, (3, 65, 47)),
    "output stride": Structure("resnet26d", {"output_stride": 16}),
    "maximum pooling": Structure("resnet18", {"global_pool": "max"}),
    "average and maximum": Structure("seresnet18", {"global_pool": "catavgmax"}),
    "their mean": Structure("resnetv2_18", {"global_pool": "avgmax"}),
    "drop rates": Structure("resnet18", {"drop_rate": 0.5, "drop_path_rate": 0.5, "drop_block_rate": 0.1}),
}

ALIKE = {
    "bottleneck", "groups", "light attention", "SENet", "blur pooling, deep stem", "Res2NeXt", "ResNeSt, one split",
    "preactivation", "selective kernels, bottleneck", "leaky ReLU", "one channel", "maximum pooling", "their mean",
    "drop rates", "SiLU", "hard swish", "GELU", "odd size", "output stride", "average and maximum",
    "deep stem, average pooling", "stem without pooling", "average pooling against aliasing",
}  # fmt: skip
"""Structures that trace to what others trace to, and what a user may have chosen: the others run by default."""


NORMALISED_TOGETHER = {
    "group normalisation", "preactivation, group normalisation", "EvoNorm", "filter response normalisation",
    "weight standardisation",
}  # fmt: skip


def small_model(structure: Structure) -> nn.Module:
    """With one block of each structure and few channels, whatever the architecture's own number is."""
    torch.manual_seed(0)
    name, arguments, _ = structure
    narrow = {"channels": (128, 256, 256, 256) if "v2" in name else (32, 32, 64, 64)}
    fixed = "pruned" in name or name == "test_resnet"
    return randomise(shallow_model(name, num_classes=5, **arguments, **({} if fixed else narrow)))


@cache
def images(size: tuple[int, int, int]) -> Tensor:
    return torch.randn(4, *size, generator=torch.Generator().manual_seed(1))


def varied_images(size: tuple[int, int, int]) -> Tensor:
    """Of different contrast: networks with random weights tell noise of the same contrast hardly apart."""
    return torch.tensor([0.25, 0.5, 1.0, 2.0])[:, None, None, None] * images(size)


def check_close(actual: np.ndarray, expected: Tensor, most: float = 0.01) -> None:
    """Where a value lies between two codes, the last digit of a floating point number decides: few may differ."""
    values = expected.detach().numpy()
    assert np.isfinite(actual).all() and actual.shape == values.shape
    assert np.abs(actual - values).mean() <= most * np.abs(values).mean()


def run(model: bytes, batch: Tensor) -> dict[str, np.ndarray]:
    """The outputs in ONNX Runtime, by name, joined along the first axis."""
    session = open_session(model, threads=1)
    names = [output.name for output in session.get_outputs()]
    columns = zip(*(session.run(None, {IMAGES: image[None].numpy()}) for image in batch), strict=True)
    return {name: np.concatenate(column) for name, column in zip(names, columns, strict=True)}


def run_everywhere(
    model: onnx.ModelProto, batch: Tensor, exact: bool = True
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Have ONNX's own checker check it; returns what ONNX Runtime and what OpenVINO compute."""
    onnx.checker.check_model(model, full_check=True)
    for graph in (model.graph, *subgraphs(model.graph)):
        assert {node.domain for node in graph.node} <= {""}
    content = model.SerializeToString()
    return run(content, batch), run_openvino(content, batch.numpy(), exact)


def reference(network: DynamicResNet, image: Tensor, policy: Sequence[int]) -> Iterator[tuple[Key, Tensor, Tensor]]:
    """The parts of a pass, with what enters and what leaves each of them."""
    x, y = image, network.stem(image)
    yield "stem", x, y
    for index, option in enumerate(policy):
        x, y = y, network.run_block(index, y.clone(), option)
        yield (index, option), x, y
    yield "head", y, network.layout.head(network.backbone, y)


@torch.no_grad()
def check_plain_graphs(parts: Parts, policy: Sequence[int], most: float = 0.5) -> None:
    """With the same options for every image, for all runtimes and for TensorRT: part by part, and as a whole.

    Args:
        most: differences of few bits grow from part to part; the whole may differ by so much.
    """
    network, batch = parts.network, images(parts.input_size)
    decisions = Decisions.alike(torch.tensor(policy), 1)
    expected = network.run(batch, Decisions.alike(torch.tensor(policy), len(batch))).logits
    for tensorrt in (False, True):
        writer = PartWriter(parts, tensorrt=tensorrt)
        for key, x, y in reference(network, batch[:1], policy):
            check_close(run_part(writer, key, x), y)
        model = export_static(writer, decisions)
        kinds = {node.op_type for node in model.graph.node}
        assert not tensorrt or kinds <= TENSORRT_TAKES
        # Without its transformations OpenVINO 2026.4 cannot compile such graphs with group normalisation; with them, on
        # processors without AMX, it computes something else for those of Res2Net.
        exact = not tensorrt or "InstanceNormalization" not in kinds
        for results in run_everywhere(model, batch, exact):
            check_close(results[LOGITS], expected, most)


@torch.no_grad()
def check_decisions(parts: Parts) -> None:
    """The graph decides as the network does, and computes what the network computes for these decisions."""
    network, batch = parts.network, varied_images(parts.input_size)
    controller = network.controller
    if isinstance(controller, ProbeController):
        # A threshold between images, not on one of them.
        values = uncertainty(network.follow(batch, controller.policy.expand(4, -1))[0]).sort().values
        controller.operating_point = float(values[(gap := int(values.diff().argmax())) : gap + 2].mean())
    results, others = run_everywhere(export_network(PartWriter(parts)), batch)
    bits = torch.from_numpy(results[BITS])
    options = torch.full_like(bits, NOT_RUN)
    for option, value in enumerate(network.bits):
        options[bits == value] = option
    decisions = Decisions(options.reshape(len(bits), -1, len(network.blocks)))
    check_close(results[LOGITS], network.run(batch, decisions).logits, 0.5)
    assert int(network.run(batch).decisions.equal(decisions).sum()) >= 3
    assert (others[BITS] == results[BITS]).mean() > 0.75


def check_static_network(model: nn.Module, size: tuple[int, int, int], bits: int) -> None:
    """Layers of ``bits`` and of 8 bits in turns; the second block is skipped."""
    network = static_network(
        model,
        lambda block, layer: 0 if block == 1 else (8, bits)[(block + layer) % 2],
        tuple(sorted({0, bits, 8})),
        size,
    )
    decisions = fixed_decisions(network)
    assert decisions is not None
    check_plain_graphs(Parts(network, size), decisions.options.flatten().tolist())


@torch.no_grad()
def check_dense_graphs(model: nn.Module, size: tuple[int, int, int]) -> None:
    """Those that ``dfs bench`` measures."""
    dense = export_dense(model, size)
    onnx.checker.check_model(dense, full_check=True)
    image = images(size)[:1]
    expected = model(image)
    check_close(run(dense, image)[LOGITS], expected, 1e-4)
    check_close(run(quantize_dense(dense, images(size)), image)[LOGITS], expected, 0.5)


def check_all(structure: Structure, index: int) -> None:
    """All kinds of graphs, for the gate and the bitwidth that ``index`` names."""
    bits, gate = ALL_BITS[1 + index % 9], GATES[index // 9 % 4]
    model = small_model(structure)
    if gate == "static":
        check_static_network(model, structure.size, bits)
    else:
        parts = Parts(make_network(model, gate, (0, bits), structure.size), structure.size)
        check_plain_graphs(parts, [1] * len(parts.network.blocks))
        check_decisions(parts)
    check_dense_graphs(model, structure.size)


@pytest.mark.parametrize("name", [pytest.param(name, marks=slow) if name in ALIKE else name for name in STRUCTURES])
def test_every_structure(name: str) -> None:
    check_all(STRUCTURES[name], list(STRUCTURES).index(name))


@slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(name: str) -> None:
    check_all(Structure(name), ARCHITECTURES.index(name))


@slow
@pytest.mark.parametrize("name", STRUCTURES)
def test_every_structure_with_every_gate_and_bitwidth(name: str) -> None:
    structure = STRUCTURES[name]
    model, size = small_model(structure), structure.size
    parts = Parts(make_network(model, "ff", ALL_BITS, size), size)
    blocks = len(parts.network.blocks)
    for first in (1, 6):
        check_plain_graphs(parts, [(first + i) % len(ALL_BITS) for i in range(blocks)])
    check_static_network(model, size, 4)
    networks = [make_network(model, gate, (0, 4, 8), size) for gate in GATES if gate != "static"]
    parts = Parts(networks[0], size)
    for network in networks:
        parts.network.controller = network.controller  # the parts are the same
        check_decisions(parts)


@slow
@pytest.mark.parametrize("name", STRUCTURES)
def test_every_structure_hands_on_the_networks_codes(name: str) -> None:
    structure = STRUCTURES[name]
    network = gated_network(small_model(structure), bits=(0, 2, 5, 8), size=structure.size)
    found = parts_with_other_codes(network, structure.size)
    # What is neither convolution nor ReLU computes in floating point, where a value between two codes may fall to either;
    # normalisation over a group then shifts all of its values.
    assert all(share < (0.1 if name in NORMALISED_TOGETHER else 1e-3) for share in found.values()), found


@slow
@pytest.mark.parametrize("name", STRUCTURES)
@torch.no_grad()
def test_every_structure_in_batches(name: str) -> None:
    structure, gate = STRUCTURES[name], ("probe", "rnn", "ff")[list(STRUCTURES).index(name) % 3]
    network, size = make_network(small_model(structure), gate, (0, 4, 8), structure.size), structure.size
    alone, together = (export_network(PartWriter(Parts(network, size, batch))) for batch in (1, "dynamic"))
    batch = varied_images(size)
    expected, found = run(alone.SerializeToString(), batch), run_batch(together, batch, [3, 1])
    assert (found[BITS] == expected[BITS]).all()
    check_close(found[LOGITS], torch.from_numpy(expected[LOGITS]), 1e-4)
    model = small_model(structure)
    dense = onnx.load_from_string(export_dense(model, size, "dynamic"))
    check_close(run_batch(dense, batch, [3, 1])[LOGITS], model(batch), 1e-4)


def test_every_family_and_architecture_is_among_them() -> None:
    assert len(ARCHITECTURES) >= 123
    assert {structure.name for structure in STRUCTURES.values()} <= set(timm.list_models())
